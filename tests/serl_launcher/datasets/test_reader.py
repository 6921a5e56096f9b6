"""Datasets as labs have them, written by LeRobot itself, and what is wrong with them, by file, episode and frame."""

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lab_dataset import JOINTS, lab_dataset
from sft_samples import EPISODES, TICKS, add_modality, make_dataset

from serl_launcher.datasets.dataset import Dataset
from serl_launcher.datasets.fitting import Source
from serl_launcher.datasets.folder import DatasetError
from serl_launcher.datasets.pictures import video_backend
from serl_transport.contract.specs import TaskSpec


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return lab_dataset(tmp_path_factory.mktemp("data") / "lab", tasks=("put it  into the cup\n", "throw it away"))


@pytest.fixture
def broken(folder, tmp_path):
    """A copy to damage."""
    return shutil.copytree(folder, tmp_path / "lab")


def task(**changes):
    spec = {
        "name": "so",
        "prompt": "put it into the cup",
        "cameras": {"front": [24, 32], "wrist": [24, 32]},
        "state_names": JOINTS,
        "state_low": [-100] * 6,
        "state_high": [100] * 6,
        "action_names": JOINTS,
        "action_low": [-100] * 6,
        "action_high": [100] * 6,
        "control_hz": 30,
        "max_ticks": 60,
    }
    return TaskSpec.from_dict(spec | changes)


def rewrite(path, change):
    """Replace columns of a parquet file: name -> array of another type or value."""
    table = pq.read_table(path)
    for name, values in change(table).items():
        table = table.set_column(table.column_names.index(name), name, values)
    pq.write_table(table, path)


def data_file(folder):
    return next((folder / "data").rglob("*.parquet"))


def test_the_task_a_dataset_describes_and_its_rows(folder):
    data = Dataset(folder)
    spec = data.spec()
    assert spec.state_names == spec.action_names == tuple(JOINTS)
    assert spec.cameras == {"front": (24, 32), "wrist": (24, 32)}
    assert (spec.control_hz, spec.max_ticks, spec.prompt) == (30, 12, "put it into the cup")
    rows = data.rows(spec)
    assert [rows.prompt(row) for row in (0, 11, 12, 23)] == ["put it into the cup"] * 2 + ["throw it away"] * 2
    assert rows.bounds == [(0, 12), (12, 24)]
    np.testing.assert_allclose(rows.state[1:12], rows.action[:11], atol=1e-5)
    picture = rows.images([13, 14])["wrist"]
    assert (picture.shape, picture.dtype) == ((2, 24, 32, 3), np.uint8)
    assert picture[:, 0, 0].tolist() == [[9, 9, 9], [18, 18, 18]]
    chunk, is_pad = rows.chunk(10, 4)
    assert is_pad.tolist() == [False, False, True, True]
    np.testing.assert_array_equal(chunk, rows.action[[10, 11, 11, 11]])


def test_pictures_with_channels_first_are_read_by_their_names(tmp_path):
    data = Dataset(lab_dataset(tmp_path / "chw", shape=(3, 24, 32), lengths=(4,)))
    assert data.spec().cameras["front"] == (24, 32)
    assert data.rows(data.spec()).images([2])["front"].shape == (1, 24, 32, 3)


def test_videos_are_decoded_frame_by_frame_and_resized_by_averaging(tmp_path):
    data = Dataset(lab_dataset(tmp_path / "video", video=True))
    rows = data.rows(task(cameras={"front": [12, 16]}))
    assert "camera 'front': pictures are resized from 24×32 to 12×16" in rows.notes
    seen = rows.images([12, 15, 20])["front"]
    assert seen.shape == (3, 12, 16, 3)
    np.testing.assert_allclose(seen.mean((1, 2, 3)), [0, 27, 72], atol=4)
    path = next((tmp_path / "video" / "videos" / "observation.images.wrist").rglob("*.mp4"))
    rows = data.rows(task())
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DatasetError, match=r"file-000\.mp4: episode 1, frame 3 to 4: observation\.images\.\w+ cannot"):
        rows.images([15, 16])


