"""Recovery of a damaged run: what is readable is kept, what is not is named, and the damaged folder stays as it is."""

import fcntl
import json
import logging
import os
import shutil
from pathlib import Path

import check_run
import pytest
import yaml
from recover_run import main
from run_samples import SPEC, entries, episode, write_config, write_ledger

from serl_launcher.exporter.origin import episode_ids
from serl_launcher.exporter.role import Exporter, ExporterOptions
from serl_launcher.gateway.app import Gateway
from serl_launcher.gateway.settings import GatewaySettings
from serl_launcher.replay.durable import MARK_FILE, read_mark
from serl_launcher.replay.entries import SpecEntry
from serl_launcher.replay.episodes import journal_episodes
from serl_launcher.replay.journal import JournalReader, segment_numbers, segment_path
from serl_launcher.replay.salvage import write_journal
from serl_launcher.run.paths import RunPaths

COUNT = 6  # episodes, two items each


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose actor's list knows every item, over several segments, with everything else that a run folder has."""
    root = tmp_path / "runs" / "night1"
    write_config(root)
    items = entries([episode(index) for index in range(COUNT)])
    payloads = [SpecEntry(SPEC).payload(), *(b"".join(item.payload()) for item in items)]
    write_journal(root / "journal", ((payload, 10**18 + k) for k, payload in enumerate(payloads)), 40_000)
    write_ledger(root / "spool/actor-0.acknowledged.jsonl", items)
    rows = [{"ordinal": k, "episode_id": f"episode-{k}", "n_ticks": episode(k).n} for k in range(COUNT)]
    (root / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("params/v000003.safetensors", "params/latest.json", "checkpoints/step_000900/manifest.json",
                 "metrics/trainer.jsonl", "spool/actor-0/000001.seg", "spool/actor-0/lock", "acts.jsonl",
                 "acts.mark", "relabelled.json", "operator.json", "stage_progress.json", "estop", "status.json",
                 "summary.json"):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}")
    latest = {"version": 3, "step": 900, "file": "v000003.safetensors", "bytes": 2, "sha256": "", "time": 1.0}
    (root / "params/latest.json").write_text(json.dumps(latest))
    exporter = Exporter(root, SPEC, ExporterOptions(), video=False)
    exporter.poll(flush=True)
    exporter.close()
    assert len(segment_numbers(root / "journal")) >= 3
    return root


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def records(root: Path) -> list:
    reader = JournalReader(root / "journal")
    found = list(reader.poll())
    reader.close()
    return found


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def zero(path: Path, start: int, stop: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[start:stop] = bytes(stop - start)
    path.write_bytes(raw)


def recover(run: Path, capsys) -> tuple[Path, str]:
    """The new run and what was printed; the damaged folder is compared."""
    before = contents(run)
    assert main([str(run)]) == 0
    text = capsys.readouterr().out
    assert contents(run) == before
    new = run.with_name(text.split(" episodes are in ")[1].splitlines()[0].rpartition("/")[2])
    assert (new / "recovered.txt").read_text() == text
    assert sorted(path.name for path in run.parent.iterdir()) == [run.name, new.name]
    return new, text


def start_and_export(new: Path) -> None:
    """The gateway takes the new run, and its dataset holds what the journal closes."""
    config = yaml.safe_load((new / "config.yaml").read_text()) | {"port": 0, "broadcast_port": 0}
    config |= {"bind_host": "127.0.0.1", "insecure": False, "replay": {"capacity_frames": 2000}}
    config |= {"journal": {"segment_mb": 1}, "gateway": {"dead_actor_s": 30.0, "unticketed": "auto"}}
    gateway = Gateway(GatewaySettings.of(config), RunPaths(new))
    gateway.ingest.close()
    gateway.server.stop()
    gateway.journalled.ring.close()
    exporter = Exporter(new, SPEC, ExporterOptions(), video=False)
    exporter.poll(flush=True)
    exporter.close()
    assert not check_run.check(new).problems


def closed(new: Path) -> list[str]:
    return [item.info.episode_id for _, item in journal_episodes(new, SPEC)]


def test_a_flipped_bit_costs_one_record_and_the_rest_goes_on(run, capsys):
    whole = records(run)
    start, end = whole[2].end, whole[3].end  # record 3: the first half of episode 1
    assert start.segment == end.segment
    flip(segment_path(run / "journal", start.segment), start.offset + 200)
    new, text = recover(run, capsys)
    assert new.name == "night1.recovered"
    extent = f"bytes {start.offset} to {end.offset} ({end.offset - start.offset} bytes): 1 record"
    assert f"1 place where acknowledged data is missing\n  {start.segment:06d}.seg {extent}" in text
    n = episode(1).n
    assert f"episodes with holes: 1\n  episode-1: ticks {n // 2}-{n - 1} are there, {n - n // 2} of {n}" in text
    assert "episodes lost: 0" in text
    assert "12 records of 6 episodes" in text
    kept = records(new)
    assert [r.payload for r in kept] == [r.payload for r in whole if r.sequence != 3]
    assert [r.time_ns for r in kept] == [r.time_ns for r in whole if r.sequence != 3]
    assert [r.sequence for r in kept] == list(range(12))
    assert read_mark(new / "journal").sequence == 12
    assert closed(new) == [f"episode-{k}" for k in (0, 2, 3, 4, 5)]  # 1 is open until the gateway gives it up
    start_and_export(new)
    assert list(episode_ids(new / "dataset").values()) == closed(new)


def test_what_a_run_needs_goes_along_and_what_is_derived_does_not(run, capsys):
    flip(segment_path(run / "journal", 1), -50)
    new, _ = recover(run, capsys)
    have = {path.split("/")[0] for path in contents(new)}
    assert have == {
        "journal", "config.yaml", "params", "checkpoints", "metrics", "spool", "acts.jsonl", "acts.mark",
        "relabelled.json", "operator.json", "stage_progress.json", "estop", "recovered.txt",
    }  # fmt: skip
    assert yaml.safe_load((new / "config.yaml").read_text())["run"] == "night1.recovered"
    assert os.path.samefile(new / "params/latest.json", run / "params/latest.json")  # replaced as a whole, so linked
    assert not os.path.samefile(new / "spool/actor-0/000001.seg", run / "spool/actor-0/000001.seg")
    assert not list((new / "spool").glob("*.jsonl"))


def test_a_lost_first_record_is_the_spec_and_is_written_anew(run, capsys):
    flip(segment_path(run / "journal", 1), 60)
    new, text = recover(run, capsys)
    assert "000001.seg bytes 8 to" in text
    assert [r.payload for r in records(new)] == [r.payload for r in before_the_flip(run)]
    start_and_export(new)


def before_the_flip(run: Path) -> list:
    """The records of that journal as it was; its first is the spec."""
    segment = segment_path(run / "journal", 1)
    flip(segment, 60)
    found = records(run)
    flip(segment, 60)
    return found


@pytest.mark.parametrize("kind", ["cut", "zeros", "last segment", "middle segment", "first segment"])
def test_larger_losses_are_named_and_all_else_is_kept(run, capsys, kind):
    whole, folder = records(run), run / "journal"
    last = segment_numbers(folder)[-1]
    path = segment_path(folder, {"middle segment": 2, "first segment": 1}.get(kind, last))
    inside = [r.sequence for r in whole if r.end.segment == int(path.stem)]
    if kind == "cut":
        os.truncate(path, 30)
    elif kind == "zeros":
        zero(path, 8, path.stat().st_size)
    else:
        path.unlink()
    new, text = recover(run, capsys)
    spec = kind == "first segment"  # put back
    assert len(records(new)) == len(whole) - len(inside) + spec
    assert f": {len(inside)} record" in text
    lost = [k for k in range(COUNT) if {1 + 2 * k, 2 + 2 * k} <= set(inside)]
    assert text.split("episodes lost: ")[1].splitlines()[0] == f"{len(lost)}"
    assert all(f"  episode-{k}: {episode(k).n} ticks" in text for k in lost)
    start_and_export(new)


def test_several_places_at_once(run, capsys):
    whole = records(run)
    for sequence in (3, 8):
        start = whole[sequence - 1].end
        same = start if start.segment == whole[sequence].end.segment else type(start)(whole[sequence].end.segment)
        flip(segment_path(run / "journal", same.segment), same.offset + 100)
    new, text = recover(run, capsys)
    assert "2 places where acknowledged data is missing" in text
    assert [r.payload for r in records(new)] == [r.payload for r in whole if r.sequence not in (3, 8)]


def test_a_journal_that_lost_its_mark_and_its_end(run, capsys):
    (run / "journal" / MARK_FILE).unlink()
    last = segment_path(run / "journal", segment_numbers(run / "journal")[-1])
    flip(last, -10)
    new, text = recover(run, capsys)
    assert "nobody knows how many records" in text
    assert "whether more is missing at the end cannot be told" in text
    assert "episodes with holes: 1\n  episode-5: " in text
    assert len(records(new)) == 12


def test_a_torn_tail_is_no_loss(run, capsys):
    with segment_path(run / "journal", segment_numbers(run / "journal")[-1]).open("ab") as file:
        file.write(b"\0" * 77)
    _, text = recover(run, capsys)
    assert "no places where acknowledged data is missing" in text
    assert "77 bytes at the end were never acknowledged" in text


def test_a_second_recovery_takes_another_name_and_what_a_kill_left_is_no_run(run, capsys):
    left = run.parent / ".night1.recovered-2.part"
    left.mkdir()
    assert main([str(run)]) == 0
    assert main([str(run)]) == 0
    assert sorted(path.name for path in run.parent.iterdir()) == ["night1", "night1.recovered", "night1.recovered-2"]
    assert "run=night1.recovered-2" in capsys.readouterr().out


def test_a_torn_config_and_a_torn_list_do_not_stop_it(run, capsys):
    (run / "config.yaml").write_text("run: [nig")
    ledger = run / "spool/actor-0.acknowledged.jsonl"
    ledger.write_text("\0\0\n" + ledger.read_text())
    new, text = recover(run, capsys)
    assert "config.yaml could not be read" in text
    assert f"not compared with {ledger}" in text
    assert len(records(new)) == 13
    assert not (new / "config.yaml").exists()


def refused(run: Path, capsys, message: str) -> None:
    assert main([str(run)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [path.name for path in run.parent.iterdir()] == [run.name]


@pytest.mark.parametrize("lock", [".lock", "journal/lock", "spool/actor-0/lock"])
def test_a_folder_in_which_somebody_works_is_left_alone(run, capsys, lock):
    with (run / lock).open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        refused(run, capsys, "is held by a process that works in")


def test_nothing_readable_is_one_line(run, capsys):
    for number in segment_numbers(run / "journal"):
        path = segment_path(run / "journal", number)
        zero(path, 0, path.stat().st_size)
    refused(run, capsys, "no record of the journal is readable")
    shutil.rmtree(run / "journal")
    refused(run, capsys, f"checkpoint_path={run}")


def test_the_warning_of_a_lost_mark_is_gone_in_the_recovered_run(run, capsys, caplog):
    (run / "journal" / MARK_FILE).unlink()
    new, _ = recover(run, capsys)
    with caplog.at_level(logging.WARNING):
        records(new)
    assert not caplog.text
