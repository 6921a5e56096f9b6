"""Modules that the measurements do not need and a bare PyTorch host does not have. Called first by every stage.

Video and dataset libraries are made unimportable, also where they are installed, so that a rehearsal in the full
environment fails where the card's host would. OpenCV is imported by LeRobot's package of policies at its first line and
used by none of the paths here: an empty module stands for it, which says so when something of it is asked for.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

UNIMPORTABLE = ("av", "torchcodec", "datasets")
EMPTY = "cv2"


class Empty(ModuleType):
    """A module without anything in it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system asks for these
            raise AttributeError(name)
        raise ImportError(
            f"{self.__name__}.{name} is used, and {self.__name__} is left out here (benchmarks/gpu/absent.py)"
        )


def leave_out() -> None:
    """From now on in this process. Call it before anything of them is imported."""
    for name in UNIMPORTABLE:
        sys.modules[name] = None  # type: ignore[assignment]  the import system's own sign for "not there"
    module = Empty(EMPTY)
    module.__spec__ = ModuleSpec(EMPTY, None)
    sys.modules[EMPTY] = module
