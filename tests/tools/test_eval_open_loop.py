"""tools/eval_open_loop.py judges what the run published, and nothing else."""

import json

import eval_open_loop
import pytest
from omegaconf import OmegaConf
from sft_samples import EPISODES, TICKS, make_dataset
from tiny import tiny_config, tiny_policy

from serl_launcher.policies.base import trainable
from serl_launcher.run.parameters import base_sha256, publish


def publish_tiny(run, left_out=()):
    policy = tiny_policy()
    tensors = {name: p.detach() for name, p in trainable(policy).items() if name not in left_out}
    published = dict(version=3, step=0, base=base_sha256(policy), policy="t", now=0.0, keep=1)
    publish(run / "params", tensors, **published)
    OmegaConf.save(tiny_config(rollout__execute_horizon=2), run / "config.yaml", resolve=True)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "d")


def test_figures_table_and_pictures_of_a_run(dataset, tmp_path, capsys):
    publish_tiny(tmp_path)
    assert eval_open_loop.main([str(tmp_path), "--dataset", str(dataset), "--episodes", "0", "-1"]) == 0
    told = json.loads((tmp_path / "open_loop" / "open_loop.json").read_text())
    assert (told["policy_version"], told["stride"], told["episodes"], told["ticks"]) == (3, 2, 2, 2 * TICKS)
    pictures = {path.name for path in (tmp_path / "open_loop").glob("*.png")}
    assert pictures == {"errors.png", "episode_0000.png", f"episode_{EPISODES - 1:04d}.png"}
    out = capsys.readouterr().out
    assert "2 episodes, 40 ticks, policy version 3" in out
    assert "share of the better one" in out


def test_parameters_that_do_not_fit_and_an_episode_that_is_none_are_refused(dataset, tmp_path, capsys):
    publish_tiny(tmp_path, left_out=("core.action_out_proj.bias",))
    assert eval_open_loop.main([str(tmp_path), "--dataset", str(dataset)]) == 2
    assert "missing core.action_out_proj.bias" in capsys.readouterr().err
    publish_tiny(tmp_path)
    assert eval_open_loop.main([str(tmp_path), "--dataset", str(dataset), "--episodes", "9"]) == 2
    assert "there is no episode 9" in capsys.readouterr().err
