"""Fixtures of the fault suite: a rig that cleans up, and the figures, printed at the end as a JSON line each."""

import json
import os
from pathlib import Path

import pytest
from chaos import SEED
from rig import Rig


class Figures:
    """One row for each thing that must be shown: a name, the goal in words, whether it holds, and what was measured."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []

    def row(self, name: str, goal: str, holds: bool, **measured: object) -> None:
        """Call it before the assertions, so that a failure is in the table too."""
        self.rows.append({"name": name, "goal": goal, "holds": bool(holds), **measured})


_FIGURES = Figures()


def pytest_collection_modifyitems(items):
    """Everything in this folder kills processes or breaks links."""
    here = os.path.dirname(__file__)
    for item in items:
        if str(item.path).startswith(here) and not any(item.iter_markers("soak")):
            item.add_marker(pytest.mark.faults)


def pytest_terminal_summary(terminalreporter):
    """The seed, then a JSON line for each row; $FAULTS_JSON: the file that gets them too."""
    if not _FIGURES.rows:
        return
    about = {"name": "faults", "seed": SEED, "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    lines = [json.dumps(row) for row in (about, *_FIGURES.rows)]
    terminalreporter.section("fault suite: figures")
    for line in lines:
        terminalreporter.write_line(line)
    if path := os.environ.get("FAULTS_JSON"):
        Path(path).write_text("\n".join(lines) + "\n")


@pytest.fixture
def figures():
    """Put measured figures here, a row for each thing that must be shown."""
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
