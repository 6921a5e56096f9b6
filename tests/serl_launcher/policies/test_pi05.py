"""PI0.5, through the library's layers and through ours, against lerobot's own forward path, at tiny size."""

import numpy as np
import pytest
import torch
from tiny import SPEC

from serl_launcher.policies.base import PolicyInput, flow_loss, sample, trainable
from serl_launcher.policies.pi0.build import build_pi05
from serl_launcher.policies.pi0.flow import cut
from serl_launcher.policies.pi0.pi05 import state_prompts
from serl_launcher.policies.pi0.tiny import TinyPI05Size

SIZE = TinyPI05Size(width=16, vision_width=16, image_size=32, patch_size=16)
B, AH, AD = 3, 4, 2


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def policy(request):
    policy = build_pi05("t", SPEC, "random", 0, AH, SIZE)
    policy.attention = request.param
    return policy


@pytest.fixture(scope="module")
def observation():
    rng = np.random.default_rng(0)
    images = {camera: rng.integers(0, 256, (B, 32, 32, 3), dtype=np.uint8) for camera in SPEC.cameras}
    return PolicyInput(
        images, rng.uniform(-1, 1, (B, 3)).astype(np.float32), ["pick up", "pick up the red cube", "lift"]
    )


def tokens(policy, observation):
    state = policy.state_units.to_model(torch.tensor(observation.state))
    return policy.tokenizer(state_prompts(observation.prompts, state.numpy()))


def library_loss(policy, observation, chunk, noise, tau):
    """lerobot's joint forward: squared error of its backward velocity, float32[b, ah, ad]."""
    images = list(policy._pixels(observation.images).split(B))
    ids, mask = tokens(policy, observation)
    present = [torch.ones(B, dtype=torch.bool)] * len(images)
    return policy.core.forward(images, present, ids, mask, chunk, noise, tau)


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


def test_prefix_features_equal_the_librarys(policy, observation):
    """Hidden states, keys and values of every token that counts."""
    from lerobot.policies.common.vla_utils import make_att_2d_masks, prepare_attention_masks_4d

    images = list(policy._pixels(observation.images).split(B))
    ids, mask = tokens(policy, observation)
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
    ids, mask = tokens(policy, observation)
    present = [torch.ones(B, dtype=torch.bool)] * len(images)
    theirs = policy.core.sample_actions(images, present, ids, mask, noise=noise, num_steps=5)
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


def test_the_same_seed_builds_the_same_weights_and_leaves_the_global_generator_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, second, other = (build_pi05("t", SPEC, "random", seed, AH, SIZE) for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    for (name, p), q in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert any(not torch.equal(p, q) for p, q in zip(first.parameters(), other.parameters(), strict=True))


def test_language_heads_are_not_held(policy):
    assert not [name for name in policy.state_dict() if "lm_head" in name]
    assert any("vision_tower" in name for name in trainable(policy))


def test_the_prompt_is_that_of_the_library(policy, observation):
    from lerobot.lerobot_types import TransitionKey
    from lerobot.policies.pi05.processor_pi05 import Pi05PrepareStateTokenizerProcessorStep

    state = torch.tensor([[-1.5, 0.0, 0.999], [1.0, -1.0, 2.0]])
    task = ["pick_up\nit ", "lift"]
    transition = {
        TransitionKey.OBSERVATION: {"observation.state": state},
        TransitionKey.COMPLEMENTARY_DATA: {"task": list(task)},
    }
    theirs = Pi05PrepareStateTokenizerProcessorStep()(transition)[TransitionKey.COMPLEMENTARY_DATA]["task"]
    assert state_prompts(task, state.numpy()) == theirs


def test_every_bin_of_the_state_is_told_apart(policy):
    ids, _ = policy.tokenizer([" ".join(map(str, range(k, k + 16))) for k in range(0, 256, 16)])
    assert len(ids[:, :16].unique()) == 256


def test_a_prompt_that_cannot_hold_the_state_is_refused():
    with pytest.raises(ValueError, match=r"prompt_tokens: expected at least 11 .* got 8"):
        build_pi05("t", SPEC, "random", 0, AH, TinyPI05Size(prompt_tokens=8))
