"""The shapes in which labs publish datasets, each through every tool, against what LeRobot reads of the same rows."""

import json
import shlex
import subprocess
import sys

import eval_open_loop
import numpy as np
import preflight
import pytest
import torch
import train_reward_classifier
import train_sft
import visualize_dataset
import why
from configured import composed
from omegaconf import OmegaConf
from real_shapes import SHAPES, Theirs, as_v21, make

from serl_launcher.agents.build import build_agent
from serl_launcher.datasets.dataset import Dataset
from serl_launcher.importer.__main__ import main as import_demos
from serl_launcher.learner.sampling import ShuffledRows, seed_noise
from serl_launcher.replay.episodes import journal_episodes
from serl_launcher.serving.query import Query

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
AH, BATCH = 4, 4
TINY = ["policy=pi0_tiny", f"policy.action_horizon={AH}", "policy.size.image_size=32", "policy.size.depth=1"]
TINY += [f"policy.size.{key}=16" for key in ("width", "vision_width")]
TINY += ["policy.size.vision_layers=1", "policy.size.head_dim=4", "trainer.device=cpu", "telemetry.tensorboard=false"]
TINY += ["sft.steps=2", f"sft.batch_size={BATCH}", "sft.log_period=1", "sft.held_out=0.2", "sft.eval_samples=4"]


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: shape.name)
def shape(request):
    return request.param


@pytest.fixture(scope="module")
def folder(shape, tmp_path_factory):
    return make(tmp_path_factory.mktemp(shape.name) / "set", shape)


@pytest.fixture(scope="module")
def theirs(shape, folder):
    return Theirs(folder, shape, AH)


@pytest.fixture(scope="module")
def tuned(folder, tmp_path_factory):
    """A run of fine-tuning, two steps long."""
    run = tmp_path_factory.mktemp("tuned") / "run"
    assert train_sft.main([str(folder), str(run), *TINY]) == 0
    return run


def test_fine_tuning_takes_the_step_that_lerobots_rows_give(folder, theirs, tuned):
    """The first logged loss is that of a batch which LeRobot's own reader puts together."""
    cfg = train_sft.configured(TINY)
    torch.manual_seed(cfg.seed)
    policy, chunks, _ = train_sft.opened(folder, cfg)
    rows, _ = train_sft.sorted_rows(chunks, train_sft.SftSettings(**cfg.sft), cfg.seed)
    (first,) = ShuffledRows(rows, BATCH, cfg.seed, 0, 1)
    seed_noise(cfg.seed, 0)
    with torch.no_grad():
        losses, _ = build_agent(cfg, policy, chunks.spec)(theirs.batch(first), 0)
    logged = json.loads((tuned / "metrics" / "trainer.jsonl").read_text().splitlines()[0])
    assert logged["step"] == 1
    assert logged["losses/flow"] == pytest.approx(float(sum(losses.values())), rel=1e-5)


def test_open_loop_errors_are_those_on_lerobots_rows(folder, theirs, tuned, tmp_path):
    """An engine of the same parameters, asked with LeRobot's rows, errs as much; so do the baselines."""
    options = ["--dataset", str(folder), "--episodes", "1", "--stride", str(AH), "--output", str(tmp_path)]
    assert eval_open_loop.main([str(tuned), *options]) == 0
    told = json.loads((tmp_path / "open_loop.json").read_text())
    engine, _ = eval_open_loop.engine_of(tuned, [], None, str(folder))
    first, n = theirs.lengths()[0], theirs.lengths()[1]
    seen = theirs.batch(list(range(first, first + n)))
    errors = {"policy": [], "repeat_last": []}
    for tick in range(0, n, AH):
        images = {camera: pictures[tick] for camera, pictures in seen.images.items()}
        chunk = engine.act([Query(images, seen.state[tick], seen.prompts[tick], seed=tick)])[0]
        recorded = seen.action[tick][~seen.is_pad[tick]]
        errors["policy"].append(chunk[: len(recorded)] - recorded)
        last = seen.action[tick - 1, 0] if tick else np.zeros_like(recorded[0])
        errors["repeat_last"].append(last - recorded)
    for method, found in errors.items():
        assert told[method]["mse_physical"] == pytest.approx(np.square(np.concatenate(found)).mean(), rel=1e-4)


def test_preflight_finds_nothing_wrong_and_names_another_rate(shape, folder, theirs, tmp_path, capsys):
    (tmp_path / "config" / "task").mkdir(parents=True)
    spec = theirs.spec().to_dict()
    words = ["policy=pi0_tiny", "task=lab", "--config-dir", str(tmp_path / "config"), "--dataset", str(folder)]
    for rate, code, told in (
        (shape.fps, 0, "data       nothing wrong"),
        (2 * shape.fps, 1, f"fps: the dataset has {shape.fps}, the task runs at {2 * shape.fps}"),
    ):
        env = {"_target_": "serl_robot_infra.envs.pick.PickEnv"}  # needed, not made
        task = {"name": "lab", "spec": spec | {"control_hz": float(rate)}, "env": env}
        OmegaConf.save(OmegaConf.create(task), tmp_path / "config" / "task" / "lab.yaml")
        assert preflight.main(words) == code
        assert told in capsys.readouterr().out


