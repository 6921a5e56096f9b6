"""The journal: synced before it is confirmed, whole after every kind of tear, and loud about real damage."""

from __future__ import annotations

import os
import resource
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from replay_samples import open_writer, wait_for

from serl_launcher.replay.durable import FIRST_OFFSET, SEGMENT_MAGIC, Mark, Position, write_mark
from serl_launcher.replay.journal import OLD_MAGIC, JournalCorrupt, JournalReader, segment_numbers, segment_path
from serl_launcher.replay.journal_writer import JournalLock, RunFolderBusyError
from serl_transport.contract.errors import StorageFull


def write(folder: Path, payloads: list[bytes], segment_bytes: int = 1 << 20, one_by_one: bool = True) -> list:
    """Write payloads; the errors their callbacks got."""
    writer, errors = open_writer(folder, segment_bytes), []
    for count, payload in enumerate(payloads, 1):
        writer.append(payload, lambda error, time_ns: errors.append(error))
        if one_by_one:
            wait_for(lambda count=count: len(errors) == count)
    writer.close()
    return errors


def read(folder: Path, start: Position | None = None, follow: bool = False) -> list[bytes]:
    reader = JournalReader(folder, start, follow)
    payloads = [record.payload for record in reader.poll()]
    reader.close()
    return payloads


def vouch_for(folder: Path, records: int) -> None:
    """The durable mark as it was when so many records had been synced."""
    reader = JournalReader(folder)
    ends = [Position(), *(record.end for record in reader.poll())]
    reader.close()
    write_mark(folder, Mark(ends[records], records))


PAYLOADS = [bytes([k]) * (50 + 7 * k) for k in range(20)]


def test_round_trip_over_segments_and_sessions(tmp_path: Path) -> None:
    assert write(tmp_path, PAYLOADS[:12], segment_bytes=400) == [None] * 12
    write(tmp_path, PAYLOADS[12:], segment_bytes=400)
    assert read(tmp_path) == PAYLOADS
    assert len(segment_numbers(tmp_path)) > 3
    assert read(tmp_path, follow=True) == PAYLOADS
    reader = JournalReader(tmp_path)
    records = list(reader.poll())
    assert [record.sequence for record in records] == list(range(20))
    assert read(tmp_path, start=records[6].end) == PAYLOADS[7:]


def test_a_group_is_written_in_order(tmp_path: Path) -> None:
    write(tmp_path, PAYLOADS, one_by_one=False)
    assert read(tmp_path) == PAYLOADS


def test_follows_a_growing_journal(tmp_path: Path) -> None:
    reader = JournalReader(tmp_path, follow=True)
    assert list(reader.poll()) == []
    writer, done = open_writer(tmp_path, 300), []
    got = []
    for count, payload in enumerate(PAYLOADS, 1):
        writer.append(payload, lambda error, time_ns: done.append(error))
        wait_for(lambda count=count: len(done) == count)
        got += [record.payload for record in reader.poll()]
    writer.close()
    assert got == PAYLOADS


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_torn_tail_is_dropped_and_written_over(tmp_path: Path, cut: int) -> None:
    write(tmp_path, PAYLOADS)
    vouch_for(tmp_path, 19)
    segment = segment_path(tmp_path, 1)
    os.truncate(segment, segment.stat().st_size - cut)
    assert read(tmp_path) == PAYLOADS[:-1]
    write(tmp_path, [b"after"])
    assert read(tmp_path) == [*PAYLOADS[:-1], b"after"]


def test_garbage_behind_the_end_is_a_torn_tail(tmp_path: Path) -> None:
    write(tmp_path, PAYLOADS)
    with segment_path(tmp_path, 1).open("ab") as file:
        file.write(b"\0" * 500)
    assert read(tmp_path) == PAYLOADS
    write(tmp_path, [b"after"])
    assert read(tmp_path) == [*PAYLOADS, b"after"]


def test_a_segment_without_its_header_is_the_empty_newest(tmp_path: Path) -> None:
    write(tmp_path, PAYLOADS)
    segment_path(tmp_path, 2).touch()  # killed between creating the segment and writing to it
    assert read(tmp_path) == PAYLOADS
    write(tmp_path, [b"after"])
    assert read(tmp_path) == [*PAYLOADS, b"after"]


def test_records_of_the_release_before_are_read_and_continued(tmp_path: Path) -> None:
    """They are summed by CRC-32; the journal is the source of truth of every run folder there is."""
    tail = struct.pack("<QQqQ", 3, 0, 1, FIRST_OFFSET) + b"old"
    old = OLD_MAGIC + struct.pack("<I", zlib.crc32(tail)) + tail
    segment_path(tmp_path, 1).write_bytes(SEGMENT_MAGIC + old)
    write(tmp_path, [b"new"])
    assert read(tmp_path) == [b"old", b"new"]
    flip(segment_path(tmp_path, 1), FIRST_OFFSET + len(old) - 1)
    with pytest.raises(JournalCorrupt, match="what was synced is damaged"):
        read(tmp_path)


