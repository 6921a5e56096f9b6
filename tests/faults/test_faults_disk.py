"""A full disk under the journal: no acknowledgements, the actor keeps everything, ingest comes back by itself."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import pytest
from rig import Rig, until


@pytest.fixture
def small_disk(tmpfs):
    """An 8 MB tmpfs."""
    return tmpfs("size=8m")


def await_refusals(run: Rig) -> None:
    """Until nothing was acknowledged for 3 s: small items may still find room where a large one did not."""
    deadline = time.monotonic() + 20
    before, since = run.acknowledged(), time.monotonic()
    while time.monotonic() - since < 3:
        assert time.monotonic() < deadline, "acknowledgements go on on a full disk"
        time.sleep(0.1)
        if run.acknowledged() != before:
            before, since = run.acknowledged(), time.monotonic()


def test_a_full_disk(rig, small_disk: Path, figures):
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(6 << 20))
    (small_disk / "journal").mkdir()
    run = rig(pixels=64, journal=small_disk / "journal")
    run.start_gateway()
    actor = run.start_actor()
    run.await_acknowledged(2, 60)
    until(lambda: "disk is full" in (run.run / "gateway.log").read_text(), 60, "the disk fills up")
    await_refusals(run)
    ballast.unlink()
    back_s = run.await_acknowledged(1, 20)
    report = run.finish(actor)
    run.stop_gateway()
    counts = run.judge()
    assert counts["items in the journal"] == report["sent"]
    figures.row("full_disk", "ingest back within 2 s of space", back_s <= 2, ingest_back_s=round(back_s, 2), lost=0)
    assert back_s <= 2.0


def test_a_journal_file_that_may_not_grow(rig, figures):
    """The same without mounting: a file size limit on the gateway, lifted later."""
    run = rig(pixels=64)
    gateway = run.start_gateway()
    actor = run.start_actor()
    run.await_acknowledged(5, 60)
    limit = max(path.stat().st_size for path in (run.run / "journal").glob("*.seg")) + 100_000
    resource.prlimit(gateway.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    until(lambda: "disk is full" in (run.run / "gateway.log").read_text(), 60, "the file reaches its limit")
    await_refusals(run)
    resource.prlimit(gateway.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    back_s = run.await_acknowledged(1, 20)
    report = run.finish(actor)
    run.stop_gateway()
    assert run.judge()["items in the journal"] == report["sent"]
    figures.row("file_limit", "ingest back within 2 s of space", back_s <= 2, ingest_back_s=round(back_s, 2), lost=0)
    assert back_s <= 2.0
