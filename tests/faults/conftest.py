"""Fixtures of the fault suite: a rig that cleans up, and the figures that are printed as JSON at the end."""

import json
import os
from pathlib import Path

import pytest
from chaos import SEED
from rig import Rig

_FIGURES: dict[str, object] = {}


def pytest_collection_modifyitems(items):
    """Everything in this folder kills processes or breaks links."""
    here = os.path.dirname(__file__)
    for item in items:
        if str(item.path).startswith(here) and not any(item.iter_markers("soak")):
            item.add_marker(pytest.mark.faults)


def pytest_terminal_summary(terminalreporter):
    """The suite's figures, one JSON object; also in $FAULTS_JSON."""
    if _FIGURES:
        text = json.dumps({"seed": SEED, **_FIGURES})
        terminalreporter.write_line(f"faults: {text}")
        if path := os.environ.get("FAULTS_JSON"):
            Path(path).write_text(text + "\n")


@pytest.fixture
def figures():
    """Put measured figures here by name."""
    return _FIGURES


@pytest.fixture
def rig(tmp_path):
    """make(**options) -> a Rig in a folder of this test."""
    made = []

    def make(**options) -> Rig:
        made.append(Rig(tmp_path / "run", **options))
        return made[-1]

    yield make
    for one in made:
        one.close()
