"""Fine-tuning that may be cut anywhere: killed, stopped; held-out episodes, the best version, batches read ahead."""

import json
import logging
import os
import re
import signal
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import train_sft
from accelerate import Accelerator
from omegaconf import OmegaConf
from safetensors.torch import load_file
from sft_samples import TICKS, make_dataset

from serl_launcher.agents.build import build_agent
from serl_launcher.learner import sampling
from serl_launcher.learner.fine_tuning import SftSettings
from serl_launcher.learner.held_out import split
from serl_launcher.learner.learner import Learner
from serl_launcher.learner.overfit import Overfit
from serl_launcher.learner.sampling import ShuffledRows, batches, seed_noise, worker_count
from serl_launcher.policies.base import PolicyInput, sample
from serl_launcher.replay.views import ChunkBatch
from serl_launcher.run.data_record import dataset_digest
from serl_launcher.run.files import read_sealed
from serl_launcher.run.parameters import find_version
from serl_launcher.run.paths import RunPaths
from serl_launcher.run.record import ORIGIN, read_starts

EPISODES = 6
TINY = ["policy=pi0_tiny", "policy.action_horizon=4", "policy.size.image_size=32", "policy.size.depth=1"]
TINY += [f"policy.size.{key}=16" for key in ("width", "vision_width")]
TINY += ["policy.size.vision_layers=1", "policy.size.head_dim=4", "trainer.device=cpu", "telemetry.tensorboard=false"]
SHORT = ["sft.steps=24", "sft.batch_size=4", "sft.log_period=1", "sft.save_period=5", "sft.workers=0"]
SHORT += ["sft.held_out=0.2", "sft.eval_period=8", "sft.eval_samples=6"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "sft", EPISODES)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run in one go."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert train_sft.main([str(data), str(run), *TINY, *SHORT]) == 0
    return run


def rows_of(run):
    """The metrics, without what the clock says."""
    lines = (run / "metrics" / "trainer.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time")} for line in lines]


def started(arguments):
    """The command in a process of its own, forked so that nothing is imported anew; its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    with suppress(BaseException):
        code = train_sft.main([str(a) for a in arguments])
    os._exit(code)


def wait_for(run, step, pid):
    """Until a step is in the metrics, or the process has ended."""
    path = run / "metrics" / "trainer.jsonl"
    until = time.monotonic() + 120
    while time.monotonic() < until:
        if path.is_file() and path.read_bytes().count(b"\n") >= step:
            return
        if os.waitpid(pid, os.WNOHANG) != (0, 0):
            raise AssertionError(f"ended before step {step}")
        time.sleep(0.005)
    raise AssertionError(f"step {step} never came")


def end_at(data, run, step, signum, words):
    """The command, ended by a signal once this step is logged; how it ended."""
    pid = started([data, run, *TINY, *words])
    wait_for(run, step, pid)
    os.kill(pid, signum)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def assert_same_run(run, whole):
    """Metrics, parameters, their average and the optimizer's state are bit-equal; so is the best version."""
    assert rows_of(run) == rows_of(whole)
    last = sorted((whole / "checkpoints").iterdir())[-1].name
    mine, theirs = (load_file(r / "checkpoints" / last / "tensors.safetensors") for r in (run, whole))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    states = [torch.load(r / "checkpoints" / last / "optimizer.pt", weights_only=True) for r in (run, whole)]
    for key, state in states[0]["policy"]["state"].items():
        assert all(torch.equal(value, states[1]["policy"]["state"][key][name]) for name, value in state.items())
    best, other = (load_file(find_version(r, "best")) for r in (run, whole))
    assert all(torch.equal(best[name], other[name]) for name in best)


