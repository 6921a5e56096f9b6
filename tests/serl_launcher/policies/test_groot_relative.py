"""Relative actions of GR00T N1.7 beside LeRobot's: loss, gradient and chunk, both layouts, a new embodiment."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import lerobot_batch as float_batch
from test_groot_lerobot import make_processor

from serl_launcher.agents.flow_matching import imitation_loss
from serl_launcher.policies.base import PolicyInput, sample
from serl_launcher.policies.checkpoint import CheckpointError
from serl_launcher.policies.groot.build import build_groot
from serl_launcher.policies.groot.inputs import Geometry
from serl_launcher.policies.groot.saving import save_groot
from serl_launcher.policies.groot.tiny import TinyGrootSize
from serl_launcher.replay.views import ChunkBatch
from serl_transport.contract.specs import TaskSpec

B, AH, VALID, WIDE = 2, 4, 3, 5
SPEC = TaskSpec.from_dict(
    {
        "name": "t",
        "prompt": "pick up the red cube",
        "cameras": {"front": [48, 64], "wrist": [48, 64]},
        "state_names": ["base", "j1", "j2", "grip"],
        "state_low": [-1] * 4,
        "state_high": [1] * 4,
        "action_names": ["grip", "j1", "j2"],
        "action_low": [-1, -1.2, -1.2],
        "action_high": [1, 1.2, 1.2],
        "control_hz": 10,
        "max_ticks": 60,
    }
)
LOW = [[0, 0, -0.1], [0, -0.2, -0.2], [0, -0.4, -0.3]]  # at the first tick j1 never moved
HIGH = [[0, 0, 0.1], [0, 0.3, 0.2], [0, 0.4, 0.5]]
RELATIVE = {"exclude": ["grip"], "low": LOW, "high": HIGH}


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return make_processor(tmp_path_factory.mktemp("processor") / "qwen")


@pytest.fixture(scope="module")
def size(processor):
    from transformers import AutoTokenizer

    vocabulary = len(AutoTokenizer.from_pretrained(processor))
    return TinyGrootSize(image_size=64, max_state_dim=6, max_action_dim=WIDE, vocabulary=vocabulary)


@pytest.fixture(scope="module")
def base(processor, size, tmp_path_factory):
    """NVIDIA's layout: two parts of three action dims relative, by other places than their own, by tick."""
    policy = build_groot("t", SPEC, "random", 0, AH, size, embodiment=2, processor=str(processor), relative=RELATIVE)
    policy.valid_horizon, policy.clip = VALID, True
    policy.inputs.geometry = Geometry(target=(64, 64), crop=(60, 60))
    return save_groot(policy, tmp_path_factory.mktemp("base") / "n1_7")


@pytest.fixture(scope="module")
def theirs(base, processor, tmp_path_factory):
    """(policy, preprocessor, postprocessor, folder that LeRobot saved), made by LeRobot from our folder."""
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.groot.configuration_groot import GrootConfig
    from lerobot.policies.groot.modeling_groot import GrootPolicy
    from lerobot.policies.groot.processor_groot import make_groot_pre_post_processors

    images = {f"observation.images.{c}": PolicyFeature(FeatureType.VISUAL, (3, 48, 64)) for c in SPEC.cameras}
    config = GrootConfig(
        base_model_path=str(base),
        input_features={**images, "observation.state": PolicyFeature(FeatureType.STATE, (4,))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (3,))},
        chunk_size=AH,
        n_action_steps=AH,
        max_state_dim=6,
        max_action_dim=WIDE,
        device="cpu",
        use_bf16=False,
        use_relative_actions=True,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(base)
        policy = GrootPolicy(config).eval()
    before, after = make_groot_pre_post_processors(config)
    for step in before.steps:
        if hasattr(step, "model_name"):
            step.model_name = str(processor)
    folder = tmp_path_factory.mktemp("lerobot") / "saved"
    for part in (policy, before, after):
        part.save_pretrained(folder)
    return policy, before, after, folder


def load(folder, size, **options):
    return build_groot("t", SPEC, "checkpoint", 0, None, size, checkpoint=str(folder), **options)


def observe(seed=0):
    rng = np.random.default_rng(seed)
    images = {c: rng.integers(0, 256, (B, 48, 64, 3), dtype=np.uint8) for c in SPEC.cameras}
    return PolicyInput(images, rng.uniform(-1.2, 1.2, (B, 4)).astype(np.float32), ["Pick up the red cube!"] * B)


