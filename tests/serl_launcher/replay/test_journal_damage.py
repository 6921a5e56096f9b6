"""Damage to what was acknowledged: refused by name wherever it lies, however it is read, and nothing is touched."""

from __future__ import annotations

import logging
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from replay_samples import open_writer, wait_for

from serl_launcher.replay import journal_writer
from serl_launcher.replay.durable import MARK_FILE, Mark, Position, read_mark, write_mark
from serl_launcher.replay.journal import JournalCorrupt, JournalReader, segment_path

PAYLOADS = [bytes([65 + k]) * (60 + k) for k in range(12)]
SEGMENT = 400  # bytes: four records, three segments


def append(folder: Path, payloads: list[bytes], segment_bytes: int = SEGMENT) -> None:
    writer, done = open_writer(folder, segment_bytes), []
    for count, payload in enumerate(payloads, 1):
        writer.append(payload, lambda error, time_ns: done.append(error))
        wait_for(lambda count=count: len(done) == count)
    writer.close()
    assert done == [None] * len(payloads)


def read(folder: Path, follow: bool = False) -> list[bytes]:
    reader = JournalReader(folder, follow=follow)
    try:
        return [record.payload for record in reader.poll()]
    finally:
        reader.close()


def ends(folder: Path) -> list[Position]:
    """Where each record ends."""
    reader = JournalReader(folder)
    found = [record.end for record in reader.poll()]
    reader.close()
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "journal"
    append(folder, PAYLOADS)
    assert read_mark(folder) == Mark(ends(folder)[-1], 12)
    return folder


def change(path: Path, edit: Callable[[bytearray], None]) -> None:
    raw = bytearray(path.read_bytes())
    edit(raw)
    path.write_bytes(raw)


def flip(at: int) -> Callable[[bytearray], None]:
    def edit(raw: bytearray) -> None:
        raw[at] ^= 1

    return edit


def zero(raw: bytearray) -> None:
    raw[-30:] = bytes(30)


def last(folder: Path) -> Path:
    return segment_path(folder, ends(folder)[-1].segment)


def cut_at_a_record(folder: Path, number: int) -> None:
    """Take the last whole record of a segment away: what is left looks complete."""
    inside = [end.offset for end in ends(folder) if end.segment == number]
    os.truncate(segment_path(folder, number), inside[-2])