def test_dims_are_matched_by_name_in_any_order_and_cameras_by_the_mapping(folder):
    mixed = [*JOINTS[3:], *JOINTS[:3]]
    source = Source(str(folder), cameras={"top": "observation.images.wrist"})
    data = Dataset(source)
    rows = data.rows(task(state_names=mixed, cameras={"front": [24, 32], "top": [24, 32]}))
    np.testing.assert_array_equal(rows.state, data.table.state[:, [3, 4, 5, 0, 1, 2]])
    np.testing.assert_array_equal(rows.action, data.table.action)
    assert (rows.state_names, rows.action_names) == (mixed, JOINTS)
    other = [f"{name}.pos" for name in JOINTS]
    spec = task(state_names=other, action_names=other)
    (problem, second) = Dataset(folder).fit(spec).problems
    assert problem.startswith(f"state: the dataset's dims are {JOINTS}, the task's {other}")
    assert second.endswith(f"action: [{', '.join(JOINTS)}]")
    told = Dataset(replace(source, cameras={}, state=JOINTS, action=JOINTS)).fit(spec)
    assert (told.problems, told.state, told.action) == ([], list(range(6)), list(range(6)))
    wrong = Dataset(replace(source, cameras={}, state=["pam", *JOINTS[1:]])).fit(spec).problems[0]
    assert wrong.startswith("state: no dim 'pam'; did you mean 'pan'")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"cameras": {"side": [24, 32]}}, "camera 'side': the dataset has no 'side'; it has ['front', 'wrist']"),
        ({"cameras": {"front": [24, 24]}}, "camera 'front': 24×32 is of another shape than the task's 24×24"),
        ({"control_hz": 10}, "fps: the dataset has 30, the task runs at 10"),
        ({"action_high": [3] * 6, "action_low": [-3] * 6}, "lies outside the task's -3 to 3: other units"),
        ({"state_high": [1] * 6, "state_low": [-1] * 6}, "state dim"),
    ],
)
def test_what_does_not_fit_a_task_is_refused_by_name(folder, changes, told):
    with pytest.raises(DatasetError) as raised:
        Dataset(folder).rows(task(**changes))
    assert str(raised.value).startswith(f"{folder}: ")
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)


def test_changes_are_not_taken_for_targets(broken):
    def small(table):
        return {"action": pa.array((np.stack(table["action"].to_numpy()) * 0.01).tolist(), table["action"].type)}

    rewrite(data_file(broken), small)
    (problem,) = Dataset(broken).fit(task()).problems
    assert "changes, not targets?" in problem
    named = [f"d_{name}" for name in JOINTS]
    assert Dataset(Source(str(broken), action=JOINTS)).fit(task(action_names=named)).problems == []


def test_what_is_no_number_is_named_by_file_episode_and_frame(broken):
    def with_nan(table):
        values = np.stack(table["observation.state"].to_numpy()).copy()
        values[15, 2] = np.nan
        return {"observation.state": pa.array(values.tolist(), table["observation.state"].type)}

    rewrite(data_file(broken), with_nan)
    with pytest.raises(DatasetError, match=r"file-000\.parquet, episode 1, frame 3: observation\.state holds nan in"):
        Dataset(broken)


def test_doubles_and_variable_lists_are_numbers_too(broken):
    rewrite(data_file(broken), lambda t: {"action": t["action"].cast(pa.list_(pa.float64()))})
    data = Dataset(broken)
    assert data.table.action.dtype == np.float32
    assert data.table.action.shape == (24, 6)


