"""tools/preflight.py: counts against the real model, the batch that fits, and what is wrong with a dataset."""

import pytest
import torch
from omegaconf import OmegaConf
from preflight import main, replay_ring
from sft_samples import make_dataset

from serl_launcher.policies.base import trainable
from serl_launcher.policies.estimate import estimate, meta_policy
from serl_launcher.policies.groot.build import build_groot
from serl_launcher.policies.groot.full import FullGrootSize
from serl_launcher.policies.groot.tiny import TinyGrootSize
from serl_launcher.policies.pi0.build import build_pi0
from serl_launcher.policies.pi0.tiny import TinySize
from serl_transport.contract.specs import TaskSpec

GROOT = "serl_launcher.policies.groot.build.build_groot"
SPEC = {
    "name": "t",
    "prompt": "pick up the red cube",
    "cameras": {"front": [32, 32], "wrist": [32, 32]},
    "state_names": ["a", "b", "c"],
    "state_low": [-1] * 3,
    "state_high": [1] * 3,
    "action_names": ["x", "g"],
    "action_low": [-1] * 2,
    "action_high": [1] * 2,
    "control_hz": 10,
    "max_ticks": 60,
}


def on_meta(spec, train):
    size = TinySize(width=16, vision_width=16, image_size=32)
    policy = build_pi0("t", spec, "random", 0, 4, size, attention="sdpa", train=train)
    return policy, policy.to("meta")


def test_expert_only_costs_less_and_parameters_are_counted_exactly():
    spec = TaskSpec.from_dict(SPEC)
    costs = {}
    for train in ("full", "expert"):
        policy, meta = on_meta(spec, train)
        costs[train] = estimate(meta, spec, 10, batch=2, noise_samples=1, questions=1)
        assert costs[train].trainable == sum(p.numel() for p in trainable(policy).values())
        total = sum(p.numel() for p in policy.parameters())
        assert costs[train].trainable + costs[train].frozen == total
        assert costs[train].weights == 4 * total
        assert costs[train].optimizer == 12 * costs[train].trainable
    assert costs["expert"].train_flops < 0.6 * costs["full"].train_flops
    assert costs["expert"].sample < costs["full"].sample
    # Ten velocity steps read one prefix: less than ten whole passes.
    assert costs["full"].serve_flops < costs["full"].train_flops * 10


def test_checkpointed_layers_are_counted_in_bf16():
    """They are computed again by the rules that they were computed by."""
    spec, size, costs = TaskSpec.from_dict(SPEC), TinySize(width=16, vision_width=16, image_size=32), []
    config = dict(_target_="serl_launcher.policies.pi0.build.build_pi0", action_horizon=4, precision="bfloat16")
    for checkpointing in (False, True):
        policy, _ = meta_policy(config | {"checkpointing": checkpointing}, spec, size)
        costs.append(estimate(policy, spec, 10, batch=8, noise_samples=1, questions=1))
    plain, checkpointed = costs
    assert plain.train_flops < checkpointed.train_flops < 1.4 * plain.train_flops  # at most one more forward pass


def test_each_of_the_chunks_that_are_chosen_among_costs_memory():
    """Keys and values of the prefix are held once for each."""
    spec = TaskSpec.from_dict(SPEC)
    one, many = (
        estimate(on_meta(spec, "expert")[1], spec, 4, batch=2, noise_samples=1, questions=1, candidates=n)
        for n in (1, 16)
    )
    tokens, layers = len(spec.cameras) * 4, 2  # of the prefix, at the least
    assert many.answer - one.answer > 15 * tokens * layers * 2 * 8 * 4
    assert many.serve_flops > 1.5 * one.serve_flops
    assert many.training == one.training


def test_a_batch_that_does_not_fit_is_told(capsys):
    assert main(["policy=pi0_tiny", "--gpu-gb", "1", "--tflops", "1"]) == 0
    out = capsys.readouterr().out
    assert "batch      24 samples a step" in out
    assert "does NOT fit" not in out
    assert main(["policy=pi0_tiny", "--gpu-gb", "0.02"]) == 1
    assert "does NOT fit" in capsys.readouterr().out


