"""`checkpoint_path`: parameters go on in the units and with the cameras that they were trained with."""

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import make_tokenizer, random_policy
from omegaconf import OmegaConf, open_dict
from tiny import SPEC, tiny_config

from serl_launcher.agents.build import build_policy
from serl_launcher.learner.wiring import build_learner
from serl_launcher.policies.base import trainable
from serl_launcher.run.origin import settle_policy
from serl_launcher.run.parameters import base_sha256, find_parameters, publish, read_tensors
from serl_launcher.serving.engine import PolicyEngine
from serl_launcher.serving.query import Query
from serl_transport.contract.specs import TaskSpec

WIDE = {"state_low": [-9] * 3, "state_high": [9] * 3, "action_low": [-5, -4], "action_high": [5, 4]}
DATA = SPEC.to_dict() | {
    "name": "dataset",
    "cameras": {"wrist": [32, 32], "front": [32, 32]},
}


def fine_tuned(folder: Path, spec: dict = DATA, **policy: object) -> Path:
    """A run folder as fine-tuning leaves it, its task described by the dataset."""
    cfg = tiny_config()
    cfg.task.spec = spec
    with open_dict(cfg):
        cfg.policy.update(policy)
    built = build_policy(cfg, TaskSpec.from_dict(spec))
    told = dict(version=1, step=5, base=base_sha256(built), policy="t", now=0.0, keep=1)
    publish(folder / "params", {name: p.detach() for name, p in trainable(built).items()}, **told)
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    return folder


def online(run: Path, spec: dict, **changes: object):
    """The config of an online start of another task from that run."""
    cfg = tiny_config(learner=True, checkpoint_path=str(run), **changes)
    cfg.task.spec = spec
    settle_policy(cfg, ["policy"])
    return cfg


def engine_of(cfg, run: Path) -> PolicyEngine:
    path = find_parameters(run)
    engine = PolicyEngine(cfg, path.parent)
    engine.stage_file(path, 1)
    assert engine.swap()
    return engine


def answer(engine: PolicyEngine) -> np.ndarray:
    rng = np.random.default_rng(0)
    images = {camera: rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for camera in ("front", "wrist")}
    chunk = engine.act([Query(images, np.array([0.3, -0.2, 1.5], np.float32), SPEC.prompt, seed=1)])[0]
    return np.clip(chunk, SPEC.action_low, SPEC.action_high)  # a task with wider limits clips less


def test_an_online_start_acts_as_the_fine_tuned_policy_does(tmp_path):
    """Same observation, same noise: equal actions, though the task's ranges are others and its cameras in another
    order; a run that began like this hands the units on."""
    run = fine_tuned(tmp_path / "sft")
    cfg = online(run, SPEC.to_dict() | WIDE)
    assert list(cfg.policy.trained_on.cameras) == ["wrist", "front"]
    expected = answer(engine_of(OmegaConf.load(run / "config.yaml"), run))
    np.testing.assert_allclose(answer(engine_of(cfg, run)), expected, rtol=1e-6)
    learner = build_learner(cfg, policy := build_policy(cfg, TaskSpec.from_dict(cfg.task.spec)), SPEC)
    learner.start_from(read_tensors(find_parameters(run))[0])
    told = dict(version=1, step=6, base=base_sha256(policy), policy="t", now=0.0, keep=1)
    publish(tmp_path / "second" / "params", learner.averaged, **told)
    OmegaConf.save(cfg, tmp_path / "second" / "config.yaml", resolve=True)
    narrow = {"action_low": [-3, -3], "action_high": [3, 3]}
    third = online(tmp_path / "second", SPEC.to_dict() | WIDE | narrow)
    assert third.policy.trained_on == cfg.policy.trained_on
    np.testing.assert_allclose(answer(engine_of(third, tmp_path / "second")), expected, rtol=1e-6)
    back = online(tmp_path / "second", DATA)
    assert "trained_on" not in back.policy


def test_an_evaluation_takes_them_too_and_the_same_task_needs_nothing(tmp_path):
    run = fine_tuned(tmp_path / "sft")
    cfg = tiny_config(learner=True, checkpoint_path=str(run))
    cfg.task.spec, cfg.schedule.stages = SPEC.to_dict() | WIDE, [{"name": "eval", "mode": "eval", "episodes": 3}]
    settle_policy(cfg, [])
    expected = answer(engine_of(OmegaConf.load(run / "config.yaml"), run))
    np.testing.assert_allclose(answer(engine_of(cfg, run)), expected, rtol=1e-6)
    assert "trained_on" not in online(run, DATA).policy


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"state_names": ["b", "a", "c"]}, "state: the task's dims are ['b', 'a', 'c'], the run of checkpoint_path="),
        ({"action_names": ["x"], "action_low": [-1], "action_high": [1]}, "action: the task's dims are ['x']"),
        ({"cameras": {"top": [32, 32], "wrist": [32, 32]}}, "map the task's on them with +policy.cameras="),
    ],
)
def test_dims_and_cameras_of_another_task_are_refused(tmp_path, changes, told):
    run = fine_tuned(tmp_path / "sft")
    with pytest.raises(ValueError, match=r"its parameters fit only that|had") as raised:
        online(run, SPEC.to_dict() | changes)
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)


def test_cameras_of_other_names_are_mapped_and_dims_of_other_names_said(tmp_path, caplog):
    run = fine_tuned(tmp_path / "sft")
    spec = SPEC.to_dict() | {"cameras": {"top": [32, 32], "wrist": [32, 32]}, "action_names": ["dx", "grip"]}
    cfg = online(run, spec, policy__cameras={"top": "front"})
    assert list(cfg.policy.trained_on.cameras) == ["wrist", "top"]
    assert "action: the task calls its dims ['dx', 'grip']" in caplog.text
    assert build_policy(cfg, TaskSpec.from_dict(spec)).cameras == ("wrist", "top")


def test_an_exported_folder_is_the_checkpoint_that_the_policy_begins_at(tmp_path):
    exported = random_policy("pi0", make_tokenizer(tmp_path / "tokenizer")).save(tmp_path / "pi0")
    cfg = online(exported, SPEC.to_dict())
    assert (cfg.policy.init, cfg.policy.checkpoint, cfg.checkpoint_path) == ("checkpoint", str(exported), None)
    with pytest.raises(ValueError, match=r"policy\.checkpoint=/elsewhere: which one"):
        online(exported, SPEC.to_dict(), policy__checkpoint="/elsewhere")
    local = tiny_config(actor=True, ip=None, rollout__policy="local", checkpoint_path=str(exported))
    with pytest.raises(ValueError, match="a learner serves an exported folder"):
        settle_policy(local, [])
    assert json.loads((exported / "config.json").read_text())["type"] == "pi0"
