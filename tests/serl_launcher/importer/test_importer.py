"""`demos`: what a dataset or another run holds becomes demonstrations of a run, once, whatever happens meanwhile."""

import json
import multiprocessing
import os
import shutil
import signal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from configured import composed
from lab_dataset import JOINTS, lab_dataset
from omegaconf import OmegaConf

from serl_launcher.gateway.ledger import Ledger, LedgerRow
from serl_launcher.importer import demonstrations
from serl_launcher.importer.__main__ import main
from serl_launcher.importer.journal import JournalImport
from serl_launcher.replay.episodes import EpisodeStream
from serl_launcher.run.config import task_spec
from serl_launcher.run.paths import RunPaths
from serl_launcher.run.schedule import current_stage, read_stages
from serl_launcher.supervisor.run_folder import holds_data

STAGES = [{"name": "collect", "mode": "demo", "episodes": 2}, {"name": "sft", "mode": "train", "steps": 5}]
TICKS = 11  # of the 12 rows of an episode


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return lab_dataset(tmp_path_factory.mktemp("data") / "lab", tasks=("put it into the cup", "throw it away"))


@pytest.fixture(autouse=True)
def small_items(monkeypatch):
    monkeypatch.setattr(demonstrations, "BATCH_TICKS", 4)


def make_run(folder, demos, **changes):
    spec = {
        "name": "arm",
        "prompt": "put it into the cup",
        "cameras": {"top": [24, 32], "hand": [12, 16]},
        "state_names": JOINTS,
        "state_low": [-100] * 6,
        "state_high": [100] * 6,
        "action_names": JOINTS[::-1],
        "action_low": [-100] * 6,
        "action_high": [100] * 6,
        "control_hz": 30,
        "max_ticks": 60,
    }
    cfg = composed()
    cfg.task = {"name": "arm", "spec": spec | changes, "noop_dims": None, "rate_hz": None}
    cfg.schedule.stages, cfg.demos = STAGES, demos
    folder.mkdir(exist_ok=True)
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    return folder


def from_lab(lab, **more):
    return [{"source": str(lab), "cameras": {"top": "front", "hand": "wrist"}, **more}]


def closed_episodes(run):
    stream = EpisodeStream(run, task_spec(OmegaConf.load(run / "config.yaml")))
    try:
        return [(closed, closed.build()) for closed in stream.poll()]
    finally:
        stream.close()


def content(run):
    """Everything but when it was imported."""
    return [(c.cut_by, e.info.episode_id, e.info.prompt, {k: x.tobytes() for k, x in e.arrays.items()})
            for c, e in closed_episodes(run)]  # fmt: skip


def test_every_episode_becomes_a_demonstration_with_its_prompt_and_its_last_observation(lab, tmp_path, capsys):
    run = make_run(tmp_path / "run", from_lab(lab))
    assert main([str(run)]) == 0
    out = capsys.readouterr().out
    assert f"demos: {lab}: 2 episodes to import, 22 ticks" in out
    assert "note: camera 'hand': pictures are resized from 24×32 to 12×16" in out
    assert "the dataset tells no outcomes: every episode counts as a success" in out
    assert "imported 2 episodes, 22 ticks" in out
    ledger = Ledger(tmp_path / "episodes.jsonl")
    for number, (closed, episode) in enumerate(closed_episodes(run)):
        arrays = episode.arrays
        pose = [30 * np.sin(tick / 9 + np.arange(6) + number) for tick in range(TICKS + 1)]
        np.testing.assert_allclose(arrays["observation.state"], pose, atol=1e-4)
        np.testing.assert_allclose(arrays["action"], np.array(pose)[1:, ::-1], atol=1e-4)
        assert arrays["observation.images.top"][:, 0, 0, 0].tolist() == [9 * k for k in range(TICKS + 1)]
        assert arrays["observation.images.hand"].shape == (TICKS + 1, 12, 16, 3)
        assert arrays["next.reward"].tolist() == [0] * (TICKS - 1) + [1]
        assert arrays["next.done"].tolist() == arrays["next.success"].tolist() == [False] * (TICKS - 1) + [True]
        assert arrays["intervention"].all()
        assert (episode.info.prompt, episode.info.mode) == (("put it into the cup", "throw it away")[number], "demo")
        ledger.add(LedgerRow.of(closed, episode))
    state = current_stage(read_stages(STAGES), ledger.stage_episodes(), {}, {})
    assert state.stage.name == "sft", "imported episodes fill the stage of demonstrations"
    told = json.loads(RunPaths(run).demos.read_text())
    assert list(told["sources"][0]["episodes"].values()) == [0, 1]


def test_a_second_start_and_a_source_that_moved_bring_nothing_twice(lab, tmp_path, capsys):
    run = make_run(tmp_path / "run", from_lab(lab))
    assert main([str(run)]) == 0
    before = content(run)
    (tmp_path / "elsewhere").symlink_to(lab)
    make_run(run, from_lab(tmp_path / "elsewhere"))
    assert main([str(run)]) == 0
    assert "nothing to import, 2 are here already" in capsys.readouterr().out
    assert content(run) == before


