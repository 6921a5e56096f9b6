"""Journal records under seeded damage: what is read back is what was written, or the reading says where it ends."""

from __future__ import annotations

import random
from pathlib import Path

from replay_samples import SPEC, batches, entries, info, write_journal

from serl_launcher.replay.entries import decode_entry
from serl_launcher.replay.journal import JournalCorrupt, JournalReader


def read(folder: Path) -> list[bytes]:
    reader = JournalReader(folder)
    try:
        return [bytes(record.payload) for record in reader.poll()]
    finally:
        reader.close()


def test_damaged_segments_never_yield_a_changed_record(tmp_path: Path) -> None:
    rng = random.Random(1)
    write_journal(tmp_path, entries([*batches(info("e1")), *batches(info("e2"), (3, 3, 2))]))
    path = tmp_path / "journal" / "000001.seg"
    whole, right = path.read_bytes(), read(tmp_path / "journal")
    told = 0
    for _ in range(600):
        changed = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        if rng.random() < 0.3:
            del changed[rng.randrange(len(changed)) :]
        path.write_bytes(changed)
        try:
            found = read(tmp_path / "journal")
        except JournalCorrupt:
            told += 1
            continue
        assert found == right[: len(found)]
    assert told


def test_damaged_payloads_are_a_typed_error(tmp_path: Path) -> None:
    rng = random.Random(2)
    payload = b"".join(entries(batches(info("e1")))[0].payload())
    for _ in range(2000):
        changed = bytearray(payload)
        for _ in range(rng.randrange(1, 4)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        try:
            decode_entry(bytes(changed), SPEC)
        except (JournalCorrupt, ValueError):
            continue
