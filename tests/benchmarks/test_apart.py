"""A row that fails, whatever ends it, costs itself alone and says why."""

import os
import signal
import time
from functools import partial

import pytest
import run
import torch
from rows import Row
from suites._apart import apart, guarded

FIRST = Row.of("policy/a/first", 1.0, "ms")


def measure(how):
    yield FIRST
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        os._exit(7)
    if how == "hangs":
        time.sleep(60)
    raise {
        "memory": torch.OutOfMemoryError("CUDA out of memory"),
        "error": ValueError("expected 3 cameras, got 2\nmore"),
        "silent": AssertionError(),
    }[how]


REASONS = {
    "memory": "out of memory",
    "error": "failed: ValueError: expected 3 cameras, got 2",
    "silent": "failed: AssertionError",
}
ENDS = {
    "killed": "failed: its process was ended by SIGKILL",
    "exit": "failed: its process ended with exit code 7",
    "hangs": "failed: no row for 0.5 s; it was ended",
}


@pytest.mark.parametrize("how", REASONS)
def test_what_a_row_raises_is_said(how):
    assert list(guarded("policy/a", partial(measure, how))) == [FIRST, Row.failed("policy/a", REASONS[how])]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.parametrize("how", [*ENDS, "error"])
def test_what_ends_the_process_of_a_row_is_said(how):
    rows = list(apart("policy/a", partial(measure, how), limit_s=0.5 if how == "hangs" else 20, method="fork"))
    assert rows == [FIRST, Row.failed("policy/a", (ENDS | REASONS)[how])]


def test_a_run_with_a_row_that_failed_is_no_success(monkeypatch, capsys):
    class Suite:
        def rows(self, quick):
            yield from guarded("policy/a", partial(measure, "error"))
            yield FIRST

    monkeypatch.setattr(run.importlib, "import_module", lambda name: Suite())
    assert run.main(["policy"]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 3