def test_a_run_that_is_killed_and_stopped_is_the_run_that_was_not(data, whole, tmp_path, capfd):
    run, step = tmp_path / "run", int(np.random.default_rng().integers(2, 9))
    assert end_at(data, run, step, signal.SIGKILL, SHORT) == -signal.SIGKILL, step
    for signum, step in ((signal.SIGTERM, 10), (signal.SIGINT, 16)):
        assert end_at(data, run, step, signum, SHORT) == 128 + signum
        newest = sorted((run / "checkpoints").iterdir())[-1].name
        assert int(newest.removeprefix("step_")) == len(rows_of(run)) >= step
        assert f"stopped at step {len(rows_of(run))}, all of it saved" in capfd.readouterr().err
        assert find_version(run, None).exists()
    assert train_sft.main([str(data), str(run), *TINY, *SHORT]) == 0
    assert_same_run(run, whole)
    starts = read_starts(RunPaths(run))
    assert [row["state"] for row in starts] == ["new", "resumed", "resumed", "resumed"]
    assert {row["dataset"]["digest"] for row in starts} == {dataset_digest(data)}
    assert read_sealed(max((run / "checkpoints").iterdir()) / ORIGIN)["start"]["start"] == 4
    assert [line.rpartition(" · ")[2] for line in (run / "journal.md").read_text().splitlines() if "ended" in line] == [
        "ended: stopped by signal 15", "ended: stopped by signal 2", "ended: complete"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_kills_at_random_steps_with_loader_processes(data, whole, tmp_path):
    """Also shows that the number of loader processes changes nothing."""
    words = [word if word != "sft.workers=0" else "sft.workers=2" for word in SHORT]
    steps = sorted(np.random.default_rng().integers(1, 23, 10).tolist())
    for step in steps:
        assert end_at(data, tmp_path / "run", step, signal.SIGKILL, words) == -signal.SIGKILL, steps
    assert train_sft.main([str(data), str(tmp_path / "run"), *TINY, *words]) == 0
    assert_same_run(tmp_path / "run", whole)


def test_a_finished_run_is_finished_and_another_commands_folder_is_refused(data, whole, tmp_path, capsys):
    before = rows_of(whole)
    assert train_sft.main([str(data), str(whole), *TINY, *SHORT, "sft.log_period=2"]) == 0
    assert rows_of(whole) == before
    theirs, ours = OmegaConf.load(whole / "config.yaml"), OmegaConf.load(whole / "config.yaml")
    ours.sft.lr, ours.sft.workers = 1e-3, 3
    with pytest.raises(ValueError, match=r"was begun with sft\.lr=0\.0005, now it is 0\.001"):
        train_sft.claim(whole, ours, None)
    train_sft.claim(whole, theirs, None)
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"holds files already, and no config\.yaml of a run"):
        train_sft.claim(tmp_path, ours, None)


def test_resume_takes_another_runs_checkpoint_or_refuses_and_the_best_ones_is_kept(
    data, whole, tmp_path, capsys, caplog
):
    assert train_sft.main([str(data), str(whole), *TINY, *SHORT, "resume=never"]) == 2
    assert "holds a run and resume=never" in capsys.readouterr().err
    kept = [int(folder.name.removeprefix("step_")) for folder in sorted((whole / "checkpoints").iterdir())]
    best = read_sealed(whole / "best" / "best.json")["step"]
    assert kept == sorted({20, 24, max(step for step in (5, 10, 15, 20, 24) if step <= best)})

    other, run = whole / "checkpoints" / "step_000020", tmp_path / "run"
    words = [word.replace("sft.eval_samples=6", "sft.eval_samples=5") for word in SHORT]
    assert train_sft.main([str(data), str(run), *TINY, *words, f"resume={other}"]) == 0
    assert f"note: {whole} was trained with sft.eval_samples=6, {run} is with 5" in capsys.readouterr().out
    measured = ("held_out/", "version", "policy/")
    mine, theirs = ([{k: v for k, v in row.items() if not k.startswith(measured)} for row in rows_of(r)[-4:]]
                    for r in (run, whole))  # fmt: skip
    assert mine == theirs
    assert len(rows_of(run)) == 4
    ours, whole_ones = (load_file(r / "checkpoints" / "step_000024" / "tensors.safetensors") for r in (run, whole))
    assert all(torch.equal(ours[name], whole_ones[name]) for name in whole_ones)

    assert train_sft.main([str(data), str(run), *TINY, *words, f"resume={tmp_path}"]) == 2
    assert "expected auto, never or the folder of a checkpoint" in capsys.readouterr().err
    more = [word.replace("batch_size=4", "batch_size=5") for word in SHORT]
    train_sft.build(str(data), tmp_path / "larger", train_sft.configured([*TINY, *more, f"resume={other}"]))
    assert "step_000020: samples of a step were 4 then, are 5 now" in caplog.text
    (changed := tmp_path / "data").mkdir()
    with pytest.raises(ValueError, match=r"was begun with a dataset of digest \w+, .* is now one of"):
        train_sft.check_same_data(RunPaths(run), changed)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("steps", 0, "a whole number of at least 1, got 0"),
        ("accumulate", 1.5, "a whole number of at least 1, got 1.5"),
        ("lr", -1, "a number of at least 0, got -1"),
        ("warmup", 50, "a number of at least 0 below 1, got 50"),
        ("held_out", 1, "a number of at least 0 below 1, got 1"),
        ("workers", "many", "a whole number of at least 0, or auto, got 'many'"),
        ("max_samples", 0, "a whole number of at least 1, or null, got 0"),
    ],
)
def test_a_setting_out_of_range_is_named(whole, key, value, told):
    given = OmegaConf.to_container(OmegaConf.load(whole / "config.yaml").sft)
    with pytest.raises(ValueError, match=re.escape(f"sft.{key}: expected {told}")):
        SftSettings(**given | {key: value})


