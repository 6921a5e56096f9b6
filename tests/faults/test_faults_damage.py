"""Damage to what was acknowledged, and power cuts: told by every process, recovered, and gone on with."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import check_run
import pytest
import recover_run
from rig import Rig, environment

from serl_launcher.replay.durable import MARK_FILE, read_mark
from serl_launcher.replay.journal import JournalReader


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1000] ^= 1
    path.write_bytes(raw)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1000)


def zero(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4096] + bytes(4096))


def gone(path: Path) -> None:
    path.unlink()


def ends(run: Path, *words: str) -> tuple[int, str]:
    """Exit code and stderr of a command on this run."""
    done = subprocess.run(
        [sys.executable, *words, str(run)], env=environment(), capture_output=True, text=True, check=False, timeout=60
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr


@pytest.mark.parametrize("damage", [flip, cut, zero, gone])
def test_damage_is_told_by_every_process_and_the_rest_is_gone_on_with(rig, figures, damage):
    run = rig(pixels=96, hz=100.0, segment_mb=2)
    run.start_gateway()
    actor = run.start_actor()
    run.await_acknowledged(40, 60)
    run.finish(actor)
    run.stop_gateway()
    acknowledged = run.judge(dataset=True)["acknowledged items"]
    segment = max((run.run / "journal").glob("*.seg"))
    damage(segment)
    before = {path: path.read_bytes() for path in (run.run / "journal").iterdir() if path.suffix == ".seg"}
    commands = (["-m", "serl_launcher.gateway"], ["-m", "serl_launcher.exporter"], [check_run.__file__])
    for words in commands:
        code, said = ends(run.run, *words)
        assert code == 2, said
        assert ".seg at byte" in said
        assert f"tools/recover_run.py {run.run}" in said
    assert {path: path.read_bytes() for path in before} == before
    assert not list(run.run.glob("dataset.foreign*"))
    done = subprocess.run(
        [sys.executable, recover_run.__file__, str(run.run)], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "1 place where acknowledged data is missing" in done.stdout
    again = Rig(run.run.with_name(f"{run.run.name}.recovered"), pixels=96, hz=100.0)
    try:
        reader = JournalReader(again.run / "journal")
        kept = len(list(reader.poll())) - 1
        again.start_gateway()
        actor = again.start_actor()
        again.await_acknowledged(10, 60)
        again.finish(actor)
        again.stop_gateway()
        assert again.judge(dataset=True)["items in the journal"] >= kept + 10
    finally:
        again.close()
    missing = acknowledged - kept
    figures.row(f"damage: {damage.__name__}", "told by all, the rest recovered", True, lost_items=missing, kept=kept)
    assert missing == 1 or damage in (gone, zero)


WRITER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from replay_samples import open_writer
writer = open_writer(Path(sys.argv[1]), 200_000)
n = 0
while True:
    time.sleep(0.001)
    for k in range(5):
        writer.append(str(n).encode() * 900, (lambda error, time_ns, n=n: print(n, flush=True)))
        n += 1
"""


@pytest.fixture
def ext4(tmp_path: Path):
    """A 64 MB ext4 on a loop device: its image, and where it is mounted. Skipped where this user may not mount."""
    image, folder = tmp_path / "image", tmp_path / "disk"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(64 << 20)
    for words in (["mkfs.ext4", "-q", "-F", str(image)], ["mount", "-o", "loop", str(image), str(folder)]):
        made = subprocess.run(words, capture_output=True, text=True, check=False)
        if made.returncode:
            pytest.skip(f"cannot make a file system here: {made.stderr.strip()}")
    yield image, folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_power_cut_leaves_a_mark_that_is_never_newer_than_the_disk(ext4, tmp_path, figures):
    """The raw device, copied while the writer stands still, is what a cut leaves. New segments and new writers too."""
    image, folder = ext4
    samples = Path(__file__).parents[1] / "serl_launcher" / "replay"
    journal = folder / "runs" / "night1" / "journal"
    confirmed, stale, base = 0, 0, 0
    for number in range(8):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(journal), str(samples)], env=environment(), stdout=subprocess.PIPE
        )
        try:
            assert writer.stdout is not None
            os.set_blocking(writer.stdout.fileno(), False)
            select.select([writer.stdout], [], [], 30)
            time.sleep(0.05 + 0.11 * number)
            writer.send_signal(signal.SIGSTOP)
            time.sleep(0.2)
            confirmed = base + (os.read(writer.stdout.fileno(), 1 << 20)).count(b"\n")
            records, mark = after_a_cut(image, tmp_path, journal.relative_to(folder))
        finally:
            writer.kill()
            writer.wait()
            assert writer.stdout is not None
            writer.stdout.close()
        assert records >= confirmed > base
        stale += mark < records
        reader = JournalReader(journal)
        base = len(list(reader.poll()))
        reader.close()
    figures.row("power cuts", "nothing confirmed is missing, no false alarm", True, cuts=8, marks_older=stale)
    assert stale  # the mark is not synced with each group: it was behind at least once


def after_a_cut(image: Path, tmp_path: Path, journal: Path) -> tuple[int, int]:
    """Records that can be read of the copied device, and how many its mark vouches for."""
    copy, folder = tmp_path / "cut", tmp_path / "after"
    folder.mkdir(exist_ok=True)
    subprocess.run(["cp", "--sparse=always", str(image), str(copy)], check=True)
    subprocess.run(["mount", "-o", "loop", str(copy), str(folder)], check=True)
    try:
        assert (folder / journal / MARK_FILE).exists()
        reader = JournalReader(folder / journal)
        records = len(list(reader.poll()))
        reader.close()
        mark = read_mark(folder / journal)
        assert mark is not None
        return records, mark.sequence or 0
    finally:
        subprocess.run(["umount", str(folder)], check=True)
        copy.unlink()