def break_by(name, folder):
    if name == "info":
        (folder / "meta" / "info.json").write_text("{")
    if name == "missing":
        data_file(folder).unlink()
    if name == "torn":
        data_file(folder).write_bytes(data_file(folder).read_bytes()[:-200])
    if name == "tasks":
        (folder / "meta" / "tasks.parquet").unlink()
    if name == "grown":
        info = folder / "meta" / "info.json"
        info.write_text(json.dumps(json.loads(info.read_text()) | {"total_frames": 99}))
    if name == "mixed":
        rewrite(data_file(folder), lambda t: {"frame_index": pa.array([*range(11), 99, *range(12)], pa.int64())})
    if name == "column":
        table = pq.read_table(data_file(folder))
        pq.write_table(table.drop_columns(["action"]), data_file(folder))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("info", r"info\.json: cannot be read"),
        ("missing", r"data/chunk-000/file-000\.parquet is missing"),
        ("torn", r"file-000\.parquet: cannot be read"),
        ("tasks", r"tasks\.parquet is missing"),
        ("grown", r"meta/info\.json counts 99 frames, meta/episodes 24"),
        ("mixed", r"file-000\.parquet, episode 0, frame 11: the row says episode/frame 0/99"),
        ("column", r"file-000\.parquet: no column 'action'"),
    ],
)
def test_a_damaged_folder_is_refused_by_file_and_the_hub_is_not_asked(broken, monkeypatch, name, told):
    import huggingface_hub

    def asked(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", asked)
    break_by(name, broken)
    with pytest.raises(DatasetError, match=told) as raised:
        Dataset(broken)
    assert "\n" not in str(raised.value)


def test_version_2_1_is_refused_with_the_command_that_converts_it(broken):
    info = broken / "meta" / "info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"codebase_version": "v2.1"}))
    with pytest.raises(DatasetError) as raised:
        Dataset(broken)
    command = f"convert_dataset_v21_to_v30 --repo-id=local/lab --root={broken} --push-to-hub=false"
    assert str(raised.value).endswith(command)


def test_names_that_are_no_folder_and_the_hubs_refusal_are_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("./lab/data", "lab", "/no/where"):
        with pytest.raises(DatasetError, match=r"no such folder .and not a hub name"):
            Dataset(name)
    with pytest.raises(DatasetError, match=r"^lab/data: no such folder, and the hub did not give it: ") as raised:
        Dataset("lab/data")
    assert "\n" not in str(raised.value)
    (tmp_path / "run" / "dataset" / "meta").mkdir(parents=True)
    (tmp_path / "run" / "dataset" / "meta" / "info.json").write_text("{}")
    with pytest.raises(DatasetError, match="did you mean run/dataset"):
        Dataset("run")


def test_modality_json_selects_half_open_ranges(tmp_path):
    folder = make_dataset(tmp_path / "sft")
    add_modality(folder)
    data = Dataset(folder)
    spec = data.spec()
    assert spec.state_names == ("tail.0", "tail.1", "head.0")
    assert list(spec.cameras) == ["ego"]
    np.testing.assert_allclose(data.rows(spec).state[3], [0, np.sin(9 / TICKS), 3 / TICKS], atol=1e-6)
    assert len(data.table.episodes) == EPISODES
    path = folder / "meta" / "modality.json"
    was = path.read_text()
    for change, told in (
        (('"end": 3', '"end": 1'), r"state\.tail: expected 0 <= start < end, got 1 and 1"),
        (('"end": 3', '"end": 9'), r"state\.tail: ends at dim 9, column 'observation\.state' has 3"),
        (("images.front", "images.top"), r"camera 'ego': no column 'observation\.images\.top'"),
        (('"video"', '"pictures"'), "expected a section 'video'"),
    ):
        path.write_text(was.replace(*change))
        with pytest.raises(DatasetError, match=told):
            Dataset(folder)


def test_a_torchcodec_that_does_not_load_is_not_told_of(monkeypatch, caplog, capfd):
    """As where FFmpeg is absent: pyav reads the videos, and nobody sees a page of tracebacks."""
    monkeypatch.setitem(sys.modules, "torchcodec", None)  # importing it raises ImportError
    video_backend.cache_clear()
    assert video_backend() == "pyav"
    video_backend.cache_clear()
    assert "torchcodec" not in caplog.text + "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        (3, "expected a folder or a hub name"),
        ({"source": "a/b", "camera": {}}, "demos.0.camera: unknown key; did you mean 'cameras'"),
        ({"source": "a/b", "cameras": ["front"]}, "demos.0.cameras: expected {the task's camera: the dataset's}"),
        ({"source": "a/b", "episodes": [0.5]}, "demos.0.episodes: expected a list"),
        ({"source": "a/b", "prompt": " "}, "demos.0.prompt: expected a text"),
    ],
)
def test_an_entry_that_is_none_is_refused_by_key(entry, told):
    with pytest.raises(ValueError, match=r"demos\.0") as raised:
        Source.read(entry, "demos.0")
    assert told in str(raised.value)
