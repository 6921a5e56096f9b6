"""The exporter on a journal that has lost something: it says so and touches no dataset, whatever else would fit."""

import shutil
from pathlib import Path

import pytest
from run_samples import SPEC, entries, episode, write_config, write_journal

from serl_launcher.exporter.__main__ import main
from serl_launcher.exporter.origin import episode_ids
from serl_launcher.exporter.role import Exporter, ExporterOptions
from serl_launcher.replay.durable import MARK_FILE, Mark, Position, write_mark
from serl_launcher.replay.journal import JournalCorrupt, JournalReader


def export(run: Path, video: bool = False) -> None:
    one = Exporter(run, SPEC, ExporterOptions(), video)
    one.poll(flush=True)
    one.close()


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def record_ends(run: Path) -> list[Position]:
    reader = JournalReader(run / "journal")
    ends = [record.end for record in reader.poll()]
    reader.close()
    return ends


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_config(tmp_path)
    write_journal(tmp_path, entries([episode(index) for index in range(4)]))
    export(tmp_path)
    return tmp_path


def truncate(run: Path, records: int, mark: bool = True) -> None:
    """What a restored backup looks like: so many records, with the mark of then, or without one."""
    end = record_ends(run)[records - 1]
    path = run / "journal" / f"{end.segment:06d}.seg"
    path.write_bytes(path.read_bytes()[: end.offset])
    for later in (run / "journal").glob("*.seg"):
        if int(later.stem) > end.segment:
            later.unlink()
    write_mark(run / "journal", Mark(end, records))
    if not mark:
        (run / "journal" / MARK_FILE).unlink()


def refused(run: Path, capsys, message: str) -> None:
    before = files(run / "dataset")
    assert main([str(run), "--once"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert f"tools/recover_run.py {run}" in error
    assert "Traceback" not in error
    assert files(run / "dataset") == before
    assert not list(run.glob("dataset.foreign*"))
    assert not (run / "dataset.staging").exists()


def test_a_damaged_record_below_the_mark(run, capsys):
    path = run / "journal" / "000001.seg"
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 1
    path.write_bytes(raw)
    refused(run, capsys, "000001.seg at byte")


def test_a_journal_that_ends_before_the_dataset_is_damaged_and_the_dataset_is_not_foreign(run, capsys):
    truncate(run, 5)  # the spec and two episodes
    refused(run, capsys, "the journal ends before the newest episode of")
    write_journal(run, entries([episode(7)], first_seq=50))  # it went on with others
    refused(run, capsys, "2 of its 4 episodes are not in")


def test_the_same_before_a_gateway_has_written_a_mark_that_was_lost_too(run):
    truncate(run, 5, mark=False)
    before = files(run / "dataset")
    with pytest.raises(JournalCorrupt, match="2 of its 4 episodes are not in"):
        export(run)
    assert files(run / "dataset") == before


def test_a_journal_that_lost_episodes_and_went_past_the_dataset(run, capsys):
    truncate(run, 5)
    write_journal(run, entries([episode(index) for index in range(10, 15)], first_seq=50))
    refused(run, capsys, "the journal has episode episode-11 where")


def test_an_emptied_journal(run, capsys):
    shutil.rmtree(run / "journal")
    write_journal(run, [])
    refused(run, capsys, "4 of its 4 episodes are not in")


def test_a_dataset_that_must_be_rebuilt_stays_when_the_journal_has_lost_some_of_it(run, capsys):
    """Other features (exporter.video was changed): the old one is replaced only by one that holds as much."""
    truncate(run, 5)
    write_config(run, video=True)
    before = files(run / "dataset")
    assert main([str(run), "--once"]) == 2
    assert "the journal ends before the newest episode of" in capsys.readouterr().err
    assert files(run / "dataset") == before


def test_a_mark_that_a_power_cut_left_older_than_the_dataset_is_no_damage(run):
    write_mark(run / "journal", Mark(record_ends(run)[2], 3))
    export(run)
    assert list(episode_ids(run / "dataset")) == [0, 1, 2, 3]
    write_journal(run, entries([episode(4)], first_seq=50))
    export(run)
    assert list(episode_ids(run / "dataset")) == [0, 1, 2, 3, 4]


def test_once_without_a_mark_is_no_success(tmp_path, capsys):
    write_config(tmp_path)
    write_journal(tmp_path, entries([episode(0)]))
    (tmp_path / "journal" / MARK_FILE).unlink()
    assert main([str(tmp_path), "--once"]) == 2
    assert "durable is missing or damaged: start the learner once" in capsys.readouterr().err
