"""An episode that cannot be exported is set aside, by name, and the dataset goes on; nothing else ends the exporter."""

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import check_run
import pytest
from run_samples import SPEC, entries, episode, write_config, write_journal, write_ledger
from test_exporter_role import exported

from serl_launcher.exporter.__main__ import main
from serl_launcher.exporter.quarantine import Attempt, Quarantine, read_quarantine
from serl_launcher.exporter.role import Exporter, ExporterOptions
from serl_launcher.exporter.writer import DatasetWriter
from serl_launcher.gateway.actors import Actors
from serl_launcher.gateway.journalled import Journalled
from serl_launcher.gateway.settings import GatewaySettings
from serl_launcher.replay.entries import DataEntry
from serl_launcher.run.paths import RunPaths
from serl_launcher.telemetry.summary import write_summary
from serl_transport.wire import codec

DEADLY = """
import os, signal
from serl_launcher.exporter.writer import DatasetWriter
from serl_launcher.exporter.__main__ import main
import sys
real_add, real_commit = DatasetWriter.add, DatasetWriter.commit

def add(self, ordinal, episode):
    if ordinal == 3 and sys.argv[2] == "add":
        os.kill(os.getpid(), signal.SIGKILL)
    return real_add(self, ordinal, episode)

def commit(self):
    if any(row["episode_ordinal"] == 3 for row in self._rows) and sys.argv[2] == "commit":
        os.kill(os.getpid(), signal.SIGKILL)
    return real_commit(self)

DatasetWriter.add, DatasetWriter.commit = add, commit
sys.exit(main([sys.argv[1], "--once"]))
"""


def poisoned(index: int, **changes: object):
    """Episode `index` with an odd word in its info."""
    whole = episode(index)
    return replace(whole, info=replace(whole.info, **changes))


def run_of(tmp_path: Path, *episodes) -> list[DataEntry]:
    write_config(tmp_path)
    items = entries(episodes)
    write_journal(tmp_path, items)
    write_ledger(tmp_path / "spool/actor-0.acknowledged.jsonl", items)
    return items


def rows(tmp_path: Path) -> list[tuple]:
    return [(row["ordinal"], row["episode_id"]) for row in read_quarantine(tmp_path)]


def test_an_episode_that_arrow_cannot_hold_is_set_aside_and_counted(tmp_path):
    """Its seed fits a message and a journal, but no column of the dataset: the commit of its batch fails."""
    run_of(tmp_path, *(episode(k) for k in range(3)), poisoned(3, seed=2**64 - 1), *(episode(k) for k in (4, 5)))
    assert main([str(tmp_path), "--once"]) == 0
    assert exported(tmp_path) == [0, 1, 2, 4, 5]
    (row,) = read_quarantine(tmp_path)
    assert (row["ordinal"], row["episode_id"]) == (3, "episode-3")
    assert "too large" in row["why"] or "Overflow" in row["why"] or "overflow" in row["why"], row
    assert json.loads((tmp_path / "dataset_status.json").read_text())["quarantined"] == 1
    report = check_run.check(tmp_path)
    assert not report.problems, report.text()
    assert report.counts["episodes in quarantine"] == 1
    assert main([str(tmp_path), "--once"]) == 0  # it is not found out twice
    assert len(rows(tmp_path)) == 1
    assert write_summary(tmp_path)["quarantined"] == 1


@pytest.mark.parametrize("where", ["add", "commit"])
@pytest.mark.parametrize("batch", [1, 50])
def test_whatever_an_episode_raises_the_others_are_exported(tmp_path, monkeypatch, where, batch):
    run_of(tmp_path, *(episode(k) for k in range(6)))
    real = getattr(DatasetWriter, where)

    def fail(self, *words):
        ordinals = [words[0]] if words else [row["episode_ordinal"] for row in self._rows]
        if 3 in ordinals:
            raise ZeroDivisionError("an encoder's bug")
        return real(self, *words)

    monkeypatch.setattr(DatasetWriter, where, fail)
    one = Exporter(tmp_path, SPEC, ExporterOptions(batch_episodes=batch), video=False)
    one.poll(flush=True)
    one.close()
    assert exported(tmp_path) == [0, 1, 2, 4, 5]
    assert rows(tmp_path) == [(3, "episode-3")]


def test_every_episode_may_be_unfit(tmp_path, monkeypatch):
    run_of(tmp_path, *(episode(k) for k in range(3)))
    monkeypatch.setattr(DatasetWriter, "add", lambda *_: 1 / 0)
    one = Exporter(tmp_path, SPEC, ExporterOptions(), video=False)
    one.poll(flush=True)
    one.close()
    assert [ordinal for ordinal, _ in rows(tmp_path)] == [0, 1, 2]
    assert not (tmp_path / "dataset").exists()


