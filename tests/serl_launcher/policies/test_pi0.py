"""PI0, through the library's layers and through ours, against lerobot's own forward path, at tiny size."""

import numpy as np
import pytest
import torch
from tiny import SIZE, SPEC

from serl_launcher.policies.base import PolicyInput, flow_loss, sample, sample_times, trainable
from serl_launcher.policies.groot.build import build_groot
from serl_launcher.policies.pi0.build import build_pi0
from serl_launcher.policies.pi0.flow import cut
from serl_transport.contract.specs import TaskSpec

B, AH, AD = 3, 4, 2


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def policy(request):
    policy = build_pi0("t", SPEC, "random", 0, AH, SIZE)
    policy.attention = request.param
    return policy


@pytest.fixture(scope="module")
def observation():
    rng = np.random.default_rng(0)
    images = {camera: rng.integers(0, 256, (B, 32, 32, 3), dtype=np.uint8) for camera in SPEC.cameras}
    return PolicyInput(
        images, rng.uniform(-1, 1, (B, 3)).astype(np.float32), ["pick up", "pick up the red cube", "lift"]
    )


def library_loss(policy, observation, chunk, noise, tau):
    """lerobot's joint forward: squared error of its backward velocity, float32[b, ah, ad]."""
    images = list(policy._pixels(observation.images).split(B))
    ids, mask = policy.tokenizer(observation.prompts)
    state = policy.state_units.to_model(torch.tensor(observation.state))
    present = [torch.ones(B, dtype=torch.bool)] * len(images)
    return policy.core.forward(images, present, ids, mask, state, chunk, noise, tau)


def test_loss_and_gradients_equal_the_librarys_joint_forward(policy, observation):
    torch.manual_seed(0)
    chunk, noise, t = torch.randn(B, AH, AD), torch.randn(B, AH, AD), torch.rand(B)
    keep = torch.zeros(B, AH, dtype=torch.bool)
    policy.zero_grad()
    theirs = library_loss(policy, observation, chunk, noise, 1 - t).mean((1, 2))
    theirs.mean().backward()
    want = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    ours = flow_loss(policy, policy.encode(observation), chunk, keep, torch.ones(B), noise, t)
    ours.mean().backward()
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    for name, p in policy.named_parameters():
        ours, theirs = (torch.zeros_like(p) if g is None else g for g in (p.grad, want.get(name)))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_task_of_states_alone_equals_the_librarys_forward_without_images(attention, observation):
    policy = build_pi0("t", TaskSpec.from_dict(SPEC.to_dict() | {"cameras": {}}), "random", 0, AH, SIZE)
    policy.attention = attention
    blind = PolicyInput({}, observation.state, observation.prompts)
    torch.manual_seed(0)
    chunk, noise, t = torch.randn(B, AH, AD), torch.randn(B, AH, AD), torch.rand(B)
    ids, mask = policy.tokenizer(*policy._prompts(blind.prompts, None))
    state = policy.state_units.to_model(torch.tensor(blind.state))
    theirs = policy.core.forward([], [], ids, mask, state, chunk, noise, 1 - t).mean((1, 2))
    keep = torch.zeros(B, AH, dtype=torch.bool)
    ours = flow_loss(policy, policy.encode(blind), chunk, keep, torch.ones(B), noise, t)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert policy.features(policy.encode(blind)).shape == (B, 16 + 3)


def test_prefix_features_equal_the_librarys(policy, observation):
    """Hidden states, keys and values of every token that counts."""
    from lerobot.policies.common.vla_utils import make_att_2d_masks, prepare_attention_masks_4d

    images = list(policy._pixels(observation.images).split(B))
    ids, mask = policy.tokenizer(observation.prompts)
    present = [torch.ones(B, dtype=torch.bool)] * len(images)
    core = policy.core
    with torch.no_grad():
        embedded, pad, blocks = core.embed_prefix(images, present, ids, mask)
        core.paligemma_with_expert.paligemma.model.language_model.config._attn_implementation = "eager"
        (hidden, _), cache = core.paligemma_with_expert.forward(
            attention_mask=prepare_attention_masks_4d(make_att_2d_masks(pad, blocks)),
            position_ids=torch.cumsum(pad, dim=1) - 1,
            past_key_values=None,
            inputs_embeds=[embedded, None],
            use_cache=True,
        )
        ours = policy.encode(observation)
    assert torch.equal(ours.pad_mask, pad)
    torch.testing.assert_close(ours.hidden[pad], hidden[pad], atol=1e-5, rtol=1e-4)
    for mine, theirs in zip(cut(ours.keys_values, pad.shape[1]), cache, strict=True):
        for ours_x, their_x in zip(mine, theirs[:2], strict=True):
            torch.testing.assert_close(ours_x.transpose(1, 2)[pad], their_x.transpose(1, 2)[pad], atol=1e-5, rtol=1e-4)


