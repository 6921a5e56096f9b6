"""The durability oracle: it passes a sound run and catches each way of losing, repeating or changing something."""

import json
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import check_run
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from run_samples import SPEC, entries, episode, ledger_line, write_config, write_journal, write_ledger

from serl_launcher.exporter.role import Exporter, ExporterOptions
from serl_launcher.exporter.writer import DatasetWriter
from serl_launcher.replay.entries import CloseEntry, DataEntry
from serl_transport.delivery.outbox import Ledger
from serl_transport.delivery.spool import ItemKey


def export(run_dir: Path) -> None:
    exporter = Exporter(run_dir, SPEC, ExporterOptions(), video=False)
    exporter.poll(flush=True)
    exporter.close()


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, list[DataEntry]]:
    """A finished run of five episodes whose actor's ledger knows every item."""
    write_config(tmp_path)
    items = entries([episode(index) for index in range(5)])
    write_journal(tmp_path, items)
    write_ledger(tmp_path / "spool/actor-0.acknowledged.jsonl", items)
    export(tmp_path)
    return tmp_path, items


def problems(run_dir: Path, **options: object) -> dict[str, list[str]]:
    return check_run.check(run_dir, **options).problems


def test_a_sound_run_passes(run, capsys):
    assert check_run.main([str(run[0]), "--images"]) == 0
    out = capsys.readouterr().out
    assert "acknowledged items" in out
    assert "ok: nothing lost, nothing twice, nothing changed" in out


def test_as_a_command(run):
    done = subprocess.run(
        [sys.executable, check_run.__file__, str(run[0])], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("nothing changed\n")


def test_the_clients_own_ledger_is_understood(run, tmp_path):
    """The checksum of a journalled item equals the one that the real client notes."""
    path = tmp_path / "spool/other.acknowledged.jsonl"
    ledger = Ledger(path)
    ledger.write([(ItemKey(entry.boot_id, entry.seq), entry.frames) for entry in run[1]])
    ledger.close()
    report = check_run.check(tmp_path, [path])
    assert report.counts["acknowledged items"] == 10
    assert not report.problems


def test_a_lost_item(run):
    lost = replace(run[1][0], seq=99)
    write_ledger(run[0] / "spool/actor-0.acknowledged.jsonl", [lost])
    assert problems(run[0])["acknowledged but lost"] == ["boot boot-0 seq 99: episode episode-0 ticks 0+1"]
    assert check_run.main([str(run[0])]) == 1


def test_a_changed_item(run):
    line = ledger_line(run[1][3]) | {"crc32": zlib.crc32(b"other bytes")}
    (run[0] / "spool/actor-0.acknowledged.jsonl").write_text(json.dumps(line) + "\n")
    assert list(problems(run[0])) == ["acknowledged but changed"]


def test_repeated_and_torn_ledger_lines_are_no_loss(run):
    path = run[0] / "spool/actor-0.acknowledged.jsonl"
    write_ledger(path, run[1][-2:])
    path.write_text(path.read_text() + '{"boot": "boot-0", "se')
    assert not problems(run[0])


def test_an_item_journalled_twice(run):
    write_journal(run[0], [run[1][2]])
    assert problems(run[0])["journalled twice"] == ["boot boot-0 seq 3"]


def test_an_episode_missing_from_the_dataset(run):
    more = entries([episode(5)], first_seq=11)
    write_journal(run[0], more)
    assert problems(run[0])["missing in the dataset"] == ["ordinal 5, episode episode-5"]
    assert not problems(run[0], live=True)
    export(run[0])
    assert not problems(run[0])


def test_an_episode_twice_in_the_dataset(run):
    writer = DatasetWriter(run[0] / "dataset", SPEC, video=False)
    writer.state = replace(writer.state, last_ordinal=-1)  # what a broken recovery would do
    writer.add(0, episode(0))
    writer.commit()
    assert problems(run[0])["twice in the dataset"] == ["ordinal 0: 2 times"]


@pytest.mark.parametrize("column", ["next.reward", "intervention", "complementary_info.policy_version", "next.done"])
def test_a_changed_row(run, column):
    path = run[0] / "dataset/data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    values = table[column].to_pylist()
    values[4] = not values[4] if isinstance(values[4], bool) else values[4] + 1
    position = table.schema.get_field_index(column)
    pq.write_table(
        table.set_column(position, table.schema.field(column), pa.array(values, table.schema.field(column).type)), path
    )
    assert problems(run[0])["differs in the dataset"] == ["ordinal 1, episode episode-1: 4 of 4 rows"]


def test_a_changed_image_is_seen_when_asked(run):
    path = run[0] / "dataset/data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    key = "observation.images.front"
    cells = table[key].to_pylist()
    cells[0] = cells[1]
    changed = table.set_column(
        table.schema.get_field_index(key), table.schema.field(key), pa.array(cells, table.schema.field(key).type)
    )
    pq.write_table(changed, path)
    assert not problems(run[0])
    assert list(problems(run[0], images=True)) == ["differs in the dataset"]


def test_a_falling_policy_version(run):
    write_journal(run[0], entries([episode(0, prompt=None)], first_seq=20))  # version 0 after 1, under a known id
    found = problems(run[0])
    assert found["policy version fell"][0] == "actor actor-0 boot boot-0 seq 20: version 0 after 1"


def test_a_cut_episode_keeps_all_but_its_last_tick(run):
    """The tick whose next observation never came waits; everything else is in the dataset once."""
    start = entries([episode(6, n=8)], first_seq=30)[:1]
    write_journal(run[0], [*start, CloseEntry("episode-6", "dead_actor")])
    write_ledger(run[0] / "spool/actor-0.acknowledged.jsonl", start)
    export(run[0])
    report = check_run.check(run[0])
    assert not report.problems
    assert report.counts["last ticks of cut episodes, without next observation"] == 1
    assert report.counts["episodes in the dataset"] == 6


def test_the_episode_ledger_must_agree(run):
    rows = [{"ordinal": index, "episode_id": f"episode-{index}", "n_ticks": episode(index).n} for index in range(5)]
    path = run[0] / "episodes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert not problems(run[0])
    rows[2]["n_ticks"] += 1
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    assert len(problems(run[0])["episodes.jsonl and the journal disagree"]) == 2


def test_no_run_is_one_line(tmp_path, capsys):
    assert check_run.main([str(tmp_path / "nothing")]) == 2
    assert "config.yaml does not exist" in capsys.readouterr().err
