"""A wall clock that is set by hours, forwards and backwards, while learner and actor work: only timestamps differ."""

import itertools
import json
import time

import pytest
from rig import until

from serl_launcher.replay.journal import JournalReader

# time.time and time_ns of every process that finds this on its path are off by the seconds in a file.
SHIFTED = """
import os, time

_time, _time_ns = time.time, time.time_ns

def _offset():
    try:
        with open(os.environ["CLOCK_OFFSET_FILE"]) as file:
            return float(file.read() or 0)
    except (KeyError, OSError, ValueError):
        return 0.0

time.time = lambda: _time() + _offset()
time.time_ns = lambda: _time_ns() + int(_offset() * 1e9)
"""
DEAD_S = 4.0


@pytest.fixture
def clock(tmp_path, monkeypatch):
    """set(hours): of the processes that are started from here on."""
    folder = tmp_path / "clock"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SHIFTED)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("CLOCK_OFFSET_FILE", str(folder / "offset"))
    return lambda hours: (folder / "offset").write_text(str(hours * 3600))


def test_a_clock_that_is_set_changes_nothing_but_timestamps(rig, clock):
    """An episode of a living actor stays open, one of a dead actor is closed in time, whatever the clock says."""
    clock(0)
    run = rig(gateway={"dead_actor_s": DEAD_S, "unticketed": True})
    run.start_gateway()
    actor = run.start_actor(ticks=30)
    run.await_acknowledged(5, 60)
    for hours in (3, -5, 2):
        clock(hours)
        run.await_acknowledged(8)
    log = run.run / "gateway.log"
    assert "is gone" not in log.read_text()
    assert "silent" not in log.read_text()
    for hours in (-7, 7):  # killed in mid-episode, once with the clock set back, once forward, right after
        actor.kill()
        actor.wait()
        clock(hours)
        closed = log.read_text().count("closing episode")
        killed = time.monotonic()
        until(lambda n=closed: log.read_text().count("closing episode") > n, 30, f"it is closed; {run.logs()}")
        assert time.monotonic() - killed >= DEAD_S - 1.5
        actor = run.start_actor(ticks=30)
        run.await_acknowledged(5, 60)
    run.gateway.kill()
    run.gateway.wait()
    clock(-9)
    run.start_gateway()
    run.await_acknowledged(5, 60)
    run.finish(actor)
    run.stop_gateway()
    run.judge(dataset=True)
    rows = [json.loads(line) for line in (run.run / "episodes.jsonl").read_text().splitlines()]
    assert [row["ordinal"] for row in rows] == list(range(len(rows)))
    assert falls(run) == 1  # of the second gateway, which was started at another time of day


def falls(run) -> int:
    """How often a record's time is before the one before it."""
    times = [record.time_ns for record in JournalReader(run.run / "journal").poll()]
    return sum(after < before for before, after in itertools.pairwise(times))
