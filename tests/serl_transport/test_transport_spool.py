"""The spool: what was appended and not acknowledged is there after any death, and nothing else."""

import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest

from serl_transport.contract.errors import SpoolBusy, SpoolError, SpoolFull
from serl_transport.delivery.segment import HEAD_BYTES
from serl_transport.delivery.spool import DiskSpool, ItemKey, MemorySpool, Spool, open_spool
from serl_transport.wire.blob import join, split


def items(spool: Spool) -> list[bytes]:
    return [bytes(frame) for key in spool.pending() for frame in spool.read(key)]


@pytest.fixture(params=["disk", "memory"])
def spool(request, tmp_path):
    opened = open_spool(tmp_path / "spool" if request.param == "disk" else None, 10_000)
    yield opened
    opened.close()


def test_append_read_ack(spool):
    assert [spool.append([b"item %d" % i]) for i in range(3)] == [1, 2, 3]
    assert items(spool) == [b"item 0", b"item 1", b"item 2"]
    assert spool.ack(ItemKey(spool.boot_id, 2)) is True
    assert spool.ack(ItemKey(spool.boot_id, 2)) is False
    assert spool.ack(ItemKey("another boot", 1)) is False
    assert items(spool) == [b"item 0", b"item 2"]
    assert len(spool) == 2


def test_full_says_so_keeps_what_it_has_and_acks_make_room(spool):
    for _ in range(5):
        spool.append([bytes(1500)])
    with pytest.raises(SpoolFull, match=r"is full: 5 items .* start the learner or give more room with spool_bytes="):
        spool.append([bytes(3000)])
    held = len(spool)
    assert held == 5
    assert spool.nbytes <= 10_000
    for key in spool.pending():
        spool.ack(key)
    for _ in range(20):  # far more than fits at once: acknowledged items leave room
        seq = spool.append([bytes(1500)])
        assert spool.ack(ItemKey(spool.boot_id, seq))
    assert len(spool) == 0
    assert seq == held + 20


def test_acknowledged_segments_leave_the_disk(tmp_path):
    spool = DiskSpool(tmp_path, 80_000)  # segments of 10 kB: six of these items each
    keys = [ItemKey(spool.boot_id, spool.append([bytes(1500)])) for _ in range(30)]
    assert len(list(tmp_path.glob("*.seg"))) == 5
    for key in keys[:-1]:
        spool.ack(key)
    assert len(list(tmp_path.glob("*.seg"))) == 1
    spool.close()
    assert DiskSpool(tmp_path).pending() == [keys[-1]]


def test_the_next_boot_finds_what_was_left_in_order(tmp_path):
    first = DiskSpool(tmp_path)
    for i in range(5):
        first.append([b"first %d" % i])
    for seq in (1, 2, 4):  # 4 out of order: the watermark stays at 2
        first.ack(ItemKey(first.boot_id, seq))
    first.close()
    second = DiskSpool(tmp_path)
    assert second.boot_id > first.boot_id
    second.append([b"second 0"])
    # 4 was acknowledged above the watermark: it may come again, and the learner deduplicates it
    assert items(second) == [b"first 2", b"first 3", b"first 4", b"second 0"]
    for key in second.pending()[:3]:
        assert key.boot_id == first.boot_id
        second.ack(key)
    second.close()
    assert items(DiskSpool(tmp_path)) == [b"second 0"]


def test_a_boot_after_the_clock_was_set_back_still_comes_after_the_last(tmp_path, monkeypatch):
    first = DiskSpool(tmp_path)
    first.append([b"first"])
    first.close()
    wall = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: wall - 5 * 3600 * 10**9)
    second = DiskSpool(tmp_path)
    second.append([b"second"])
    assert second.boot_id > first.boot_id
    assert second.session == first.session
    assert [key.boot_id for key in second.pending()] == sorted([first.boot_id, second.boot_id])
    second.close()


def test_a_clean_end_leaves_no_file_behind(tmp_path):
    spool = DiskSpool(tmp_path)
    spool.ack(ItemKey(spool.boot_id, spool.append([b"x"])))
    spool.close()
    assert list(tmp_path.glob("*.seg")) == []


@pytest.mark.parametrize("damage", ["cut", "flip", "junk"])
def test_a_torn_tail_is_cut_off(tmp_path, damage, caplog):
    spool = DiskSpool(tmp_path)
    for i in range(3):
        spool.append([b"item %d" % i])
    spool.close()
    path = next(tmp_path.glob("*.seg"))
    data = bytearray(path.read_bytes())
    if damage == "cut":
        del data[-1:]
    elif damage == "flip":
        data[-1] ^= 1
    else:
        data += b"half a record"
    path.write_bytes(data)
    again = DiskSpool(tmp_path)
    assert items(again) == [b"item 0", b"item 1", b"item 2"][: 3 if damage == "junk" else 2]
    assert "cut off a torn tail" in caplog.text
    assert len(path.read_bytes()) == again.nbytes


def test_a_segment_killed_before_its_head_was_written_is_no_obstacle(tmp_path):
    (tmp_path / "000001.seg").write_bytes(bytes(HEAD_BYTES - 1))
    spool = DiskSpool(tmp_path)
    assert spool.pending() == []
    spool.append([b"x"])
    assert [path.name for path in tmp_path.glob("*.seg")] == ["000001.seg"]


def test_bytes_that_changed_under_us_are_noticed_on_read(tmp_path):
    spool = DiskSpool(tmp_path)
    spool.append([b"precious"])
    path = next(tmp_path.glob("*.seg"))
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"X")
    with pytest.raises(SpoolError, match="item 1 does not match its CRC"):
        spool.read(ItemKey(spool.boot_id, 1))


