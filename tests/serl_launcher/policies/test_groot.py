"""GR00T N1.7 behind the flow-policy interface against lerobot's own forward path, at tiny size."""

import numpy as np
import pytest
import torch

from serl_launcher.policies.base import PolicyInput, flow_loss, sample, trainable
from serl_launcher.policies.groot.build import build_groot
from serl_launcher.policies.groot.inputs import patches
from serl_launcher.policies.groot.tiny import TinyGrootSize
from serl_launcher.policies.groot.trainable import TUNE, flags_of
from serl_transport.contract.specs import TaskSpec

SPEC = TaskSpec.from_dict(
    {
        "name": "t",
        "prompt": "pick up the red cube",
        "cameras": {"front": [32, 32], "wrist": [32, 32]},
        "state_names": ["a", "b", "c"],
        "state_low": [-1, -1, 0],
        "state_high": [1, 1, 2],
        "action_names": ["x", "g"],
        "action_low": [-0.02, -1],
        "action_high": [0.02, 1],
        "control_hz": 10,
        "max_ticks": 60,
    }
)
SIZE = TinyGrootSize(image_size=32, max_state_dim=5, max_action_dim=4)  # wider than the robot, as checkpoints are
B, AH, WIDE, AD = 3, 4, 4, 2


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def policy(request):
    """Padding is attended to, as the library does."""
    options = {"attention": request.param, "mask_padding": False}
    return build_groot("t", SPEC, "random", 0, AH, SIZE, embodiment=2, **options)


@pytest.fixture(scope="module")
def observation():
    rng = np.random.default_rng(0)
    images = {camera: rng.integers(0, 256, (B, 32, 32, 3), dtype=np.uint8) for camera in SPEC.cameras}
    return PolicyInput(
        images, rng.uniform(-1, 1, (B, 3)).astype(np.float32), ["pick up", "pick up the red cube", "lift"]
    )


def library_inputs(policy, observation, chunk=None):
    """The batch that lerobot's model takes, from the same observation."""
    state = torch.zeros(B, 1, 5)
    state[:, 0, :3] = policy.state_units.to_model(torch.tensor(observation.state))
    batch = policy.inputs(observation.images, observation.prompts, policy.device)
    batch |= {"state": state, "embodiment_id": torch.full((B,), 2)}
    if chunk is not None:
        mask = torch.zeros(B, AH, WIDE)
        mask[..., :AD] = 1
        batch |= {"action": chunk, "action_mask": mask}
    return batch


def test_loss_and_gradients_equal_the_librarys_forward(policy, observation, monkeypatch):
    torch.manual_seed(0)
    chunk, noise, t = torch.randn(B, AH, WIDE), torch.randn(B, AH, WIDE), torch.rand(B) * 0.999
    head = policy.core.action_head
    monkeypatch.setattr(torch, "randn", lambda *a, **k: noise)
    monkeypatch.setattr(head, "sample_time", lambda *a, **k: t)
    policy.zero_grad()
    out = policy.core(library_inputs(policy, observation, chunk))
    theirs = out["action_loss"].sum((1, 2)) / out["action_mask"].sum((1, 2))
    theirs.mean().backward()
    want = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    keep = torch.zeros(B, AH, dtype=torch.bool)
    ours = flow_loss(policy, policy.encode(observation), chunk, keep, torch.ones(B), noise, t)
    ours.mean().backward()
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert len(want) > 100
    for name, p in policy.named_parameters():
        ours, theirs = (torch.zeros_like(p) if g is None else g for g in (p.grad, want.get(name)))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("steps", [4, 7, 10])
def test_sampling_equals_the_librarys_from_the_same_noise(policy, observation, monkeypatch, steps):
    torch.manual_seed(1)
    noise = torch.randn(B, AH, WIDE)
    with torch.no_grad():
        ours = sample(policy, policy.encode(observation), noise, steps=steps)
    monkeypatch.setattr(torch, "randn", lambda *a, **k: noise.clone())
    monkeypatch.setattr(policy.core.action_head, "num_inference_timesteps", steps)
    theirs = policy.core.get_action(library_inputs(policy, observation))["action_pred"]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_samples_from_one_prefix_equal_separate_calls(policy, observation):
    noise = torch.randn(B * 3, AH, WIDE)
    with torch.no_grad():
        together = sample(policy, policy.encode(observation), noise, steps=3, n=3)
        apart = [sample(policy, policy.encode(observation), noise[k::3], steps=3) for k in range(3)]
    for k in range(3):
        torch.testing.assert_close(together[k::3], apart[k], atol=1e-5, rtol=1e-4)


