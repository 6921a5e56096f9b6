"""Real-time chunking on a tiny PI0: the mask, the gradient, and chunks that agree with what is being executed."""

import math

import numpy as np
import pytest
import torch
from tiny import SIZE, SPEC

from serl_launcher.policies.base import PolicyInput, flow_loss, sample, sample_times
from serl_launcher.policies.pi0.build import build_pi0
from serl_launcher.policies.realtime import guidance_weight, guided_velocity, sample_realtime, soft_mask

AH, AD, STEPS = 8, 2, 8


def observation(b, seed=0):
    rng = np.random.default_rng(seed)
    images = {camera: rng.integers(0, 256, (b, 32, 32, 3), dtype=np.uint8) for camera in SPEC.cameras}
    return PolicyInput(images, np.zeros((b, 3), np.float32), [SPEC.prompt] * b)


@pytest.fixture(scope="module")
def policy():

    return build_pi0("tiny", SPEC, "random", 0, AH, SIZE).eval()


@pytest.fixture(scope="module")
def undecided():
    """A policy that learned to go left all the way or right all the way, as the noise has it: chunks are ±0.8."""

    torch.manual_seed(0)
    policy = build_pi0("tiny", SPEC, "random", 0, AH, SIZE)
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_("expert" in name or "action" in name or "state" in name or "time" in name)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    b = 128
    with torch.no_grad():
        prefix = policy.encode(observation(1)).take(torch.zeros(b, dtype=torch.int64))
    for _ in range(400):
        chunk = 0.8 * (torch.randint(0, 2, (b, 1, 1)) * 2.0 - 1).expand(b, AH, AD)
        noise, t = torch.randn(b, AH, AD), sample_times(b)
        pad = torch.zeros(b, AH, dtype=torch.bool)
        loss = flow_loss(policy, prefix, chunk, pad, torch.ones(b), noise, t).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy.eval().requires_grad_(False)


def test_the_mask_is_one_on_the_executed_decays_and_ends():
    mask = soft_mask(2, 6, 8)
    assert mask[:2].tolist() == [1, 1]
    assert mask[6:].tolist() == [0, 0]
    # Equation 5 at i = 2 and i = 5: c = (6 - i) / (6 - 2 + 1)
    for i, c in ((2, 4 / 5), (5, 1 / 5)):
        assert mask[i] == pytest.approx(c * (math.exp(c) - 1) / (math.e - 1), abs=1e-6)
    assert (mask.diff() <= 0).all()
    assert soft_mask(0, 0, 4).tolist() == [0, 0, 0, 0]
    assert soft_mask(9, 9, 4).tolist() == [1, 1, 1, 1]


def test_the_guidance_weight_is_the_papers_and_bounded():
    assert guidance_weight(0.0) == 5.0
    assert guidance_weight(0.5) == pytest.approx(2.0)  # (0.25 + 0.25) / 0.25
    assert guidance_weight(0.999) == 5.0


def test_the_gradient_goes_through_the_velocity(policy):
    torch.manual_seed(0)
    prefix = policy.encode(observation(1))
    x, known, mask = (
        torch.randn(1, AH, AD),
        torch.randn(1, AH, AD),
        soft_mask(2, 6, AH)[None, :, None].expand(1, AH, AD),
    )
    t = 0.5
    with torch.no_grad():
        v = policy.velocity(prefix, x, torch.tensor([t]))

        def velocity(x):
            return policy.velocity(prefix, x, torch.tensor([t]))

        step = (guided_velocity(velocity, x, t, known, mask) - v) / guidance_weight(t)

        def heading(x):
            return x + (1 - t) * velocity(x)

        # (error)ᵀ J by central differences of error · heading(x), one coordinate at a time
        error, h = mask * (known - heading(x)), 1e-2
        for index in ((0, 0, 0), (0, 1, 1), (0, 4, 0), (0, 7, 1)):
            delta = torch.zeros_like(x)
            delta[index] = h
            want = ((heading(x + delta) - heading(x - delta)) / (2 * h) * error).sum()
            assert step[index].item() == pytest.approx(want.item(), abs=5e-3)