def test_sampling_equals_the_librarys_from_the_same_noise(policy, observation):
    torch.manual_seed(1)
    noise = torch.randn(B, AH, AD)
    images = list(policy._pixels(observation.images).split(B))
    ids, mask = policy.tokenizer(observation.prompts)
    state = policy.state_units.to_model(torch.tensor(observation.state))
    present = [torch.ones(B, dtype=torch.bool)] * len(images)
    theirs = policy.core.sample_actions(images, present, ids, mask, state, noise=noise, num_steps=5)
    with torch.no_grad():
        ours = sample(policy, policy.encode(observation), noise, steps=5)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_samples_from_one_prefix_equal_separate_calls(policy, observation):
    noise = torch.randn(B * 3, AH, AD)
    with torch.no_grad():
        together = sample(policy, policy.encode(observation), noise, steps=3, n=3)
        apart = [sample(policy, policy.encode(observation), noise[k::3], steps=3) for k in range(3)]
    for k in range(3):
        torch.testing.assert_close(together[k::3], apart[k], atol=1e-5, rtol=1e-4)


def test_padded_ticks_do_not_reach_the_loss_of_their_own_velocity(policy, observation):
    """A label that is masked out may be anything: the loss and its gradient with respect to it vanish."""
    chunk = torch.randn(B, AH, AD, requires_grad=True)
    is_pad = torch.zeros(B, AH, dtype=torch.bool)
    is_pad[:, 2:] = True
    noise = torch.randn(B, AH, AD)
    # At t = 0 the input is pure noise, so labels enter through the target alone.
    flow_loss(policy, policy.encode(observation), chunk, is_pad, torch.ones(B), noise, torch.zeros(B)).sum().backward()
    assert torch.count_nonzero(chunk.grad[:, 2:]) == 0
    assert torch.count_nonzero(chunk.grad[:, :2]) > 0


def test_a_chunk_of_padding_alone_has_loss_zero(policy, observation):
    everything = torch.ones(B, AH, dtype=torch.bool)
    chunk = torch.randn(B, AH, AD)
    with torch.no_grad():
        prefix = policy.encode(observation)
        loss = flow_loss(policy, prefix, chunk, everything, torch.ones(B), torch.randn_like(chunk), torch.rand(B))
    assert loss.tolist() == [0.0] * B


def test_the_same_seed_builds_the_same_weights_and_leaves_the_global_generator_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, second, other = (build_pi0("t", SPEC, "random", seed, AH, SIZE) for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    for (name, p), q in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert any(not torch.equal(p, q) for p, q in zip(first.parameters(), other.parameters(), strict=True))


def test_language_heads_are_not_held(policy):
    assert not [name for name in policy.state_dict() if "lm_head" in name]
    assert any("vision_tower" in name for name in trainable(policy))


@pytest.mark.parametrize("build", [build_pi0, build_groot])
@pytest.mark.parametrize(
    ("init", "horizon", "message"),
    [
        ("pretrained", AH, r"policy\.init: expected 'checkpoint' or 'random', got 'pretrained'"),
        ("random", None, r"policy\.action_horizon: expected a number of ticks with policy\.init=random, got None"),
        ("checkpoint", None, r"policy\.checkpoint: expected a folder or a hub name"),
    ],
)
def test_a_beginning_that_is_not_said_names_its_key(build, init, horizon, message):
    with pytest.raises(ValueError, match=message):
        build("t", SPEC, init, 0, horizon, SIZE)


def test_actions_map_to_physical_units_within_the_limits(policy):
    physical = policy.physical_actions(torch.tensor([[[2.0, -3.0]]]))
    np.testing.assert_allclose(physical, [[[0.02, -1.0]]], rtol=1e-6)
    np.testing.assert_allclose(policy.normalise_actions(torch.tensor([[[0.01, 0.5]]])), [[[0.5, 0.5]]], rtol=1e-6)


def test_training_times_follow_the_beta_of_pi0():
    """1 − t = 0.001 + 0.999 · Beta(1.5, 1), whose mean is 1.5 / 2.5 = 0.6."""
    t = sample_times(200_000, torch.Generator().manual_seed(0))
    assert t.min() >= 0
    assert t.max() <= 0.999
    assert abs((1 - t).mean().item() - (0.001 + 0.999 * 0.6)) < 0.002