def killed_after(items, run):
    """The importer in a process of its own, killed when so many items are on disk."""
    original, done = JournalImport._append, []

    def append(self, entry, tell):
        time_ns = original(self, entry, tell)
        done.append(entry)
        if len(done) == items:
            os.kill(os.getpid(), signal.SIGKILL)
        return time_ns

    JournalImport._append = append
    main([str(run)])


@pytest.mark.parametrize("items", [2, 4])
def test_an_import_that_was_killed_goes_on_item_by_item(lab, tmp_path, items):
    whole, run = (make_run(tmp_path / name, from_lab(lab)) for name in ("whole", "run"))
    assert main([str(whole)]) == 0
    process = multiprocessing.get_context("fork").Process(target=killed_after, args=(items, run))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert len(closed_episodes(run)) == items // 3
    assert main([str(run)]) == 0
    assert content(run) == content(whole)


def test_another_runs_demonstrations_keep_their_last_observation(lab, tmp_path, capsys):
    first = make_run(tmp_path / "first", from_lab(lab))
    assert main([str(first)]) == 0
    same = make_run(tmp_path / "same", str(first))
    assert main([str(same)]) == 0
    for (_, theirs), (_, ours) in zip(closed_episodes(first), closed_episodes(same), strict=True):
        assert {k: x.tobytes() for k, x in theirs.arrays.items()} == {k: x.tobytes() for k, x in ours.arrays.items()}
        assert (ours.n, ours.info.prompt) == (TICKS, theirs.info.prompt)
    mapped = [{"source": str(first), "cameras": {"eye": "top"}, "episodes": [1], "prompt": "do it"}]
    other = make_run(tmp_path / "other", mapped, cameras={"eye": [12, 16]}, action_names=JOINTS)
    assert main([str(other)]) == 0
    assert "left out: 1 not chosen" in capsys.readouterr().out
    ((_, episode),) = closed_episodes(other)
    assert episode.info.prompt == "do it"
    assert episode.arrays["observation.images.eye"][:, 0, 0, 0].tolist() == [9 * k for k in range(TICKS + 1)]
    np.testing.assert_array_equal(episode.arrays["action"][:-1], episode.arrays["observation.state"][1:-1])
    itself = make_run(first, str(first))
    assert main([str(itself)]) == 2
    assert "is this run itself" in capsys.readouterr().err


def test_failures_evaluations_and_doubles_are_left_out_and_counted(lab, tmp_path, capsys):
    folder = shutil.copytree(lab, tmp_path / "told")
    path = next((folder / "meta" / "episodes").rglob("*.parquet"))
    table = pq.read_table(path).append_column("success", pa.array([False, True]))
    pq.write_table(table.append_column("mode", pa.array(["demo", "eval"])), path)
    run = make_run(tmp_path / "run", [*from_lab(folder), *from_lab(lab)])
    assert main([str(run)]) == 0
    out = capsys.readouterr().out
    assert f"{folder}: nothing to import; left out: 1 failed; left out: 1 recorded as eval" in out
    assert [episode.n for _, episode in closed_episodes(run)] == [TICKS, TICKS]


def torn_png(folder):
    path = next((folder / "data").rglob("*.parquet"))
    table = pq.read_table(path)
    cells = table["observation.images.wrist"].to_pylist()
    cells[23]["bytes"] = cells[23]["bytes"][:40]
    key = table.column_names.index("observation.images.wrist")
    pq.write_table(table.set_column(key, table.field(key), pa.array(cells, table.field(key).type)), path)


@pytest.mark.parametrize(
    ("demos", "changes", "told"),
    [
        ({"episodes": [7]}, {}, "episodes: there is no episode 7"),
        ({}, {"max_ticks": 9}, "episode 0: 11 ticks, expected 1 to 9 (the task's max_ticks)"),
        ({"cameras": {}}, {}, "camera 'top': the dataset has no 'top'; it has ['front', 'wrist'] (and 1 more)"),
        ({}, {}, "episode 1, frame 11: observation.images.wrist cannot be decoded"),
    ],
)
def test_what_is_refused_is_refused_before_anything_is_written(lab, tmp_path, capsys, demos, changes, told):
    folder = shutil.copytree(lab, tmp_path / "lab")
    if not demos and not changes:
        torn_png(folder)
    run = make_run(tmp_path / "run", from_lab(folder, **demos), **changes)
    assert main([str(run)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("demos: ")
    assert told in said
    assert said.count("\n") == 1
    assert not holds_data(RunPaths(run))


def test_an_episode_with_two_task_texts_needs_one(lab, tmp_path, capsys):
    folder = shutil.copytree(lab, tmp_path / "lab")
    path = next((folder / "data").rglob("*.parquet"))
    table = pq.read_table(path)
    key = table.column_names.index("task_index")
    pq.write_table(table.set_column(key, table.field(key), pa.array([0] * 5 + [1] * 19, pa.int64())), path)
    run = make_run(tmp_path / "run", from_lab(folder))
    assert main([str(run)]) == 2
    assert "episode 0, frame 5: another task text than at its beginning, 'throw it away'" in capsys.readouterr().err
    make_run(run, from_lab(folder, prompt="pick it up"))
    assert main([str(run)]) == 0
    assert {episode.info.prompt for _, episode in closed_episodes(run)} == {"pick it up"}