def test_held_out_episodes_are_measured_and_named(data, whole):
    """One episode of six: what it says of loss and error is the whole figure."""
    (episode,) = split(EPISODES, 0.2, 0)
    measured = [row for row in rows_of(whole) if "held_out/loss" in row]
    assert [row["step"] for row in measured] == [8, 16, 24]
    for row in measured:
        assert row["held_out/loss"] == row[f"held_out/loss_episode_{episode}"]
        assert row["held_out/open_loop_mse"] == row[f"held_out/open_loop_mse_episode_{episode}"] > 0
    best = json.loads((whole / "best" / "best.json").read_text())
    assert best["loss"] == min(row["held_out/loss"] for row in measured)


def test_held_out_error_is_of_the_ticks_and_flow_steps_of_the_config(whole, data):
    """By hand, on one batch: the first `rollout.execute_horizon` ticks, `serving.flow_steps`, the model's units."""
    cfg = OmegaConf.load(whole / "config.yaml")
    cfg.rollout.execute_horizon, cfg.serving.flow_steps, cfg.sft.batch_size, cfg.sft.eval_samples = 2, 3, 5, 5
    policy, chunks, _ = train_sft.opened(data, cfg)
    held_out, overfit = train_sft.measuring(cfg, policy, chunks, {0: np.arange(TICKS)})
    assert overfit is None
    agent = build_agent(cfg, policy, chunks.spec)
    options = {"max_grad_norm": 1.0, "ema_decay": 0.9}
    learner = Learner(agent, partial(torch.optim.SGD, lr=0.1), Accelerator(cpu=True), **options)
    batch = chunks.collate([chunks[row] for row in held_out.rows[0]])
    seed_noise(0, 0)
    with torch.no_grad():
        loss = sum(agent(batch, 0)[0].values())
        noise = torch.randn(5, policy.action_horizon, policy.action_dim)
        prefix = policy.encode(PolicyInput(batch.images, batch.state, batch.prompts))
        chosen = policy.physical_actions(sample(policy, prefix, noise, 3))[:, :2]
    wrong = (chosen - torch.tensor(batch.action[:, :2])) / policy.action_units.scale
    keep = ~torch.tensor(batch.is_pad[:, :2])
    by_sample = [wrong[k][keep[k]].square().mean() for k in range(5)]
    measured = held_out.measure(learner)
    assert measured["held_out/loss"] == pytest.approx(float(loss), rel=1e-5)
    assert measured["held_out/open_loop_mse"] == pytest.approx(float(torch.stack(by_sample).mean()), rel=1e-5)


def test_an_overfit_check_that_is_not_passed_ends_with_1_and_says_how_far_it_is(data, tmp_path, capsys):
    words = [*TINY, *SHORT, "sft.overfit=1", "sft.steps=4"]
    assert train_sft.main([str(data), str(tmp_path / "run"), *words]) == 1
    said = capsys.readouterr()
    assert "overfit check: the first 1 of 6 episodes train and are measured" in said.out
    assert "train_sft: overfit check NOT passed at step 4: open-loop error " in said.err
    assert "at most 10% is asked" in said.err
    assert train_sft.main([str(data), str(tmp_path / "run"), *words]) == 1, "nor is it when asked again"
    assert "NOT passed at step 4" in capsys.readouterr().err
    for key, told in (
        ("overfit=9", "at most the dataset's 6 episodes, got 9"),
        ("max_samples=8", "no sft.max_samples"),
    ):
        assert train_sft.main([str(data), str(tmp_path / "new"), *words, f"sft.{key}"]) == 2
        assert told in capsys.readouterr().err


def test_a_check_against_episodes_in_which_nothing_moves_is_refused():
    with pytest.raises(ValueError, match="to hold still makes no error in these episodes"):
        Overfit({"hold still": 0.0, "repeat the last action": 0.1})
    check = Overfit({"hold still": 0.2, "repeat the last action": 0.1})
    for error, passed in ((0.011, False), (0.01, True), (0.02, False)):
        check.judge(7, error)
        assert check.passed == passed
    assert "NOT passed at step 7: open-loop error 0.02, 20% of the better baseline's (hold still 0.2, " in str(check)