def lerobot_batch(given):
    return float_batch(given) | {
        f"observation.images.{c}": torch.as_tensor(x).permute(0, 3, 1, 2) for c, x in given.images.items()
    }


def our_chunk(policy, given, noise):
    with torch.no_grad():
        prefix = policy.encode(given)
        return policy.physical_actions(sample(policy.eval(), prefix, noise, 4), prefix.anchor)


@pytest.mark.parametrize("kind", ["lerobot", "nvidia"])
def test_the_chunk_equals_lerobots_in_both_layouts(kind, theirs, base, size, monkeypatch):
    policy, given = load(theirs[3] if kind == "lerobot" else base, size), observe()
    assert (policy.anchors, policy.valid_horizon) == ((None, 1, 2), VALID)
    noise = torch.randn(B, AH, WIDE, generator=torch.Generator().manual_seed(0))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda *a, **k: noise.clone())
        want = theirs[2](theirs[0].predict_action_chunk(theirs[1](lerobot_batch(given))))
    low, high = torch.tensor(SPEC.action_low), torch.tensor(SPEC.action_high)
    got = our_chunk(policy, given, noise)
    torch.testing.assert_close(got, want[:, :VALID].clamp(low, high), atol=1e-5, rtol=1e-4)
    # Where the statistics have one value, so has the answer: the state itself.
    np.testing.assert_allclose(got[:, 0, 1], given.state[:, 1].clip(-1.2, 1.2), atol=1e-6)


def test_loss_and_gradients_equal_lerobots_training_forward(theirs, size, monkeypatch):
    """LeRobot's preprocessor and `forward` on absolute actions, beside our loss on the same batch."""
    given, rng = observe(1), np.random.default_rng(2)
    action = rng.uniform(-0.5, 0.5, (B, AH, 3)).astype(np.float32)
    action[..., 1:] += given.state[:, None, 1:3]
    noise, t = torch.randn(B, AH, WIDE, generator=torch.Generator().manual_seed(3)), torch.tensor([0.3, 0.8])
    policy, before, _, folder = theirs
    batch = before(lerobot_batch(given) | {"action": torch.tensor(action[:, :VALID])})
    policy.zero_grad()
    policy._groot_model.requires_grad_(True)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda *a, **k: noise)
        patch.setattr(policy._groot_model.action_head, "sample_time", lambda *a, **k: t)
        want, _ = policy.forward(batch)
    want.backward()
    ours = load(folder, size, train="full")
    ours.tune(llm=True, visual=True, projector=True, diffusion_model=True, vlln=True)
    monkeypatch.setattr("serl_launcher.agents.shares.normal", lambda shape, device: noise)
    monkeypatch.setattr("serl_launcher.agents.shares.times", lambda n, device: t)
    ones, pad = np.ones(B, np.float32), np.zeros((B, AH), bool)
    got, _ = imitation_loss(
        ours, ChunkBatch(given.images, given.state, action, pad, ones > 0, ones > 1, ones, given.prompts), 1
    )
    got.backward()
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    theirs_by_name = {f"core.{name.removeprefix('_groot_model.')}": p.grad for name, p in policy.named_parameters()}
    compared = 0
    for name, p in ours.named_parameters():
        mine, other = (torch.zeros_like(p) if g is None else g for g in (p.grad, theirs_by_name[name]))
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-3, msg=name)
        compared += int(mine.abs().sum() > 0)
    assert compared > 100


def test_both_layouts_are_saved_as_they_came(theirs, base, size, tmp_path):
    for kind, source, files in (
        ("nvidia", base, ("statistics.json", "processor_config.json")),
        ("lerobot", theirs[3], ("policy_preprocessor.json", "policy_postprocessor.json")),
    ):
        again = save_groot(load(source, size), tmp_path / kind)
        for name in files:
            assert (again / name).read_bytes() == (source / name).read_bytes()
        assert load(again, size).anchors == (None, 1, 2)


@pytest.fixture
def copy(base, tmp_path):
    return Path(shutil.copytree(base, tmp_path / "copy"))


def edit(folder, file, change):
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))


TWO_ROWS = {"min": [row[1:] for row in LOW[:2]], "max": [row[1:] for row in HIGH[:2]]}


