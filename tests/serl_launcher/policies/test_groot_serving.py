"""GR00T of three releases as it serves: weights side by side, n samples a prefix row, all equal to the plain path."""

import copy

import pytest
import torch
from n1_5_case import AH, SIZE, SLOT, SPEC, WIDE, B, fill, observation
from n1_6_case import SIZE as N1_6
from torch.nn import functional as F

from serl_launcher.policies.base import flow_loss, sample
from serl_launcher.policies.groot.build import build_groot
from serl_launcher.policies.groot.tiny import TinyGrootSize
from serl_launcher.policies.groot_n1_5.build import build_groot_n1_5
from serl_launcher.policies.groot_n1_6.build import build_groot_n1_6
from serl_launcher.policies.precision import FLOAT32, hold
from serl_launcher.policies.realtime import sample_realtime, soft_mask

N1_7 = TinyGrootSize(image_size=32, max_state_dim=5, max_action_dim=4)
STEPS, N = 4, 3


def build(generation, **options):
    if generation == "n1_7":
        return build_groot("t", SPEC, "random", 0, AH, N1_7, embodiment=2, **options)
    if generation == "n1_6":
        policy = build_groot_n1_6("t", SPEC, "random", 0, AH, N1_6, **options)
    else:
        policy = build_groot_n1_5("t", SPEC, "random", 0, AH, SIZE, embodiment=SLOT, **options)
    if options.get("train") != "lora":
        fill(policy.core)
    return policy


@pytest.fixture(scope="module", params=["n1_7", "n1_6", "n1_5"])
def generation(request):
    return request.param


@pytest.fixture(scope="module")
def plain(generation):
    return build(generation).eval().requires_grad_(False)


def serving(policy):
    """As the policy server has it: the same numbers, side by side."""
    served = copy.deepcopy(policy)
    hold(served, served.precision, masters=False)
    served.fuse_for_serving()
    return served


def noise(rows):
    return torch.randn(rows, AH, WIDE, generator=torch.Generator().manual_seed(7))


def step_by_step(policy, prefix, x):
    """The flow without anything that is made once."""
    for k in range(STEPS):
        x = x + policy.velocity(prefix, x, torch.full((len(x),), k / STEPS)) / STEPS
    return x


def close(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def test_served_chunks_are_those_of_the_plain_path_also_after_a_swap(plain):
    served, given = serving(plain), observation()
    assert served.state_dict().keys() == plain.state_dict().keys()
    places = {name: p.data_ptr() for name, p in served.named_parameters()}
    moved = copy.deepcopy(plain)
    for p in moved.parameters():
        p.mul_(1.05)
    for source in (plain, moved):
        for name, p in source.named_parameters():
            served.get_parameter(name).copy_(p)
        prefix = served.encode(given, features=False)
        close(prefix.hidden, source.encode(given).hidden)
        close(sample(served, prefix, noise(B), STEPS), step_by_step(source, source.encode(given), noise(B)))
    assert {name: p.data_ptr() for name, p in served.named_parameters()} == places
    layer = served.language_layers[0].self_attn
    assert layer.qkv[0].untyped_storage()._cdata == layer.k_proj.weight.untyped_storage()._cdata


@torch.no_grad()
def test_guided_chunks_are_those_of_the_plain_path(plain, monkeypatch):
    served, given, known = serving(plain), observation(), 0.3 * noise(B)
    mask = soft_mask(1, 3, AH)[:, None].expand(B, AH, WIDE).contiguous()
    ours = sample_realtime(served, served.encode(given), noise(B), STEPS, known, mask)
    times = [k / STEPS for k in range(STEPS)]
    monkeypatch.setattr(plain, "velocity_at", lambda p, x, k: plain.velocity(p, x, torch.full((len(x),), times[k])))
    close(ours, sample_realtime(plain, plain.encode(given), noise(B), STEPS, known, mask))
    assert not torch.equal(ours, sample(served, served.encode(given), noise(B), STEPS))


def test_samples_of_a_row_share_its_keys_with_the_losses_and_gradients_of_separate_rows(generation, monkeypatch):
    policy, keep = build(generation, tune={"llm": False, "visual": False}), torch.zeros(B * N, AH, dtype=torch.bool)
    chunk, t, ones = noise(B * N).flip(0), torch.linspace(0, 0.99, B * N), torch.ones(B * N)
    seen, attend = set(), F.scaled_dot_product_attention

    def watch(q, k, v, **options):
        if q.shape[2] != k.shape[2]:
            seen.add(len(k))
        return attend(q, k, v, **options)

    got = []
    for shared in (True, False):
        policy.zero_grad()
        prefix = policy.encode(observation())
        monkeypatch.setattr(F, "scaled_dot_product_attention", watch if shared else attend)
        loss = flow_loss(policy, prefix if shared else prefix.repeat(N), chunk, keep, ones, noise(B * N), t)
        loss.sum().backward()
        got.append((loss.detach(), {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}))
    assert seen == {B}
    close(got[0][0], got[1][0])
    assert got[0][1].keys() == got[1][1].keys()
    for name, gradient in got[0][1].items():
        torch.testing.assert_close(gradient, got[1][1][name], atol=1e-5, rtol=1e-3, msg=name)
    policy.fuse_for_serving()
    with torch.no_grad():
        prefix = policy.encode(observation())
        close(sample(policy, prefix, noise(B * N), STEPS, N), step_by_step(policy, prefix.repeat(N), noise(B * N)))


@torch.no_grad()
def test_layers_with_adapters_stay_as_they_are(generation):
    policy = build(generation, train="lora", lora_rank=2)
    for name, p in policy.named_parameters():
        if ".lora_B" in name:
            p.fill_(0.01)
    served = serving(policy)
    close(sample(served, served.encode(observation()), noise(B), STEPS),
          step_by_step(policy, policy.encode(observation()), noise(B)))  # fmt: skip
    assert not hasattr(served.language_layers[0].self_attn, "qkv")
    assert hasattr(served.core.action_head.model, "modulate")


@torch.no_grad()
def test_half_precision_is_served_without_autocast_and_casts_nothing_a_layer(generation, plain, monkeypatch):
    half = build(generation, precision="bfloat16")
    served, attend, dtypes = serving(half.requires_grad_(False)), F.scaled_dot_product_attention, set()
    wide = {name for name, p in served.core.named_parameters() if p.dtype == torch.float32}
    assert wide
    assert all(any(part in name for part in FLOAT32) for name in wide)

    def watch(q, k, v, attn_mask=None, **options):
        assert not torch.is_autocast_enabled("cpu")
        dtypes.update(x.dtype for x in (q, k, v, attn_mask) if x is not None)
        return attend(q, k, v, attn_mask=attn_mask, **options)

    by_autocast = sample(half, half.encode(observation()), noise(B), STEPS)
    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    prefix = served.encode(observation())
    got = sample(served, prefix, noise(B), STEPS)
    assert dtypes == {torch.bfloat16}
    assert got.dtype == torch.float32
    close(got, step_by_step(plain, plain.encode(observation()), noise(B)), 0.1)
    close(got, by_autocast, 0.1)


@torch.no_grad()
def test_a_policy_that_was_moved_after_it_was_fused_is_refused(plain):
    moved = copy.deepcopy(serving(plain))
    prefix = moved.encode(observation())
    with pytest.raises(RuntimeError, match="moved, cast or copied afterwards"):
        sample(moved, prefix, noise(B), STEPS)