def test_a_refused_item_is_set_aside_with_its_reason(tmp_path):
    spool = DiskSpool(tmp_path)
    key = ItemKey(spool.boot_id, spool.append([b"poison"]))
    where = spool.refuse(key, "schema_mismatch: wrong camera")
    assert len(spool) == 0
    aside = Path(where.removeprefix("moved to "))
    assert split(aside.read_bytes()) == [b"poison"]
    assert aside.with_suffix(".txt").read_text() == "schema_mismatch: wrong camera\n"


def test_two_actors_cannot_share_a_spool(tmp_path):
    spool = DiskSpool(tmp_path)
    message = f"in use by process {os.getpid()}: two actors must not share a name; .* another unique_identifier="
    with pytest.raises(SpoolBusy, match=message):
        DiskSpool(tmp_path)
    spool.close()
    DiskSpool(tmp_path).close()


def test_a_folder_that_cannot_be_written_is_one_clear_message(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(SpoolError, match=r"cannot write the spool folder .*file/spool: .*; give another spool_dir="):
        DiskSpool(blocker / "spool")


def test_a_full_disk_is_spool_full_and_loses_nothing(tmp_path, monkeypatch):
    spool = DiskSpool(tmp_path)
    spool.append([b"before"])
    real, calls = os.pwritev, []

    def half_then_full(descriptor, buffers, offset):
        calls.append(offset)
        if len(calls) == 1:
            return real(descriptor, [buffers[0], buffers[1][:100]], offset)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwritev", half_then_full)
    with pytest.raises(SpoolFull, match=r"cannot write to the spool .*: No space left on device"):
        spool.append([bytes(1050)])
    monkeypatch.undo()
    spool.append([b"after"])
    assert items(spool) == [b"before", b"after"]
    spool.close()
    assert items(DiskSpool(tmp_path)) == [b"before", b"after"]


def test_memory_spool_drops_what_the_learner_refuses():
    spool = MemorySpool()
    assert spool.refuse(ItemKey(spool.boot_id, spool.append([b"x"])), "no") == "dropped"
    assert len(spool) == 0


APPENDER = """
import sys
from serl_transport.delivery.spool import DiskSpool, ItemKey
spool = DiskSpool(sys.argv[1], 2_000_000)
while True:
    seq = spool.append([b"%d " % (spool._last_seq + 1) * 400])
    if seq % 3 == 0:
        spool.ack(ItemKey(spool.boot_id, seq - 2))
    print(seq, flush=True)
"""


def test_kill_9_in_mid_append_loses_nothing_that_append_returned(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", APPENDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 200:
            break
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read().split()
    process.wait()
    last = int(rest[-1]) if rest else 200
    spool = DiskSpool(tmp_path)  # the dead process's lock is free
    kept = {key.seq: spool.read(key) for key in spool.pending()}
    # seqs 1, 4, 7 ... were acknowledged; those above the watermark (seq 1) may show up again
    assert {seq for seq in range(2, last + 1) if seq % 3 != 1} <= set(kept)
    assert 1 not in kept
    assert all(item == [b"%d " % seq * 400] for seq, item in kept.items())


def test_a_spool_of_the_release_before_is_read_and_continued(tmp_path):
    """Its records are summed by CRC-32; what it holds must not be lost by an update of the actor."""
    head = struct.pack("<8s64sQI4x", b"SERLSP01", b"0-boot", 0, zlib.crc32(bytes(8)))
    item = join([b"old"])
    record = struct.pack("<QI", 1, len(item)) + item
    path = tmp_path / "000001.seg"
    path.write_bytes(head + struct.pack("<IIQ", len(item), zlib.crc32(record), 1) + item)
    spool = DiskSpool(tmp_path)
    spool.append([b"new"])
    assert items(spool) == [b"old", b"new"]
    spool.close()
    damaged = bytearray(path.read_bytes())
    damaged[-6] ^= 1
    path.write_bytes(damaged)
    assert items(DiskSpool(tmp_path)) == [b"new"]


@pytest.mark.parametrize("place", ["item", "length", "seq", "checksum"])
def test_a_damaged_record_costs_its_own_item_alone(tmp_path, caplog, place):
    spool = DiskSpool(tmp_path)
    for k in range(4):
        spool.append([b"item %d" % k * 50])
    spool.close()
    path = tmp_path / "000001.seg"
    content = bytearray(path.read_bytes())
    second = HEAD_BYTES + (len(content) - HEAD_BYTES) // 4
    content[second + {"length": 1, "checksum": 4, "seq": 8, "item": 40}[place]] ^= 2
    path.write_bytes(content)
    spool = DiskSpool(tmp_path)
    assert items(spool) == [b"item %d" % k * 50 for k in (0, 2, 3)]
    assert [key.seq for key in spool.pending()] == [1, 3, 4]
    assert f"000001.seg is damaged at byte {second}: an item is lost" in caplog.text
    for key in spool.pending():
        assert spool.ack(key)
    spool.close()
    assert list(tmp_path.glob("*.seg")) == []


def test_a_segment_with_a_damaged_boot_id_is_refused_by_name(tmp_path):
    """Under another boot its items would be taken twice."""
    spool = DiskSpool(tmp_path)
    spool.append([b"item"])
    spool.close()
    path = tmp_path / "000001.seg"
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    with pytest.raises(SpoolError, match=r"000001.seg is damaged in its head"):
        DiskSpool(tmp_path)
    content[HEAD_BYTES - 4 : HEAD_BYTES] = bytes(4)  # an older release kept no checksum of it
    path.write_bytes(content)
    assert items(DiskSpool(tmp_path)) == [b"item"]