DAMAGE = {
    "a bit of the last record": (lambda f: change(last(f), flip(-20)), r"000003\.seg at byte \d+: what was synced is"),
    "a bit of the last header": (
        lambda f: change(last(f), flip(ends(f)[-2].offset + 9)),
        r"000003\.seg at byte \d+: what was synced is damaged.*1 record\.",
    ),
    "zeros at the end": (lambda f: change(last(f), zero), r"000003\.seg at byte \d+: what was synced is damaged"),
    "a torn end": (lambda f: os.truncate(last(f), last(f).stat().st_size - 5), r"what was synced is damaged"),
    "the last record away": (
        lambda f: cut_at_a_record(f, 3),
        r"000003\.seg at byte \d+: the journal ends before its durable mark\. .* \d+ bytes, 1 record\. By durable, all "
        r"up to segment 3 byte \d+, 12 records, was acknowledged",
    ),
    "the last record of an older segment away": (
        lambda f: cut_at_a_record(f, 2),
        r"000003\.seg at byte 8: expected record 7, found 8\. Missing from there: .*1 record\.",
    ),
    "a bit in the first record": (lambda f: change(segment_path(f, 1), flip(60)), r"000001\.seg at byte 8: .*1 record"),
    "a bit in a segment's head": (lambda f: change(segment_path(f, 2), flip(3)), r"000002\.seg is no journal segment"),
    "the last segment gone": (
        lambda f: last(f).unlink(),
        r"000002\.seg at byte \d+: the journal ends before its durable mark.*4 records\. By durable",
    ),
    "the last segment emptied": (lambda f: os.truncate(last(f), 0), r"the journal ends before its durable mark"),
    "the middle segment gone": (lambda f: segment_path(f, 2).unlink(), r"000002\.seg is missing.*4 records"),
    "the first segment gone": (lambda f: segment_path(f, 1).unlink(), r"000001\.seg is missing.*4 records"),
    "every segment gone": (
        lambda f: [path.unlink() for path in f.glob("*.seg")],
        r"000001\.seg at byte 8: the journal ends before its durable mark.*12 records\. By durable",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_below_the_mark_is_refused_by_name_and_nothing_is_touched(journal, kind):
    damage, message = DAMAGE[kind]
    damage(journal)
    before = contents(journal)
    for follow in (False, True):
        with pytest.raises(JournalCorrupt, match=message) as refusal:
            read(journal, follow)
        text = str(refusal.value)
        assert "\n" not in text
        assert text.endswith(f"tools/recover_run.py {journal.parent}")
    with pytest.raises(JournalCorrupt):
        open_writer(journal)
    assert contents(journal) == before


@pytest.mark.parametrize("tail", [b"\0" * 500, b"FSR2" + b"\xff" * 60, None], ids=["zeros", "garbage", "half a record"])
def test_a_torn_tail_behind_the_mark_is_dropped_and_written_over(journal, tail):
    path = last(journal)
    if tail is None:
        end = ends(journal)[-2]
        write_mark(journal, Mark(end, 11))
        os.truncate(path, path.stat().st_size - 5)
    else:
        path.write_bytes(path.read_bytes() + tail)
    kept = PAYLOADS[: 11 if tail is None else 12]
    assert read(journal) == kept
    append(journal, [b"after"])
    assert read(journal) == [*kept, b"after"]


def no_mark(folder: Path) -> None:
    (folder / MARK_FILE).unlink()


def empty_mark(folder: Path) -> None:
    (folder / MARK_FILE).write_bytes(b"")


def torn_mark(folder: Path) -> None:
    os.truncate(folder / MARK_FILE, 20)


def zeroed_mark(folder: Path) -> None:
    (folder / MARK_FILE).write_bytes(bytes(64))


def flipped_mark(folder: Path) -> None:
    change(folder / MARK_FILE, lambda raw: (flip(3)(raw), flip(40)(raw)))


@pytest.mark.parametrize("lose", [no_mark, empty_mark, torn_mark, zeroed_mark, flipped_mark])
def test_without_a_mark_a_whole_journal_is_read_and_that_is_said_and_a_torn_one_is_refused(journal, caplog, lose):
    lose(journal)
    assert read_mark(journal) is None
    with caplog.at_level(logging.WARNING):
        assert read(journal) == PAYLOADS
    assert f"{journal / MARK_FILE} is missing or damaged" in caplog.text
    assert read(journal, follow=True) == []  # whoever follows waits for the gateway to write it
    aside = shutil.copytree(journal, journal.with_name("aside"))
    change(last(aside), flip(-20))
    with pytest.raises(JournalCorrupt, match=r"durable is missing or damaged, so it may have been acknowledged"):
        read(aside)
    append(journal, [b"after"])
    assert read_mark(journal).sequence == 13
    assert read(journal, follow=True) == [*PAYLOADS, b"after"]


@pytest.mark.parametrize("at", [3, 40], ids=["first slot", "second slot"])
def test_one_damaged_slot_leaves_the_other(journal, at):
    change(journal / MARK_FILE, flip(at))
    assert read_mark(journal).sequence in (11, 12)
    assert read(journal) == PAYLOADS
    append(journal, [b"after"])
    assert read_mark(journal).sequence == 13


def test_the_mark_of_an_earlier_release_holds_and_is_replaced(journal):
    end = ends(journal)[-1]
    (journal / MARK_FILE).write_bytes(struct.pack("<Q", end.segment << 40 | end.offset))
    assert read_mark(journal) == Mark(end, None)
    assert read(journal, follow=True) == PAYLOADS
    cut = shutil.copytree(journal, journal.with_name("cut"))
    cut_at_a_record(cut, 3)
    with pytest.raises(JournalCorrupt, match="the journal ends before its durable mark"):
        read(cut)
    append(journal, [b"after"])
    assert read_mark(journal) == Mark(ends(journal)[-1], 13)


def test_a_backup_with_an_older_mark_is_read_to_its_end_and_one_with_a_newer_mark_is_refused(journal):
    aside = shutil.copytree(journal, journal.with_name("aside"))
    append(journal, [b"more", b"and more"])
    older = shutil.copytree(journal, journal.with_name("older"))
    shutil.copy(aside / MARK_FILE, older / MARK_FILE)
    assert read(older) == [*PAYLOADS, b"more", b"and more"]
    shutil.copy(journal / MARK_FILE, aside / MARK_FILE)
    with pytest.raises(JournalCorrupt, match=r"2 records\. By durable, all up to segment \d byte \d+, 14 records"):
        read(aside)


def test_where_the_mark_is_older_than_the_truth_later_records_still_testify(journal):
    append(journal, [b"x" * 50, b"y" * 50, b"z" * 50])
    path, end = last(journal), ends(journal)[-1]
    write_mark(journal, Mark(Position(1), 0))  # as a power cut may leave it
    change(path, flip(end.offset - 3 * 90 + 60))
    with pytest.raises(JournalCorrupt, match="what was synced is damaged"):
        read(journal)


def test_a_segment_that_was_being_made_when_power_was_cut_is_no_damage(journal):
    segment_path(journal, 4).write_bytes(bytes(8))
    assert read(journal) == PAYLOADS
    append(journal, [b"after"])
    assert read(journal) == [*PAYLOADS, b"after"]


def test_a_starting_writer_syncs_what_it_takes_over_before_the_mark_names_it(journal, monkeypatch):
    """A full last segment too: its tail may be what a killed writer never synced, and the mark moves past it."""
    end = ends(journal)[-1]
    write_mark(journal, Mark(end, 12))
    synced, fsync = [], os.fsync

    def spy(fd: int) -> None:
        synced.append((Path(os.readlink(f"/proc/self/fd/{fd}")).name, read_mark(journal).sequence))
        fsync(fd)

    write_mark(journal, Mark(Position(1), 0))
    monkeypatch.setattr(journal_writer.os, "fsync", spy)
    append(journal, [], segment_bytes=100)
    assert (f"{end.segment:06d}.seg", 0) in synced
    assert read_mark(journal) == Mark(end, 12)