def test_mistakes_are_told_in_one_line(capsys):
    assert main(["policy=pi0", "policy.checkpoint=/nowhere/at/all"]) == 2
    assert capsys.readouterr().err.startswith("preflight: policy.checkpoint=/nowhere/at/all: no such folder")
    assert main(["policy=pi0_tiny", "policy._target_=serl_launcher.policies.other.build_other"]) == 2
    assert "policy._target_=serl_launcher.policies.other.build_other: No module named" in capsys.readouterr().err
    assert main(["policy=pi0_tiny", "policy._target_=serl_launcher.agents.build.build_policy"]) == 2
    assert "serl_launcher.agents.build has no meta_policy(cfg, spec, size)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "told"),
    [("trainer.batch_size=abc", "trainer.batch_size"), ("trainer.batchsize=8", "did you mean 'trainer.batch_size'")],
)
def test_a_word_that_is_wrong_is_told_as_for_a_run(capsys, word, told):
    assert main(["policy=pi0_tiny", word]) == 2
    said = capsys.readouterr().err
    assert said.startswith("preflight: ")
    assert told in said


@pytest.mark.slow
def test_the_released_groot_is_counted_without_memory(capsys):
    """407M vision tower, 1117M language model, 1621M action head; the language head is not held."""
    size = FullGrootSize()
    spec = TaskSpec.from_dict(SPEC)
    with torch.device("meta"):
        core = size.build(size.config_fields(spec, 40))
    counts = [sum(p.numel() for p in part.parameters()) for part in (core.backbone, core.action_head)]
    assert counts == [406_957_056 + 1_116_542_976, 1_620_515_968]
    machine = ["--gpu-gb", "24", "--tflops", "800"]
    tune = ["policy.tune.llm=true", "policy.tune.visual=true"]
    assert main(["policy=groot_n1_7", *machine, *tune, "trainer.batch_size=32"]) == 1
    out = capsys.readouterr().out
    assert "3,144,013,952" in out.split("total")[1]
    assert "(4 flow steps)" in out
    assert "does NOT fit" in out


def test_the_tiny_groot_costs_what_it_is():
    spec = TaskSpec.from_dict(SPEC)
    flops = {}
    for llm in (False, True):
        tune = {"llm": llm, "visual": llm}
        policy, mode = meta_policy(
            {"_target_": GROOT, "tune": tune, "action_horizon": 4}, spec, TinyGrootSize(image_size=32)
        )
        real = build_groot("g", spec, "random", 0, 4, TinyGrootSize(image_size=32), tune=tune)
        cost = estimate(policy, spec, 4, batch=2, noise_samples=1, questions=1)
        assert cost.trainable == sum(p.numel() for p in trainable(real).values())
        assert mode == "MIN_MAX"
        flops[llm] = cost.train_flops
    assert flops[False] < 0.8 * flops[True]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "d")


def test_the_data_are_checked_and_told(dataset, capsys):
    """The default task is another than the dataset's: each difference is named, and the exit code says so."""
    assert main(["policy=pi0_tiny", "--dataset", str(dataset)]) == 1
    out = capsys.readouterr().out
    assert "camera 'front': pictures are resized from 32×32 to 64×64" in out
    assert "action: 2 dims ['x', 'g'], the task has 4" in out
    assert main(["policy=pi0_tiny", "--dataset", str(dataset / "nowhere")]) == 1
    assert "no such folder" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("capacity", "said"),
    [
        (1000, "replay     on this machine: 1000 frames, "),
        (200_000, "(replay.memory_share=0.01), the pictures of the other"),
        (10**10, "replay     does NOT fit on this machine: the replay ring needs"),
    ],
)
def test_where_the_replay_ring_would_lie_is_said(tmp_path, capacity, said):
    spec = TaskSpec.from_dict(SPEC | {"cameras": {"a": [224, 224]}})
    replay = {"capacity_frames": capacity, "memory_share": 0.01}
    assert said in replay_ring(OmegaConf.create({"runs_dir": str(tmp_path / "runs"), "replay": replay}), spec)
