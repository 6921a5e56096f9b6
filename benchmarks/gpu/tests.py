"""The tests that need a card (marker gpu), each a row as it ends. Stage `tests`.

In a rehearsal the other tests of the same files run, so that what they import is there.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from gpu.cases import Bench
from gpu.record import Record

ROOT = Path(__file__).resolve().parents[2]
MARK = "pytest.mark.gpu"


class Rows:
    """A plugin of pytest that hands each test's outcome on."""

    def __init__(self, record: Record) -> None:
        self.record, self.passed = record, 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Of setup, call and teardown: what failed, and every call that passed."""
        if report.failed:
            self.record.failed = True
            words = str(getattr(report.longrepr, "reprcrash", report.longrepr)).strip().splitlines()
            self.record.figure(f"test/{report.nodeid}", "failed", reason=(words or ["?"])[-1][:300])
        elif report.when == "call" and report.passed:
            self.passed += 1
            self.record.figure(f"test/{report.nodeid}", report.duration, "s")
        elif report.skipped:
            self.record.figure(f"test/{report.nodeid}", "skipped")


def files() -> list[str]:
    """Test files with a test that needs a card; those that break something of it last, they may leave it broken."""
    found = [path for path in (ROOT / "tests").rglob("test_*.py") if MARK in path.read_text()]
    return [str(path) for path in sorted(found, key=lambda path: ("fail" in path.name, path))]


def run(bench: Bench, record: Record) -> None:
    """All of them; RuntimeError where none was run."""
    os.chdir(ROOT)
    rows = Rows(record)
    mark = "gpu" if bench.size == "released" else "not gpu and not slow"
    # pyproject.toml's own `-m` is overridden by a later one.
    code = pytest.main(["-m", mark, "-q", "-p", "no:cacheprovider", *files()], plugins=[rows])
    record.figure("tests/passed", rows.passed, "tests", exit_code=int(code))
    if code != 0:
        raise RuntimeError(f"pytest ended with {code!r}, {rows.passed} tests passed")