def test_a_full_disk_is_nobody_s_fault(tmp_path, monkeypatch):
    run_of(tmp_path, *(episode(k) for k in range(3)))
    real, full = DatasetWriter.commit, [True, True, True, True]

    def commit(self):
        if full and full.pop():
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self)

    monkeypatch.setattr(DatasetWriter, "commit", commit)
    for _ in range(4):  # as the role tries again
        one = Exporter(tmp_path, SPEC, ExporterOptions(), video=False)
        with pytest.raises(OSError, match="No space"):
            one.poll(flush=True)
        one.close()
    assert main([str(tmp_path), "--once"]) == 0
    assert exported(tmp_path) == [0, 1, 2]
    assert rows(tmp_path) == []


@pytest.mark.parametrize("where", ["add", "commit"])
def test_an_episode_that_kills_the_process_again_and_again_is_set_aside(tmp_path, where):
    run_of(tmp_path, *(episode(k) for k in range(6)))
    codes = []
    while not codes or codes[-1] != 0:
        words = [sys.executable, "-c", DEADLY, str(tmp_path), where]
        codes.append(subprocess.run(words, check=False, capture_output=True, timeout=60).returncode)
        assert len(codes) < 8
    assert codes[:-1] == [-9] * (3 if where == "add" else 4)  # a batch is first taken apart
    assert exported(tmp_path) == [0, 1, 2, 4, 5]
    (row,) = read_quarantine(tmp_path)
    assert row["why"] == "the exporter died 3 times in a row at it"


def test_kills_at_different_episodes_or_between_them_set_nothing_aside(tmp_path):
    for ordinal in (3, 3, 4, 4, 3, 3):
        attempt = Attempt(tmp_path)
        attempt.begin(ordinal)
        assert attempt.deaths <= 2
        attempt.close()
    idle = Attempt(tmp_path)
    idle.begin(5)
    idle.end()
    idle.close()
    assert (Attempt(tmp_path).suspect, Attempt(tmp_path).deaths) == (-1, 0)


def test_a_torn_line_is_passed_over(tmp_path):
    aside = Quarantine(tmp_path)
    aside.add(3, "episode-3", "why")
    with (tmp_path / "quarantine.jsonl").open("a") as file:
        file.write('{"ordinal": 4, "epi')
    aside = Quarantine(tmp_path)
    assert (aside.count, aside.holds(3, "episode-3"), aside.holds(4, "episode-4")) == (1, True, False)
    assert not aside.holds(3, "another journal's")
    aside.add(4, "episode-4", "why")
    assert rows(tmp_path) == [(3, "episode-3"), (4, "episode-4")]


def broken(entry: DataEntry, **changes: object) -> DataEntry:
    """The record of an item whose body has been changed past every check."""
    body = entry.batch.to_body() | changes
    return replace(entry, frames=codec.pack(body))


@pytest.mark.parametrize("changes", [{"outcome": None}, {"first_tick": 59}, {"final": "yes"}, {"arrays": {}}])
def test_a_record_that_would_not_be_accepted_keeps_neither_gateway_nor_exporter_from_the_rest(tmp_path, changes):
    """The final batch of episode 1, written into the journal past the gateway's checks."""
    write_config(tmp_path)
    items = entries(episode(k) for k in range(3))
    items[3] = broken(items[3], **changes)
    write_journal(tmp_path, items)
    write_ledger(tmp_path / "spool/actor-0.acknowledged.jsonl", items)
    assert main([str(tmp_path), "--once"]) == 0
    assert exported(tmp_path) == [0, 1]  # episodes 0 and 2: 1 never ended
    (row,) = read_quarantine(tmp_path)
    assert (row["ordinal"], row["item"]) == (None, "actor-0/boot-0/4")
    assert row["why"]
    gateway = recovered(tmp_path)
    assert gateway.ledger.rows == 2
    assert list(gateway.assembler.open) == ["episode-1"]
    assert items[3].key in gateway.assembler.seen  # its actor is not asked for it again
    report = check_run.check(tmp_path, live=True)
    assert not report.problems, report.text()
    assert report.counts["items in the journal that fit no more, left out"] == 1


def recovered(run_dir: Path) -> Journalled:
    settings = GatewaySettings(
        run="demo", spec=SPEC, stages=(), seed=0, port=0, broadcast_port=0, bind_host="127.0.0.1", insecure=False,
        keys_dir=None, allow_list=None, capacity_frames=200, memory_share=0.5, segment_mb=1,
        dead_actor_s=5.0, unticketed=True, config={},
    )  # fmt: skip
    one = Journalled(settings, RunPaths(run_dir), Actors(5.0), lambda *_: None, lambda *_: None)
    one.recover()
    one.ring.close()
    return one


@pytest.mark.parametrize("changes", [{"seed": 2**64 - 1}, {"seed": -(2**63)}, {"prompt": "x" * 10**6}, {"prompt": ""}])
def test_odd_words_of_an_episode_keep_nobody_from_starting(tmp_path, changes):
    run_of(tmp_path, episode(0), poisoned(1, **changes), episode(2))
    assert recovered(tmp_path).ledger.rows == 3
    assert main([str(tmp_path), "--once"]) == 0
    assert {0, 2} <= set(exported(tmp_path))
    assert len(exported(tmp_path)) + len(rows(tmp_path)) == 3
    assert os.path.exists(tmp_path / "dataset" / "meta" / "info.json")