def flip(path: Path, offset: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 0xFF
    path.write_bytes(raw)


def test_damage_in_front_of_synced_records_is_corruption(tmp_path: Path) -> None:
    write(tmp_path, PAYLOADS)
    flip(segment_path(tmp_path, 1), 300)
    with pytest.raises(JournalCorrupt, match=r"000001\.seg at byte"):
        read(tmp_path)


def test_damage_in_an_older_segment_is_corruption(tmp_path: Path) -> None:
    write(tmp_path, PAYLOADS, segment_bytes=400)
    path = segment_path(tmp_path, 2)
    flip(path, path.stat().st_size - 3)  # its last record: no later one in the same file could testify
    with pytest.raises(JournalCorrupt, match=r"000002\.seg"):
        read(tmp_path)


def test_damage_within_the_last_unsynced_group_is_a_torn_tail(tmp_path: Path) -> None:
    """A power cut may keep page 2 and lose page 1 of a group that was never confirmed."""
    write(tmp_path, PAYLOADS[:3])
    end = segment_path(tmp_path, 1).stat().st_size
    write(tmp_path, PAYLOADS[3:10], one_by_one=False)  # one or few groups, the first begins at `end`
    raw = segment_path(tmp_path, 1).read_bytes()
    reader = JournalReader(tmp_path, Position(1, end))
    first = next(iter(reader.poll()))
    reader.close()
    record = raw[end : first.end.offset]
    # Rebuild the file as one group: the same first record twice, each saying that only `end` bytes were synced.
    segment_path(tmp_path, 1).write_bytes(raw[:end] + record + record)
    flip(segment_path(tmp_path, 1), end + 50)
    write_mark(tmp_path, Mark(Position(1, end), 3))
    assert read(tmp_path) == PAYLOADS[:3]


def test_a_foreign_file_is_named(tmp_path: Path) -> None:
    segment_path(tmp_path, 1).write_bytes(b"this is a text file")
    with pytest.raises(JournalCorrupt, match="no journal segment"):
        read(tmp_path)


def test_a_full_disk_refuses_and_recovers(tmp_path: Path) -> None:
    """The kernel's own file size limit stands for the full disk: it, too, lets a part of the write through first."""
    writer, errors = open_writer(tmp_path), []

    def put(payload: bytes) -> StorageFull | None:
        count = len(errors)
        writer.append(payload, lambda error, time_ns: errors.append(error))
        wait_for(lambda: len(errors) > count)
        return errors[-1]

    assert put(b"x" * 100) is None
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        refused = put(b"y" * (1 << 21))
        assert isinstance(refused, StorageFull)
        assert "disk is full" in refused.message
        assert str(tmp_path) in refused.message
        assert put(b"small") is None  # what fits is still taken
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert put(b"y" * (1 << 21)) is None  # space again: the retry works
    writer.close()
    assert [len(payload) for payload in read(tmp_path)] == [100, 5, 1 << 21]


def test_a_full_disk_at_rotation_refuses_and_recovers(tmp_path: Path) -> None:
    writer, errors = open_writer(tmp_path, segment_bytes=150), []
    blocker = segment_path(tmp_path, 2)
    blocker.mkdir()  # the next segment cannot be opened
    for payload in (b"x" * 200, b"second"):
        writer.append(payload, lambda error, time_ns: errors.append(error))
        wait_for(lambda: len(errors) > 0 and errors[0] is None)
    wait_for(lambda: len(errors) == 2)
    assert isinstance(errors[1], StorageFull)
    blocker.rmdir()
    writer.append(b"second", lambda error, time_ns: errors.append(error))
    wait_for(lambda: len(errors) == 3)
    writer.close()
    assert errors[2] is None
    assert read(tmp_path) == [b"x" * 200, b"second"]


def test_one_gateway_per_run_folder(tmp_path: Path) -> None:
    lock = JournalLock(tmp_path / "journal")
    with pytest.raises(RunFolderBusyError, match=f"pid {os.getpid()}.*{tmp_path}"):
        JournalLock(tmp_path / "journal")
    lock.release()
    JournalLock(tmp_path / "journal").release()


KILLED = """
import sys, time
from pathlib import Path
from replay_samples import open_writer
writer = open_writer(Path(sys.argv[1]), 20000)
n = 0
while True:
    time.sleep(0.002)
    for k in range(5):
        writer.append(str(n).encode() * 300, (lambda error, time_ns, n=n: print(n, flush=True)))
        n += 1
"""


def test_kill_9_loses_nothing_that_was_confirmed(tmp_path: Path) -> None:
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        stdout=subprocess.PIPE, env=environment, text=True,
    )  # fmt: skip
    confirmed = [int(process.stdout.readline()) for _ in range(200)]
    process.kill()
    confirmed += [int(line) for line in process.stdout.read().split("\n")[:-1]]
    process.wait()
    process.stdout.close()
    on_disk = read(tmp_path)
    assert confirmed == list(range(len(confirmed)))
    assert on_disk[: len(confirmed)] == [str(n).encode() * 300 for n in confirmed]
    write(tmp_path, [b"after"])
    assert read(tmp_path) == [*on_disk, b"after"]
