"""tools/export_checkpoint.py on a run folder that trained from a LeRobot checkpoint."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import AH, SIZE, SPEC, loaded_policy, make_tokenizer, observation, random_policy
from export_checkpoint import main
from omegaconf import OmegaConf
from safetensors.torch import load_file

from serl_launcher.agents.base import feature_dim
from serl_launcher.agents.choosing import add_chooser
from serl_launcher.policies.base import sample, trainable
from serl_launcher.run.parameters import base_sha256, publish
from serl_launcher.serving.engine import PolicyEngine
from serl_launcher.serving.query import Query

ROOT = Path(__file__).parents[2]
TOKEN = "serve-3f9a7c21d0"  # of the run; it goes nowhere


@pytest.fixture(scope="module")
def started_from(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    return random_policy("pi0", make_tokenizer(folder / "tokenizer")).save(folder / "pi0")


def write_config(folder, checkpoint, **policy):
    """config.yaml of a run that began at `checkpoint`."""
    size = {"_target_": "serl_launcher.policies.pi0.tiny.TinySize"} | {
        name: getattr(SIZE["pi0"], name) for name in SIZE["pi0"].__slots__
    }
    named = {"_target_": "serl_launcher.policies.pi0.build.build_pi0", "name": "pi0", "init": "checkpoint", "seed": 0}
    named |= {"action_horizon": AH, "checkpoint": str(checkpoint), "size": size, **policy}
    cfg = {"seed": 0, "task": {"spec": SPEC.to_dict()}, "policy": named, "serving": {"openpi_token": TOKEN}}
    OmegaConf.save(OmegaConf.create(cfg), folder / "config.yaml")


@pytest.fixture
def run(started_from, tmp_path):
    """A run whose trainer moved one tensor of the expert."""
    policy = loaded_policy("pi0", started_from, train="expert")
    with torch.no_grad():
        policy.core.action_out_proj.weight.add_(1)
    folder = tmp_path / "run"
    published = {"version": 7, "step": 70, "base": base_sha256(policy), "policy": "pi0", "now": time.time(), "keep": 3}
    publish(folder / "params", trainable(policy), **published)
    write_config(folder, started_from, train="expert")
    return folder


def test_the_folder_holds_what_was_trained_and_the_rest_as_it_was(run, started_from, tmp_path, capsys):
    assert main([str(run), str(tmp_path / "out")]) == 0
    assert "policy version 7" in capsys.readouterr().out
    was, now = (load_file(folder / "model.safetensors") for folder in (started_from, tmp_path / "out"))
    moved = [name for name in was if not torch.equal(was[name], now[name])]
    assert moved == ["model.action_out_proj.weight"]
    torch.testing.assert_close(now[moved[0]], was[moved[0]] + 1)
    assert not [
        path for path in (tmp_path / "out").rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()
    ]


def test_what_an_algorithm_serves_beside_the_flow_stays_behind_and_is_told(run, started_from, tmp_path, capsys):
    served = {"_target_": "serl_launcher.agents.choosing.add_chooser", "horizon": 2, "candidates": 4, "critics": 2}
    cfg = OmegaConf.load(run / "config.yaml")
    cfg.algo = {"name": "best_of_n_pi0", "served": served | {"widths": [8]}}
    OmegaConf.save(cfg, run / "config.yaml")
    policy = loaded_policy("pi0", started_from, train="expert")
    policy = add_chooser(policy, feature_dim(policy, SPEC), 2, 4, 2, (8,))
    published = {"version": 8, "step": 80, "base": base_sha256(policy), "policy": "pi0", "now": time.time(), "keep": 3}
    publish(run / "params", trainable(policy), **published)
    assert main([str(run), str(tmp_path / "out")]) == 0
    assert "the flow alone: no format has a place for what best_of_n_pi0 serves" in capsys.readouterr().out
    was, now = (load_file(folder / "model.safetensors") for folder in (started_from, tmp_path / "out"))
    assert now.keys() == was.keys()


def test_mistakes_are_told_in_one_line(run, tmp_path, capsys):
    assert main([str(tmp_path / "nothing"), str(tmp_path / "out")]) == 2
    assert "not a run folder" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert main([str(run), str(tmp_path / "full")]) == 2
    assert "holds files already" in capsys.readouterr().err


def test_groot_goes_out_in_nvidias_layout_with_its_sidecars(tmp_path):
    pytest.importorskip("diffusers", reason="GR00T's action head needs lerobot[groot]")
    from serl_launcher.policies.groot.build import build_groot
    from serl_launcher.policies.groot.tiny import TinyGrootSize

    size, run = {"image_size": 32}, tmp_path / "run"
    policy = build_groot("g", SPEC, "random", 0, AH, TinyGrootSize(**size), embodiment=1)
    with torch.no_grad():
        policy.core.action_head.vlln.weight.fill_(3)
    published = {"version": 1, "step": 9, "base": base_sha256(policy), "policy": "g", "now": time.time(), "keep": 1}
    publish(run / "params", trainable(policy), **published)
    named = {"_target_": "serl_launcher.policies.groot.build.build_groot", "name": "g", "init": "random", "seed": 0}
    size["_target_"] = "serl_launcher.policies.groot.tiny.TinyGrootSize"
    cfg = {"seed": 0, "task": {"spec": SPEC.to_dict()}, "policy": named | {"action_horizon": AH, "embodiment": 1}}
    cfg["policy"]["size"] = size
    OmegaConf.save(OmegaConf.create(cfg), run / "config.yaml")
    (run / "modality.json").write_text("{}")
    out = tmp_path / "out"
    assert main([str(run), str(out)]) == 0
    want = {"config.json", "model.safetensors", "trainer_state.json", "experiment_cfg", "modality.json"}
    assert want | {"action_head_new_embodiment.safetensors"} <= {path.name for path in out.iterdir()}
    assert load_file(out / "model.safetensors")["action_head.vlln.weight"].unique().tolist() == [3.0]
    assert not [path for path in out.rglob("*") if "optimizer" in path.name]


def test_adapters_are_served_as_published_and_exported_merged(started_from, tmp_path):
    """LoRA from trainer to server to a folder without adapters: one policy all along."""
    pytest.importorskip("peft", reason="LoRA needs peft")
    lora = {"train": "lora", "lora_rank": 4, "attention": "sdpa"}
    policy = loaded_policy("pi0", started_from, **lora)
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in trainable(policy).values():
            tensor.add_(0.05 * torch.randn_like(tensor))
    run = tmp_path / "run"
    published = {"version": 3, "step": 30, "base": base_sha256(policy), "policy": "pi0", "now": time.time(), "keep": 3}
    publish(run / "params", trainable(policy), **published)
    write_config(run, started_from, **lora)

    cfg = OmegaConf.merge(OmegaConf.load(ROOT / "config" / "base.yaml"), OmegaConf.load(run / "config.yaml"))
    cfg.serving.device, cfg.serving.flow_steps = "cpu", 3
    engine = PolicyEngine(cfg, run / "params")
    assert engine.refresh()
    given, noise = observation(), torch.randn(2, AH, 2, generator=torch.Generator().manual_seed(0))
    queries = [
        Query({camera: x[row] for camera, x in given.images.items()}, given.state[row], given.prompts[row])
        for row in range(2)
    ]
    engine._draw = lambda _: noise
    served = np.stack(engine.act(queries))

    assert main([str(run), str(tmp_path / "out")]) == 0
    was, now = (load_file(folder / "model.safetensors") for folder in (started_from, tmp_path / "out"))
    assert was.keys() == now.keys()
    moved = [name for name in was if not torch.equal(was[name], now[name])]
    assert any("q_proj" in name for name in moved)
    assert not [name for name in moved if "norm" in name or "embed" in name]
    with torch.no_grad():
        for merged in (policy.eval(), loaded_policy("pi0", tmp_path / "out", attention="sdpa")):
            chunk = merged.physical_actions(sample(merged, merged.encode(given), noise, steps=3))
            np.testing.assert_allclose(chunk, served, atol=1e-5)
    before = loaded_policy("pi0", started_from)
    with torch.no_grad():
        untouched = before.physical_actions(sample(before, before.encode(given), noise, steps=3))
    assert np.abs(untouched.numpy() - served).max() > 1e-3