def test_prefix_features_equal_the_librarys(policy, observation):
    core, batch = policy.core, library_inputs(policy, observation)
    with torch.no_grad():
        backbone, action = core.prepare_input(batch)
        theirs = core.action_head._encode_features(core.backbone(backbone), action)
        ours = policy.encode(observation)
    torch.testing.assert_close(ours.hidden, theirs["backbone_features"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.state_features, theirs["state_features"], atol=1e-5, rtol=1e-4)


def alone(observation, row):
    one = slice(row, row + 1)
    images = {camera: x[one] for camera, x in observation.images.items()}
    return PolicyInput(images, observation.state[one], observation.prompts[one])


def test_padding_changes_nothing_where_it_is_masked(observation):
    """Prompts of 2, 5 and 1 words: a row of the batch is what the library makes of it alone, without padding."""
    masked = build_groot("t", SPEC, "random", 0, AH, SIZE, embodiment=2)
    theirs = build_groot("t", SPEC, "random", 0, AH, SIZE, embodiment=2, attention="eager", mask_padding=False)
    noise = torch.randn(B, AH, WIDE, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        together = sample(masked, masked.encode(observation), noise, steps=4)
        for row, words in enumerate((2, 5, 1)):
            theirs.inputs.tokenizer.length = words
            one = alone(observation, row)
            want = sample(theirs, theirs.encode(one), noise[row : row + 1], steps=4)
            torch.testing.assert_close(together[row : row + 1], want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dropout", [False, True])
def test_checkpointing_changes_no_gradient(observation, dropout):
    gradients = []
    for checkpointing in (False, True):
        policy = build_groot("t", SPEC, "random", 0, AH, SIZE, dropout=dropout, checkpointing=checkpointing).train()
        torch.manual_seed(5)
        chunk, noise, keep = torch.randn(B, AH, WIDE), torch.randn(B, AH, WIDE), torch.zeros(B, AH, dtype=torch.bool)
        t = torch.rand(B)
        flow_loss(policy, policy.encode(observation), chunk, keep, torch.ones(B), noise, t).sum().backward()
        gradients.append({n: p.grad for n, p in policy.named_parameters() if p.grad is not None})
    plain, saved = gradients
    assert plain.keys() == saved.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(saved[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_bf16_holds_fp32_masters_and_computes_nearly_the_same(observation):
    tune = {"llm": False, "visual": False}
    exact = build_groot("t", SPEC, "random", 0, AH, SIZE, tune=tune)
    half = build_groot("t", SPEC, "random", 0, AH, SIZE, tune=tune, precision="bfloat16", checkpointing=True)
    noise = torch.randn(B, AH, WIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, got = (sample(p, p.encode(observation), noise, steps=4) for p in (exact, half))
    torch.testing.assert_close(got, want, atol=0.1, rtol=0.1)
    dtypes = {name: p.dtype for name, p in half.named_parameters()}
    assert all(dtypes[name] == torch.float32 for name in trainable(half))
    assert dtypes["core.backbone.model.model.language_model.layers.0.mlp.up_proj.weight"] == torch.bfloat16
    flow_loss(
        half, half.encode(observation), noise, torch.zeros(B, AH, dtype=torch.bool), torch.ones(B), noise, torch.rand(B)
    ).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trainable(half).values())


def test_what_is_made_once_a_chunk_serves_every_flow_step(policy, observation):
    x, times = torch.randn(B, AH, WIDE), torch.tensor([0.0, 0.25, 0.5, 0.75])
    with torch.no_grad():
        prefix = policy.encode(observation)
        shared = policy.ready(prefix, times)
        for step, t in enumerate(times):
            want = policy.velocity(prefix, x, t.expand(B))
            torch.testing.assert_close(policy.velocity_at(shared, x, step), want, atol=1e-6, rtol=1e-5)


def test_ticks_that_a_checkpoint_was_not_trained_on_do_not_count(observation):
    policy = build_groot("t", SPEC, "random", 0, AH, SIZE)
    policy.valid_horizon = 2
    chunk, noise, keep = torch.randn(B, AH, WIDE), torch.randn(B, AH, WIDE), torch.zeros(B, AH, dtype=torch.bool)
    other = chunk.clone()
    other[:, 2:] = 9
    t = torch.rand(B)
    with torch.no_grad():
        prefix = policy.encode(observation)
        losses = [flow_loss(policy, prefix, c, keep, torch.ones(B), noise, t) for c in (chunk, other)]
    assert torch.equal(*losses)
    assert policy.physical_actions(chunk).shape == (B, 2, AD)


def test_patch_rows_are_those_of_the_qwen_processor():
    from transformers import Qwen2VLImageProcessor

    images = np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3), dtype=np.uint8)
    processor = Qwen2VLImageProcessor(
        patch_size=16,
        temporal_patch_size=2,
        merge_size=2,
        min_pixels=32 * 32,
        max_pixels=256 * 256,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    theirs = processor(images=list(images), return_tensors="pt")["pixel_values"]
    ours = patches(torch.as_tensor(images).permute(0, 3, 1, 2).float().div(127.5).sub(1)).flatten(0, 1)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_training_mode_changes_no_output_unless_dropout_is_wanted(observation):
    policy = build_groot("t", SPEC, "random", 0, AH, SIZE)
    noise, t = torch.randn(B, AH, WIDE), torch.rand(B)

    def velocity():
        return policy.velocity(policy.encode(observation), noise, t)

    with torch.no_grad():
        rest = policy.eval() and velocity()
        policy.train()
        assert torch.equal(velocity(), rest)
        policy.dropout = True
        policy.train()
        assert not torch.equal(velocity(), rest)


@pytest.mark.parametrize("flag", TUNE)
def test_every_tune_flag_decides_alone_what_gets_a_gradient(flag, observation):
    policy = build_groot("t", SPEC, "random", 0, AH, SIZE, tune={name: name == flag for name in TUNE})
    chunk, noise = torch.randn(B, AH, WIDE), torch.randn(B, AH, WIDE)
    keep = torch.zeros(B, AH, dtype=torch.bool)
    flow_loss(policy, policy.encode(observation), chunk, keep, torch.ones(B), noise, torch.rand(B)).sum().backward()
    got = {name for name, p in policy.named_parameters() if p.grad is not None}
    assert got == set(trainable(policy))
    part = {
        "llm": "backbone.model.model.language_model",
        "visual": "backbone.model.model.visual",
        "projector": "action_head.action_encoder",
        "diffusion_model": "action_head.model",
        "vlln": "action_head.vl",
    }[flag]
    assert any(part in name for name in got)
    others = {"language_model", ".visual.", "action_encoder", "action_head.model", "action_head.vl"}
    assert not [n for n in got for other in others if other in n and other not in part and part not in n]


def test_the_language_head_is_not_held(policy):
    assert not [name for name in policy.state_dict() if "lm_head" in name]


def test_unknown_flags_and_slots_are_refused():
    with pytest.raises(ValueError, match="unknown flag 'vision'"):
        flags_of(None, {"vision": True})
    with pytest.raises(ValueError, match=r"policy\.embodiment: expected a slot below 4, got 4"):
        build_groot("t", SPEC, "random", 0, AH, SIZE, embodiment=4)


def test_actions_map_to_physical_units_and_back(policy):
    wide = policy.normalise_actions(torch.tensor([[[0.01, 0.5]]]))
    np.testing.assert_allclose(wide, [[[0.5, 0.5, 0, 0]]], rtol=1e-6)
    np.testing.assert_allclose(policy.physical_actions(wide), [[[0.01, 0.5]]], rtol=1e-6)
    np.testing.assert_allclose(policy.physical_actions(9 * wide), [[[0.02, 1.0]]], rtol=1e-6)