def test_the_split_is_seeded_and_leaves_something_to_train():
    assert split(20, 0.1, 3) == split(20, 0.1, 3) != split(20, 0.1, 4)
    assert [len(split(n, 0.1, 0)) for n in (1, 4, 10, 25)] == [0, 0, 1, 2]
    assert len(split(2, 0.9, 0)) == 1


def test_each_epoch_has_every_sample_once_in_an_order_of_its_own():
    rows = np.arange(100, 110)
    found = list(ShuffledRows(rows, 5, 0, 0, 6))
    epochs = [found[k] + found[k + 1] for k in (0, 2, 4)]
    assert all(sorted(epoch) == rows.tolist() for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert list(ShuffledRows(rows, 5, 0, 3, 6)) == found[3:]
    assert list(ShuffledRows(rows, 5, 1, 0, 6)) != found


def test_max_samples_takes_the_first_ones_that_train(data, whole, capsys):
    config = OmegaConf.load(whole / "config.yaml")
    settings = SftSettings(**{**config.sft, "max_samples": 25, "held_out": 0.5})
    _, chunks, _ = train_sft.opened(data, config)
    rows, held_out = train_sft.sorted_rows(chunks, settings, 0)
    assert list(held_out) == split(EPISODES, 0.5, 0)
    training = [row for e in range(EPISODES) if e not in held_out for row in range(TICKS * e, TICKS * (e + 1))]
    assert rows.tolist() == training[:25]
    assert "25 samples of 3 episodes\nheld out: episodes " in capsys.readouterr().out


class Sleepers:
    """A dataset whose rows take a while, and one that cannot be read."""

    def __init__(self, bad=None):
        self.bad = bad

    def __getitem__(self, row):
        if row == self.bad:
            raise ValueError("episode 3, frame 7: cannot be decoded")
        if self.bad == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return row

    def collate(self, rows):
        return rows


def test_what_a_loader_process_cannot_read_or_does_not_survive_is_told():
    order = ShuffledRows(np.arange(8), 4, 0, 0, 2)
    with pytest.raises(ValueError, match="episode 3, frame 7"):
        list(batches(Sleepers(bad=5), order, 1))
    with pytest.raises(OSError, match=r"was killed.*sft\.workers=0"):
        list(batches(Sleepers(bad="kill"), order, 1))
    assert list(batches(Sleepers(), order, 2)) == list(order)
    assert worker_count(3) == 3
    assert 0 <= worker_count("auto") < os.cpu_count()


class Pictured(Sleepers):
    """Batches with a picture for each row, of the row's brightness, 50 kB each."""

    def collate(self, rows):
        pictures = np.stack([np.full((128, 128, 3), row, np.uint8) for row in rows])
        numbers, flags = np.array(rows, np.float32)[:, None], np.zeros(len(rows), bool)
        return ChunkBatch({"front": pictures}, numbers, numbers, flags, flags, flags, numbers[:, 0], ["go"] * len(rows))


@pytest.mark.parametrize("free", [1 << 40, 1 << 20])
def test_pictures_come_in_shared_memory_and_where_that_is_short_by_pipe_which_is_said(free, monkeypatch, capfd):
    monkeypatch.setattr(sampling.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    monkeypatch.setattr(sampling.log, "handlers", [logging.StreamHandler()])
    order = ShuffledRows(np.arange(16), 4, 0, 0, 6)
    found = list(batches(Pictured(), order, 2))
    for batch, expected in zip(found, batches(Pictured(), order, 0), strict=True):
        np.testing.assert_array_equal(batch.images["front"], expected.images["front"])
        np.testing.assert_array_equal(batch.state, expected.state)
        assert isinstance(batch.images["front"].base, torch.Tensor) == (free > 1 << 30)
    said = capfd.readouterr().err
    assert ("/dev/shm has less than 3 MB free: pictures go through pipes" in said) == (free < 1 << 30)


class Wide(Sleepers):
    """Rows that do not fit into a pipe."""

    def __getitem__(self, row):
        return np.zeros(1 << 20, np.uint8)


def test_loader_processes_end_with_a_trainer_that_is_killed():
    pid = os.fork()
    if not pid:
        for _ in batches(Wide(), ShuffledRows(np.arange(64), 4, 0, 0, 16), 2):
            time.sleep(60)
        os._exit(0)
    children, until = Path(f"/proc/{pid}/task/{pid}/children"), time.monotonic() + 30
    while len(workers := children.read_text().split()) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.5)  # until they wait for room
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert len(workers) == 2
    while alive := [w for w in workers if Path(f"/proc/{w}").exists() and _state(w) != "Z"]:
        assert time.monotonic() < until, alive
        time.sleep(0.01)


def _state(pid):
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return "Z"