def configs_of(content):
    return content["processor_kwargs"]["modality_configs"]["new_embodiment"]["action"]["action_configs"]


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("statistics.json", lambda c: c["new_embodiment"].pop("relative_action"), "no statistics of relative actions"),
        (
            "statistics.json",
            lambda c: c["new_embodiment"]["relative_action"]["action_1"].update(TWO_ROWS),
            "2 rows, 3 ticks were trained",
        ),
        ("processor_config.json", lambda c: configs_of(c)[1].update(type="EEF", format="XYZ_ROT6D"), "as a pose"),
        ("processor_config.json", lambda c: configs_of(c)[1].update(state_key="legs"), "'legs': not among"),
        ("processor_config.json", lambda c: configs_of(c)[1].update(state_key="state_0"), "'state_0': 1 dims"),
    ],
)
def test_what_cannot_be_used_as_meant_is_refused(copy, size, file, change, told):
    edit(copy, file, change)
    with pytest.raises(CheckpointError, match=told):
        load(copy, size)


def test_relative_actions_that_are_switched_off_are_absolute(copy, size):
    """As NVIDIA's processor has it: the parts say relative, `use_relative_action` says no."""
    edit(copy, "processor_config.json", lambda c: c["processor_kwargs"].update(use_relative_action=False))
    policy = load(copy, size)
    assert policy.anchors is None
    np.testing.assert_allclose(policy.action_units.to_physical(torch.ones(3)), [1, 1.2, 1.2], rtol=1e-6)


def test_lerobots_processors_that_contradict_each_other_are_refused(theirs, size, tmp_path):
    copy = Path(shutil.copytree(theirs[3], tmp_path / "copy"))
    edit(copy, "policy_postprocessor.json", lambda c: c["steps"][0]["config"].update(use_relative_action=False))
    with pytest.raises(CheckpointError, match=r"relative action parts \['action_1'\].*use_relative_action=false"):
        load(copy, size)


def test_a_new_embodiment_becomes_relative_by_the_parts_of_a_dataset(base, size, tmp_path):
    """Statistics and ranges of a dataset, parts of its modality.json; the export says it to NVIDIA and LeRobot."""
    meta = tmp_path / "data" / "meta"
    meta.mkdir(parents=True)
    ends = {"observation.state": ([-1.0] * 4, [1.0] * 4), "action": ([-1.0] * 3, [1.0] * 3)}
    (meta / "stats.json").write_text(
        json.dumps({k: {"min": a, "max": b, "mean": a, "std": b} for k, (a, b) in ends.items()})
    )
    parts = {
        "state": {"base": {"start": 0, "end": 1}, "arm": {"start": 1, "end": 3}, "grip": {"start": 3, "end": 4}},
        "action": {"grip": {"start": 0, "end": 1}, "arm": {"start": 1, "end": 3}},
        "video": {"front": {}, "wrist": {}},
    }
    (meta / "modality.json").write_text(json.dumps(parts))
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    (copy / "embodiment_id.json").write_text(json.dumps({"new_embodiment": 2, "mine": 1}))
    options = {"embodiment_tag": "mine", "statistics": str(tmp_path / "data")}
    with pytest.raises(ValueError, match=r"policy\.relative: the ranges"):
        load(copy, size, **options, relative={"exclude": ["grip"]})
    policy = load(copy, size, **options, relative=RELATIVE)
    assert (policy.anchors, policy.valid_horizon) == ((None, 1, 2), VALID)
    out = save_groot(policy, tmp_path / "out")
    action = json.loads((out / "processor_config.json").read_text())["processor_kwargs"]["modality_configs"]["mine"][
        "action"
    ]
    assert [c["rep"] for c in action["action_configs"]] == ["absolute", "relative"]
    assert action["delta_indices"] == [0, 1, 2]
    again = load(out, size, embodiment_tag="mine")
    for one, other in ((again.action_units, policy.action_units), (again.state_units, policy.state_units)):
        assert torch.equal(one.offset, other.offset)
        assert torch.equal(one.scale, other.scale)
    assert again.anchors == policy.anchors
    parts["action"] = {"all": {"start": 0, "end": 3}}
    (meta / "modality.json").write_text(json.dumps(parts))
    with pytest.raises(ValueError, match=r"action part 'all' of modality\.json.*a part of its own"):
        load(copy, size, **options, relative=RELATIVE)
    with pytest.raises(CheckpointError, match=r"policy\.relative: .* says itself which actions of 'new_embodiment'"):
        load(copy, size, relative=RELATIVE)
