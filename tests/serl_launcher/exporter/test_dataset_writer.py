"""The dataset writer: contents, exactly-once over every point at which it may be killed, damage, readers in between."""

import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from run_samples import SPEC, episode

from serl_launcher.exporter import columns
from serl_launcher.exporter.origin import episode_ids
from serl_launcher.exporter.recovery import UnusableDataset
from serl_launcher.exporter.video import wants_video
from serl_launcher.exporter.writer import DatasetWriter
from serl_launcher.run import files
from serl_transport.contract.specs import TaskSpec


def read_as_lerobot(root: Path) -> dict[str, np.ndarray | list]:
    """What LeRobot's loader finds, in its order: info, episodes, data. Fails where it would."""
    info = json.loads((root / "meta/info.json").read_text())
    episodes = [
        row for path in sorted(root.glob("meta/episodes/*/*.parquet")) for row in pq.read_table(path).to_pylist()
    ]
    tables = [pq.read_table(path) for path in sorted(root.glob("data/*/*.parquet"))]
    index = np.concatenate([table["index"].to_numpy() for table in tables]) if tables else np.zeros(0)
    assert len(episodes) >= info["total_episodes"]
    assert np.array_equal(index, np.arange(len(index)))
    assert len(index) >= info["total_frames"]
    assert not episodes or episodes[-1]["dataset_to_index"] <= len(index)
    return {"ordinals": [row["episode_ordinal"] for row in episodes[: info["total_episodes"]]], "tables": tables}


@pytest.fixture(autouse=True)
def flushes(monkeypatch) -> list[str]:
    """What is flushed and renamed, in order. Nothing here cuts the power, so the disk is not waited for."""
    calls: list[str] = []
    replace = os.replace
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: calls.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    monkeypatch.setattr(files.os, "replace", lambda a, b: (calls.append(f"{b} is named"), replace(a, b)))
    return calls


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path, flushes):
    files.write_json(tmp_path / "info.json", {}, durable=True)
    path = tmp_path / "info.json"
    assert flushes == [f"{path}.part", f"{path} is named", str(tmp_path)]


