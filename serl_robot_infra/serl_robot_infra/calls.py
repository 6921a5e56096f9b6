"""Calls into code that is not ours: the driver's, the operator's, the reward's. Made by the actor loop.

    with calls(env, "step"):  env.step(action) ─▶ what it raises, in words ─▶ the episode is cut, or the actor ends
                                  └ since when ─▶ observers/call_watch.py: said while it does not come back

What may be raised, and what follows: the table in docs/robot.md. The loop's thread calls, another one asks `current`.
"""

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from serl_robot_infra.envs.base import PartLostError
from serl_robot_infra.interventions.base import OperatorGoneError
from serl_transport.contract.errors import WireError

_PASS = (ValueError, PartLostError, OperatorGoneError, WireError)  # in the user's words already, or cut the episode


class PartFailedError(Exception):
    """Code of the robot, its operator or its reward failed; the message says where, for people."""


class Calls:
    """The call in hand, and what its failure means."""

    def __init__(self) -> None:
        self._stack: list[tuple[str, float]] = []  # (Class.method, time.monotonic() of its begin); "": our own code
        self._ours: BaseException | None = None  # raised by our code that a part has called back

    @property
    def current(self) -> tuple[str, float] | None:
        """(`Class.method`, seconds since it began) of the call in hand; None: our own code runs. From any thread."""
        name, since = next(reversed(list(self._stack)), ("", 0.0))
        return (name, time.monotonic() - since) if name else None

    @contextmanager
    def __call__(self, part: object, method: str) -> Iterator[None]:
        """Around `part.method(...)`. Raises PartFailedError for what is not for the user or for a cut already."""
        name = f"{type(part).__name__}.{method}"
        try:
            with self._noted(name):
                yield
        except _PASS:
            raise
        except Exception as fault:
            if fault is self._ours:
                raise
            at = traceback.extract_tb(fault.__traceback__)[-1]
            words = " ".join(str(fault).split())
            kind = type(fault).__name__
            raise PartFailedError(f"{name} failed: {kind}: {words} ({at.filename}, line {at.lineno})") from fault

    @contextmanager
    def called_back(self) -> Iterator[None]:
        """Around our own code that a part calls: what it raises goes through, and its time is not the part's."""
        try:
            with self._noted(""):
                yield
        except Exception as fault:
            self._ours = fault
            raise

    @contextmanager
    def _noted(self, name: str) -> Iterator[None]:
        self._stack.append((name, time.monotonic()))
        try:
            yield
        finally:
            self._stack.pop()