def test_why_finds_nothing_in_a_run_and_the_data_it_was_trained_on(folder, tuned, capsys):
    assert why.main([str(tuned), str(folder)]) == 0, capsys.readouterr().out


@pytest.fixture(scope="module")
def imported(folder, theirs, tmp_path_factory):
    """A run folder whose demonstrations are the dataset's episodes."""
    run = tmp_path_factory.mktemp("imported") / "run"
    cfg = composed()
    cfg.task = {"name": "lab", "spec": theirs.spec().to_dict(), "noop_dims": None, "rate_hz": None}
    cfg.schedule.stages, cfg.demos = [{"name": "collect", "mode": "demo", "episodes": 2}], [str(folder)]
    run.mkdir()
    OmegaConf.save(cfg, run / "config.yaml", resolve=True)
    assert import_demos([str(run)]) == 0
    return run


def test_imported_demonstrations_are_lerobots_rows(theirs, imported):
    first = 0
    for (_, episode), rows in zip(journal_episodes(imported, theirs.spec()), theirs.lengths(), strict=True):
        seen = theirs.batch(list(range(first, first + rows)))
        first += rows
        assert episode.n == rows - 1, "nobody saw what the last action did"
        np.testing.assert_array_equal(episode.arrays["observation.state"], seen.state)
        np.testing.assert_array_equal(episode.arrays["action"], seen.action[:-1, 0])
        for camera, pictures in seen.images.items():
            np.testing.assert_array_equal(episode.arrays[f"observation.images.{camera}"], pictures)
        assert {episode.info.prompt} == set(seen.prompts)


def test_a_reward_classifier_learns_from_imported_demonstrations(theirs, imported, tmp_path):
    """Stages of a process: a dataset of successes says nothing of failures."""
    words = [f"run={imported}", f"out={tmp_path}", "kind=process", "stages=2", "fit.steps=2", "image_size=32"]
    assert train_reward_classifier.main([*words, "fit.batch_size=4"]) == 0
    told = json.loads((tmp_path / "reward.json").read_text())
    figures = told.get("report", told)
    assert figures["episodes"] == {"train": 4, "validation": 1, "test": 1}
    assert np.sum(figures["frame_confusion"]) in theirs.lengths(), "every observation of the episode that tests"


def test_lerobots_viewer_shows_it_offline(folder, theirs, tmp_path, capsys):
    assert visualize_dataset.main([str(folder), "--list"]) == 0
    lengths = [line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]]
    assert lengths == [str(n) for n in theirs.lengths()]
    assert visualize_dataset.main([str(folder), "-e", "1", "--save", str(tmp_path / "e.rrd")]) == 0
    assert (tmp_path / "e.rrd").stat().st_size > 1000


@pytest.mark.parametrize(
    "shape", [s for s in SHAPES if s.name in ("so101", "aloha")], ids=lambda s: s.name, scope="function"
)
def test_a_v21_folder_is_refused_by_every_tool_and_the_command_that_they_name_converts_it(shape, tmp_path, capsys):
    made = make(tmp_path / "made", shape, episodes=6, ticks=6, video_mb=1e-9)
    old, run = as_v21(made, tmp_path / "my old set"), tmp_path / "run"
    said = []
    for tool, words in (
        (train_sft.main, [old, run, *TINY]),
        (preflight.main, ["policy=pi0_tiny", "--dataset", old]),
        (visualize_dataset.main, [old, "--list"]),
    ):
        assert tool([str(word) for word in words]) in (1, 2)
        told = capsys.readouterr()
        said += [line for line in (told.out + told.err).splitlines() if "is in LeRobot's v2.1 format" in line]
    assert len(said) == 3
    assert not run.exists()
    command, then, copied = said[0].partition("convert it: ")[2].partition(", then: ")
    assert bool(then) == bool(shape.parts), "the conversion leaves modality.json behind"
    steps = [shlex.split(step) for step in (command, copied) if step]
    done = subprocess.run([sys.executable, *steps[0][1:]], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    if shape.parts:
        assert train_sft.main([str(old), str(run), *TINY]) == 2
        assert "its conversion to v3 left meta/modality.json behind" in capsys.readouterr().err
        subprocess.run(steps[1], check=True)
    theirs, data = Theirs(old, shape, AH), Dataset(old)
    assert len(theirs) == len(Theirs(made, shape, AH)) == sum(range(6, 12))
    rows = data.rows(data.spec())
    for row in (0, 7, len(theirs) - 1):
        seen = theirs.batch([row])
        np.testing.assert_array_equal(rows.state[row], seen.state[0])
        assert list(rows.spec.cameras) == list(shape.cameras)
        for camera, pictures in rows.images([row]).items():
            np.testing.assert_array_equal(pictures, seen.images[camera])
    assert train_sft.main([str(old), str(run), *TINY]) == 0