def test_who_drove_and_judged_is_in_the_episodes_file_unless_an_older_release_began_it(tmp_path, monkeypatch, caplog):
    judged = replace(episode(1).outcome, judge="Bo")
    told = replace(episode(1), drivers=("Ann", "script"), outcome=judged)
    write(tmp_path / "new", told, episode(2))
    (row, nobody) = pq.read_table(tmp_path / "new/meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert (row["drivers"], row["judge"], nobody["drivers"], nobody["judge"]) == ("Ann, script", "Bo", "", "")
    with monkeypatch.context() as older:
        real = columns.episode_row
        older.setattr(
            "serl_launcher.exporter.writer.episode_row",
            lambda *words: {key: value for key, value in real(*words).items() if key not in columns.NEWER},
        )
        write(tmp_path / "old", episode(0))
    write(tmp_path / "old", told)
    files = [pq.read_schema(path).names for path in sorted((tmp_path / "old/meta/episodes").rglob("*.parquet"))]
    assert len(files) == 2
    assert files[0] == files[1]
    assert "its episodes lack drivers, judge, lossy, episodes.jsonl has them" in caplog.text


def write(root, *episodes):
    writer = DatasetWriter(root, SPEC, video=False)
    for item in episodes:
        writer.add(item.info.seed, item)
    writer.commit()


def test_rows_hold_the_episode(tmp_path):
    writer = DatasetWriter(tmp_path, SPEC, video=False)
    written = [episode(0), episode(1, mode="demo"), episode(2, prompt="push the cube")]
    for ordinal, item in enumerate(written):
        assert writer.add(ordinal * 2, item)
    writer.commit()
    table = pq.read_table(tmp_path / "data/chunk-000/file-000.parquet")
    first = 0
    for position, item in enumerate(written):
        rows = table.slice(first, item.n)
        first += item.n
        assert np.array_equal(np.stack(rows["observation.state"].to_numpy()), item.arrays["observation.state"][:-1])
        assert np.array_equal(np.stack(rows["action"].to_numpy()), item.arrays["action"])
        for key in ("next.reward", "next.done", "next.truncated", "next.success", "intervention"):
            assert np.array_equal(rows[key].to_numpy(), item.arrays[key]), key
        assert set(rows["complementary_info.episode_ordinal"].to_pylist()) == {position * 2}
        assert set(rows["complementary_info.mode"].to_pylist()) == {0 if item.info.mode == "demo" else 1}
        assert set(rows["task_index"].to_pylist()) == {1 if item.info.prompt == "push the cube" else 0}
        for camera in SPEC.cameras:
            key = f"observation.images.{camera}"
            decoded = [np.array(Image.open(io.BytesIO(cell["bytes"]))) for cell in rows[key].to_pylist()]
            assert np.array_equal(decoded, item.arrays[key][:-1])  # lossless
    assert pq.ParquetFile(tmp_path / "data/chunk-000/file-000.parquet").num_row_groups == 3
    rows = pq.read_table(tmp_path / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [(r["episode_id"], r["success"], r["truncated_by"], r["seed"]) for r in rows] == [
        ("episode-0", True, "", 0), ("episode-1", False, "time_limit", 1), ("episode-2", True, "", 2),
    ]  # fmt: skip


def test_statistics_of_the_dataset_are_those_of_all_rows(tmp_path):
    writer = DatasetWriter(tmp_path, SPEC, video=False)
    items = [episode(index) for index in range(6)]
    for ordinal, item in enumerate(items):
        writer.add(ordinal, item)
        if ordinal % 2:
            writer.commit()
    stats = json.loads((tmp_path / "meta/stats.json").read_text())
    state = np.concatenate([item.arrays["observation.state"][:-1] for item in items])
    for name, value in (("mean", state.mean(0)), ("std", state.std(0)), ("min", state.min(0)), ("max", state.max(0))):
        assert np.allclose(stats["observation.state"][name], value, atol=1e-6), name
    assert stats["observation.state"]["count"] == [len(state)]
    pixels = np.concatenate([item.arrays["observation.images.front"][:-1].reshape(-1, 3) for item in items]) / 255
    assert np.allclose(np.squeeze(stats["observation.images.front"]["mean"]), pixels.mean(0), atol=1e-6)
    assert np.allclose(np.squeeze(stats["observation.images.front"]["std"]), pixels.std(0), atol=1e-6)


def test_reopening_continues_and_writes_nothing_twice(tmp_path):
    for start in (0, 2, 4):
        writer = DatasetWriter(tmp_path, SPEC, video=False)
        for ordinal in range(start + 2):  # the caller offers everything from the beginning
            assert writer.add(ordinal, episode(ordinal)) == (ordinal >= start)
        writer.commit()
    assert read_as_lerobot(tmp_path)["ordinals"] == list(range(6))
    assert episode_ids(tmp_path) == {ordinal: f"episode-{ordinal}" for ordinal in range(6)}


@pytest.mark.parametrize("video", [False, True])
def test_a_kill_at_any_rename_loses_and_repeats_nothing(tmp_path, monkeypatch, video):
    """The crash is an exception out of os.replace: what is on disk then is what a kill leaves."""
    replace, crashes = os.replace, 0

    def crash_at(count: int):
        def limited(source, target):
            nonlocal count
            count -= 1
            if count < 0:
                raise KeyboardInterrupt
            replace(source, target)

        return limited

    first = DatasetWriter(tmp_path / "first", SPEC, video)
    first.add(0, episode(0))
    first.commit()
    for count in range(30):
        root = tmp_path / f"crash-{count}"
        shutil.copytree(tmp_path / "first", root)
        writer = DatasetWriter(root, SPEC, video)
        writer.add(1, episode(1))
        writer.add(2, episode(2, prompt="another"))
        monkeypatch.setattr(files.os, "replace", crash_at(count))
        try:
            writer.commit()
            finished = True
        except KeyboardInterrupt:
            finished, crashes = False, crashes + 1
        monkeypatch.setattr(files.os, "replace", replace)
        if (root / "meta/info.json").exists():
            read_as_lerobot(root)
        again = DatasetWriter(root, SPEC, video)
        for ordinal in range(4):
            again.add(ordinal, episode(ordinal, prompt="another" if ordinal == 2 else None))
        again.commit()
        assert read_as_lerobot(root)["ordinals"] == [0, 1, 2, 3]
        assert not list(root.rglob("*.part"))
        tasks = pq.read_table(root / "meta/tasks.parquet").to_pydict()
        assert dict(zip(tasks["task"], tasks["task_index"], strict=True)) == {SPEC.prompt: 0, "another": 1}
        if finished:
            break
    assert finished
    assert crashes >= 5  # data, tasks, episodes, stats, info (and the videos)


@pytest.mark.parametrize(
    "damage", ["data/chunk-000/file-001.parquet", "meta/episodes/chunk-000/file-001.parquet", "meta/tasks.parquet",
               "meta/info.json", "meta/stats.json"]
)  # fmt: skip
@pytest.mark.parametrize("how", ["torn", "gone"])
def test_damage_costs_at_most_what_the_journal_brings_back(tmp_path, damage, how):
    writer = DatasetWriter(tmp_path, SPEC, video=False)
    for ordinal in range(3):
        writer.add(ordinal, episode(ordinal))
        writer.commit()
    stats = json.loads((tmp_path / "meta/stats.json").read_text())
    path = tmp_path / damage
    if how == "torn":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.unlink()
    again = DatasetWriter(tmp_path, SPEC, video=False)
    assert again.state.last_ordinal == (0 if "file-001" in damage else 2)
    read_as_lerobot(tmp_path)
    for ordinal in range(3):
        again.add(ordinal, episode(ordinal))
    again.commit()
    assert read_as_lerobot(tmp_path)["ordinals"] == [0, 1, 2]
    restored = json.loads((tmp_path / "meta/stats.json").read_text())
    assert np.allclose(restored["action"]["mean"], stats["action"]["mean"])


def test_swapped_rows_are_noticed(tmp_path):
    writer = DatasetWriter(tmp_path, SPEC, video=False)
    for ordinal in range(2):
        writer.add(ordinal, episode(ordinal, n=4))
        writer.commit()
    a, b = (tmp_path / f"data/chunk-000/file-00{i}.parquet" for i in (0, 1))
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)
    assert DatasetWriter(tmp_path, SPEC, video=False).state.episodes == 0


def test_another_tasks_dataset_is_refused_by_name(tmp_path):
    writer = DatasetWriter(tmp_path, SPEC, video=False)
    writer.add(0, episode(0))
    writer.commit()
    other = TaskSpec.from_dict(SPEC.to_dict() | {"action_names": ["left", "right"]})
    with pytest.raises(UnusableDataset, match="other features: action"):
        DatasetWriter(tmp_path, other, video=False)


def test_an_episode_without_ticks_is_passed_over(tmp_path):
    writer = DatasetWriter(tmp_path, SPEC, video=False)
    empty = episode(0)
    arrays = {key: rows[: key.startswith("observation")] for key, rows in empty.arrays.items()}
    assert not writer.add(0, type(empty)(empty.info, empty.outcome, arrays))
    writer.commit()
    assert not (tmp_path / "meta").exists()


@pytest.mark.parametrize(
    ("setting", "size", "expected"),
    [("auto", 64, False), ("auto", 224, True), ("auto", 225, False), (True, 64, True), ("false", 224, False)],
)
def test_the_video_setting(setting, size, expected):
    spec = TaskSpec.from_dict(SPEC.to_dict() | {"cameras": {"front": [size, size]}})
    assert wants_video(setting, spec) is expected


def test_bad_video_settings_say_what_to_change():
    odd = TaskSpec.from_dict(SPEC.to_dict() | {"cameras": {"front": [15, 20]}})
    with pytest.raises(ValueError, match=r"'front' is .15, 20., and video needs even sides: set exporter\.video=false"):
        wants_video(True, odd)
    with pytest.raises(ValueError, match=r"exporter\.video: expected auto, true or false, got 'maybe'"):
        wants_video("maybe", odd)