def test_without_a_running_chunk_it_is_the_plain_sample(policy):
    torch.manual_seed(1)
    prefix, noise = policy.encode(observation(2)), torch.randn(2, AH, AD)
    zero = torch.zeros(2, AH, AD)
    with torch.no_grad():
        plain = sample(policy, prefix, noise, STEPS)
    torch.testing.assert_close(sample_realtime(policy, prefix, noise, STEPS, zero, zero), plain, atol=1e-5, rtol=1e-4)


def test_the_actions_executed_during_the_delay_are_reproduced(policy):
    """Any committed actions, even ones that this policy would never choose."""
    torch.manual_seed(2)
    b, delay = 16, 3
    prefix = policy.encode(observation(1)).take(torch.zeros(b, dtype=torch.int64))
    noise, known = torch.randn(b, AH, AD), torch.rand(b, AH, AD) * 2 - 1
    mask = soft_mask(delay, 6, AH)[None, :, None].expand(b, AH, AD)
    with torch.no_grad():
        free = sample(policy, prefix, noise, STEPS)
    guided = sample_realtime(policy, prefix, noise, STEPS, known, mask)
    assert (free - known)[:, :delay].abs().mean() > 0.5
    assert (guided - known)[:, :delay].abs().max() < 0.1
    assert (guided - known)[:, :delay].abs().mean() < 0.03  # of a range of 2


@pytest.mark.slow
def test_consecutive_chunks_of_an_undecided_policy_agree_only_with_guidance(undecided):
    """Every other chunk would turn around; a robot that goes left goes on to the left."""
    torch.manual_seed(3)
    b, delay, executed = 64, 2, 4
    with torch.no_grad():
        prefix = undecided.encode(observation(1)).take(torch.zeros(b, dtype=torch.int64))
        first = sample(undecided, prefix, torch.randn(b, AH, AD), STEPS)
        noise = torch.randn(b, AH, AD)
        free = sample(undecided, prefix, noise, STEPS)
    known = torch.zeros(b, AH, AD)
    known[:, : AH - executed] = first[:, executed:]
    mask = soft_mask(delay, AH - executed, AH)[None, :, None].expand(b, AH, AD)
    guided = sample_realtime(undecided, prefix, noise, STEPS, known, mask)

    side = first.mean((1, 2)).sign()
    assert 0.3 < (side > 0).float().mean() < 0.7  # it is undecided
    agree = (free.mean((1, 2)).sign() == side).float().mean()
    assert 0.3 < agree < 0.7

    # The jump at the tick where the new chunk takes over, and the mode of what follows.
    jump_free = (free[:, delay] - first[:, executed + delay - 1]).abs().mean()
    jump_guided = (guided[:, delay] - first[:, executed + delay - 1]).abs().mean()
    assert jump_guided < 0.3 * jump_free
    assert (guided[:, delay:].mean((1, 2)).sign() == side).float().mean() > 0.95


def test_misshapen_arguments_are_named(policy):
    prefix = policy.encode(observation(1))
    with pytest.raises(ValueError, match="noise, known and mask differ"):
        sample_realtime(policy, prefix, torch.zeros(1, AH, AD), 2, torch.zeros(1, 2, AD), torch.zeros(1, AH, AD))


def test_take_repeats_and_orders_rows(policy):
    with torch.no_grad():
        prefix = policy.encode(observation(3))
    index = torch.tensor([2, 0, 0])
    taken = prefix.take(index)
    torch.testing.assert_close(taken.state, prefix.state[index])
    torch.testing.assert_close(taken.keys_values[1][0], prefix.keys_values[1][0][index])
    assert prefix.take(torch.arange(3)) is prefix
