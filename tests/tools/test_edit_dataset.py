"""tools/edit_dataset.py on a run's own dataset and on a lab's: what was chosen comes out, and nothing else changed."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import edit_dataset as tool
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import runs
from lab_dataset import lab_dataset
from run_samples import SPEC, entries, episode, write_config, write_journal

from serl_launcher.curation.check import check
from serl_launcher.curation.rows import Renaming
from serl_launcher.curation.sources import Filter, Opened
from serl_launcher.datasets.dataset import Dataset
from serl_launcher.datasets.folder import DatasetError
from serl_launcher.exporter.role import Exporter, ExporterOptions
from serl_launcher.replay.relabelled import Relabelled
from serl_launcher.run.data_record import dataset_digest

PROMPTS = {4: "push it away", 5: "push it away"}


def make_run(folder: Path, first: int = 0, video: bool = False) -> Path:
    """Six episodes: two demonstrations, two online, two evaluations; odd ones fail. Committed two at a time."""
    write_config(folder)
    modes = ["demo", "demo", "online", "online", "eval", "eval"]
    for start in (0, 2, 4):
        items = [episode(first + k, mode=modes[k], prompt=PROMPTS.get(k)) for k in (start, start + 1)]
        items = [replace(item, drivers=("Ann", "script") if start else ("Bo",)) for item in items]
        write_journal(folder, entries(items, first_seq=1 + 2 * start))
        exporter = Exporter(folder, SPEC, ExporterOptions(), video=video)
        exporter.poll(flush=True)
        exporter.close()
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "night1")


@pytest.fixture
def without_lerobot(monkeypatch):
    """LeRobot opens what the first test and that of the videos write; here it would take most of the time."""
    monkeypatch.setattr("serl_launcher.curation.check._open_with_lerobot", lambda *_: None)


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made, tmp_path / "night1")


def said(folder: Path) -> list[tuple]:
    """Of each episode: its number in its source, rows, success, mode, prompt."""
    rows = [(one.row["source_episode"], one.n, one.success, one.mode, *one.prompts)
            for one in Opened(str(folder), 0).episodes]  # fmt: skip
    return rows


def numbers(folder: Path, column: str) -> np.ndarray:
    data = Dataset(str(folder))
    return getattr(data.table, column)


def test_what_is_chosen_is_what_comes_out_row_by_row(run, tmp_path, capsys):
    before = dataset_digest(run / "dataset")
    out = tmp_path / "out"
    assert tool.main(["copy", str(out), str(run), "--success", "yes", "--mode", "demo", "--mode", "eval"]) == 0
    printed = capsys.readouterr().out
    assert "left out: 3 --success" in printed
    assert "left out: 1 --mode" in printed
    assert "2 episodes, 10 rows read back and compared, 2 prompts" in printed
    assert said(out) == [(0, 3, True, "demo", "touch the wall"), (4, 7, True, "eval", "push it away")]
    whole = numbers(run / "dataset", "state")
    np.testing.assert_array_equal(numbers(out, "state"), np.concatenate([whole[:3], whole[18:25]]))
    assert dataset_digest(run / "dataset") == before
    stats = json.loads((out / "meta/stats.json").read_text())
    state = numbers(out, "state").astype(np.float64)
    np.testing.assert_allclose(stats["observation.state"]["q90"], np.quantile(state, 0.9, axis=0))
    assert stats["index"]["max"] == [9]
    assert not list(tmp_path.glob(".*part"))
    assert runs.main(["show", str(out)]) == 0
    told = capsys.readouterr().out
    assert f"source {run}, digest {before}, episodes [0, 4]" in told
    assert "--success yes --mode demo" in told


def test_the_same_by_what_is_said_of_versions_help_actor_and_prompt(run):
    episodes = Opened(str(run), 0).episodes

    def picked(**words):
        return [one.index for one in Filter(**words).chosen(episodes)[0]]

    assert picked(versions=(0, 0)) == [0, 1, 2, 3]
    assert picked(versions=(1, 5)) == [4, 5]
    assert picked(helped=True) == [0, 1, 2, 3, 4, 5]  # the last tick of each
    assert picked(helped=False) == []
    assert picked(actors=["actor-0"], prompt="push*") == [4, 5]
    assert picked(actors=["robot-2"]) == []
    assert picked(operators=["An*"]) == [2, 3, 4, 5]
    assert picked(operators=["Bo", "script"]) == [0, 1, 2, 3, 4, 5]
    assert picked(operators=["B"]) == []
    assert picked(episodes={1, 3, 5}, drop={3}) == [1, 5]
    with pytest.raises(ValueError, match="no episode 9; there are 0 to 5"):
        picked(drop={9})


def test_what_a_person_said_afterwards_counts_and_what_was_thrown_away_stays_out(
    run, tmp_path, capsys, without_lerobot
):
    labels = Relabelled(run)
    labels.add({"episode-1": True, "episode-2": False}, "alice", "2026-11-30T12:00:00")
    labels.save()
    out = tmp_path / "out"
    assert tool.main(["copy", str(out), str(run), "--success", "yes"]) == 0
    assert "1 episodes end as people judged them afterwards" in capsys.readouterr().out
    assert [row[0] for row in said(out)] == [0, 1, 4]
    data = Dataset(str(out))
    ends = [place.end - 1 for place in data.table.episodes]
    assert data.table.outcomes["next.success"][ends].tolist() == [True, True, True]
    assert data.table.outcomes["next.reward"][ends].tolist() == [1, 1, 1]
    (one,) = [one for one in Opened(str(out), 0).episodes if one.row["source_episode"] == 1]
    assert one.people == ("Bo", "alice")
    assert (one.said_by, one.row["truncated_by"], one.discarded) == ("human", "", False)


def test_two_runs_merge_and_prompts_are_renamed(run, tmp_path, capsys, without_lerobot):
    other = make_run(tmp_path / "night2", first=10)
    out = tmp_path / "both"
    words = ["copy", str(out), str(run), str(other), "--rename", "touch the wall", "touch the green wall"]
    assert tool.main(words) == 0
    assert "12 episodes" in capsys.readouterr().out
    episodes = Opened(str(out), 0).episodes
    assert [(Path(one.row["source"]).name, one.row["source_episode"]) for one in episodes] == [
        (name, k) for name in ("night1", "night2") for k in range(6)
    ]
    assert {one.prompts for one in episodes} == {("touch the green wall",), ("push it away",)}
    data = Dataset(str(out))
    assert [data.table.prompts[k] for k in data.table.prompt[[0, 20, 29]]] == [
        "touch the green wall", "push it away", "touch the green wall"]  # fmt: skip
    assert len(list((out / "data").rglob("*.parquet"))) == 1  # the sources have three small ones each
    third = tmp_path / "again"
    assert tool.main(["copy", str(third), str(out), "--text", "do it", "--drop", "0-10"]) == 0
    assert said(third) == [(11, len(data.table.episodes[11]), False, "eval", "do it")]


def test_videos_go_whole_and_what_nothing_refers_to_is_told(tmp_path, capsys):
    run = make_run(tmp_path / "night1", video=True)
    out = tmp_path / "out"
    assert tool.main(["copy", str(out), str(run), "--drop", "0,2,3"]) == 0
    assert "6 frames of episodes that were left out lie on in the mp4 files" in capsys.readouterr().out
    data, before = Dataset(str(out)), Dataset(str(run / "dataset"))
    spec = data.spec()
    rows, old = data.rows(spec), before.rows(before.spec())
    for new, source in ((0, 1), (1, 4), (2, 5)):
        first, end = rows.bounds[new]
        there = old.bounds[source][0]
        for camera, pictures in rows.images(range(first, end)).items():
            np.testing.assert_array_equal(pictures, old.images(range(there, there + end - first))[camera])


def test_a_split_has_every_episode_once(run, tmp_path, without_lerobot):
    assert tool.main(["split", str(tmp_path / "s"), str(run), "train=0.5", "held_out=0.5", "--seed", "3"]) == 0
    parts = [[row[0] for row in said(tmp_path / "s" / name)] for name in ("train", "held_out")]
    assert sorted(parts[0] + parts[1]) == list(range(6))
    assert [len(part) for part in parts] == [3, 3]
    assert all(part == sorted(part) for part in parts)


def test_a_change_on_the_way_is_found(run, tmp_path, without_lerobot):
    out = tmp_path / "out"
    assert tool.main(["copy", str(out), str(run)]) == 0
    sources = [Opened(str(run), 0)]
    assert check(out, sources, sources[0].episodes, Renaming()) == 28
    path = next((out / "data").rglob("*.parquet"))
    table = pq.read_table(path)
    place = table.schema.get_field_index("next.reward")
    changed = np.array(table["next.reward"])
    changed[7] += 1e-7
    pq.write_table(table.set_column(place, table.schema.field(place), pa.array(changed)), path)
    with pytest.raises(DatasetError, match=r"episode 2: column 'next\.reward' is not the source's"):
        check(out, sources, sources[0].episodes, Renaming())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["copy", "{run}", "{run}"], "exists; name a folder that does not"),
        (["copy", "{out}", "{run}", "--success", "yes", "--mode", "online", "--prompt", "push*"], "no episode is left"),
        (["copy", "{run}/good", "{run}"], "a source is never changed"),
        (["copy", "{out}", "{run}", "--rename", "lift", "drop"], "--rename 'lift': no episode has that prompt"),
        (["copy", "{out}", "{run}", "{lab}"], "has 30 frames a second"),
        (["copy", "{out}", "{lab}", "--success", "yes"], "--success: the dataset says nothing of it, episode 0"),
        (["copy", "{out}", "{run}", "{run}", "--drop", "1"], "name episodes of one dataset"),
        (["split", "{out}", "{run}", "train=0.9", "x=0.3"], "shares that are 1 in all"),
        (["list", "{out}"], "no such folder"),
        (["push", "{run}", "owner"], "expected owner/name"),
    ],
)
def test_mistakes_are_told_in_one_line_and_leave_nothing(words, told, run, lab, tmp_path, capsys):
    names = {"run": run, "lab": lab, "out": tmp_path / "out"}
    assert tool.main([word.format(**names) for word in words]) == 2
    err = capsys.readouterr().err
    assert told in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*part"))


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return lab_dataset(tmp_path_factory.mktemp("lab") / "lab")


def test_groots_layout_has_the_files_and_keys_that_its_loader_reads(run, tmp_path, capsys):
    out = tmp_path / "groot"
    assert tool.main(["groot", str(out), str(run)]) == 0
    assert "modality.json: state: arm 0:3" in capsys.readouterr().out
    info = json.loads((out / "meta/info.json").read_text())
    assert (info["codebase_version"], info["total_videos"]) == ("v2.1", 12)
    modality = json.loads((out / "meta/modality.json").read_text())
    tasks = [json.loads(line)["task"] for line in (out / "meta/tasks.jsonl").read_text().splitlines()]
    lines = [json.loads(line) for line in (out / "meta/episodes.jsonl").read_text().splitlines()]
    stats = json.loads((out / "meta/stats.json").read_text())
    source = Opened(str(run), 0)
    for line, one in zip(lines, source.episodes, strict=True):
        place = {"episode_chunk": 0, "episode_index": line["episode_index"]}
        table = pq.read_table(out / info["data_path"].format(**place)).to_pandas()
        assert (len(table), line["length"]) == (one.n, one.n)
        texts = table[modality["annotation"]["human.task_description"]["original_key"]].map(tasks.__getitem__)
        assert set(texts) == set(one.prompts) == set(line["tasks"])
        for camera, entry in modality["video"].items():
            assert entry["original_key"] == f"observation.images.{camera}"
            assert (out / info["video_path"].format(video_key=entry["original_key"], **place)).is_file()
        for section, column in (("state", "observation.state"), ("action", "action")):
            (part,) = modality[section].values()
            assert table[column].iloc[0][part["start"] : part["end"]].shape == (part["end"],)
            assert all(len(stats[column][key]) == part["end"] for key in ("mean", "std", "min", "max", "q01", "q99"))


@pytest.mark.slow
def test_lerobots_own_converter_brings_groots_layout_back_to_the_same_rows(lab, tmp_path):
    import subprocess
    import sys

    out = tmp_path / "groot"
    assert tool.main(["groot", str(out), str(lab)]) == 0
    words = ["--repo-id=local/groot", f"--root={out}", "--push-to-hub=false"]
    command = [sys.executable, "-m", "lerobot.scripts.convert_dataset_v21_to_v30", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    back, before = Dataset(str(out)), Dataset(str(lab))
    np.testing.assert_array_equal(back.table.state, before.table.state)
    np.testing.assert_array_equal(back.table.action, before.table.action)
    rows = back.rows(back.spec())
    seen = rows.images(range(12, 24))["wrist"].mean((1, 2, 3))
    np.testing.assert_allclose(seen, 9 * np.arange(12), atol=4)


def test_parts_of_modality_json_by_the_names_of_the_dims():
    from serl_launcher.curation.groot import _parts

    arm = ["pan", "lift", "flex", "gripper"]
    assert _parts(arm) == {"arm": {"start": 0, "end": 3}, "gripper": {"start": 3, "end": 4}}
    both = [f"{side}.{name}" for side in ("left", "right") for name in ("j1", "j2", "gripper")]
    assert _parts(both) == {
        "left": {"start": 0, "end": 2}, "left_gripper": {"start": 2, "end": 3},
        "right": {"start": 3, "end": 5}, "right_gripper": {"start": 5, "end": 6},
    }  # fmt: skip
