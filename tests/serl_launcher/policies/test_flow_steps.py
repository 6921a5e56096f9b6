"""PI0's and PI0.5's flow steps as they are served: equal to a pass of its own each, the prefix never copied."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import SPEC
from torch.utils._python_dispatch import TorchDispatchMode

from serl_launcher.policies.base import PolicyInput, flow_loss, flow_times, for_samples, sample
from serl_launcher.policies.pi0.build import build_pi0, build_pi05
from serl_launcher.policies.pi0.tiny import TinyPI05Size, TinySize
from serl_launcher.policies.precision import hold
from serl_launcher.policies.realtime import sample_realtime, soft_mask

B, N, AH, AD, STEPS, HEADS = 2, 3, 4, 2, 4, 8
SHAPE = dict(width=16, vision_width=16, image_size=32, patch_size=16)
BUILD = {"pi0": (build_pi0, TinySize(**SHAPE)), "pi05": (build_pi05, TinyPI05Size(**SHAPE))}


def build(kind, **options):
    make, size = BUILD[kind]
    return make("t", SPEC, "random", 0, AH, size, **{"attention": "sdpa"} | options).eval()


def observation(seed=0):
    rng = np.random.default_rng(seed)
    images = {camera: rng.integers(0, 256, (B, 32, 32, 3), dtype=np.uint8) for camera in SPEC.cameras}
    return PolicyInput(images, rng.uniform(-1, 1, (B, 3)).astype(np.float32), ["pick up", "pick up the red cube"])


def serving(policy):
    policy.requires_grad_(False)
    hold(policy, policy.precision, masters=False)
    policy.fuse_for_serving()
    return policy


def noise(rows=B):
    return torch.randn(rows, AH, AD, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def chunks(policy, n=1):
    return sample(policy, policy.encode(observation(), features=False), noise(B * n), STEPS, n)


@torch.no_grad()
def guided(policy):
    known, mask = noise() / 2, soft_mask(1, 3, AH)[None, :, None].expand(B, AH, AD)
    return sample_realtime(policy, policy.encode(observation()), noise(), STEPS, known, mask)


@pytest.fixture(scope="module", params=BUILD)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def library(kind):
    """The library's own layers."""
    return build(kind, attention="eager").requires_grad_(False)


@pytest.mark.parametrize("n", [1, N])
def test_served_chunks_are_those_of_the_library_before_and_after_a_swap(kind, library, n):
    served, theirs = serving(build(kind)), copy.deepcopy(library)
    names, addresses = list(served.state_dict()), [p.data_ptr() for p in served.parameters()]
    for _ in range(2):
        torch.testing.assert_close(chunks(served, n), chunks(theirs, n), atol=1e-5, rtol=1e-4)
        with torch.no_grad():  # as the engine swaps: in place
            for mine, other in zip(theirs.parameters(), served.parameters(), strict=True):
                mine.add_(0.02 * torch.randn_like(mine))
                other.copy_(mine)
    assert list(served.state_dict()) == names == list(theirs.state_dict())
    assert [p.data_ptr() for p in served.parameters()] == addresses
    for name, tensor in served.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name


def test_guided_chunks_are_those_of_the_library(kind, library):
    served = serving(build(kind))
    want = guided(library)
    for _ in range(2):  # the room of the first is written again
        torch.testing.assert_close(guided(served), want, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(want, chunks(served), atol=1e-2)


class Copies(TorchDispatchMode):
    """Operations whose result is as long as the prefix, by name: copies of keys and values among them."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens, self.found = tokens, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = isinstance(out, torch.Tensor) and out.ndim == 4 and not func.is_view
        if made and out.shape[2] >= self.tokens and out.shape[2] != AH * HEADS:  # queries, whose heads are rows
            self.found.add(func._schema.name)
        return out


@pytest.mark.parametrize(("n", "steer"), [(1, False), (1, True), (N, False)])
def test_no_flow_step_copies_keys_and_values_of_the_prefix(kind, n, steer):
    served = serving(build(kind))
    with torch.no_grad():
        prefix = served.encode(observation())
        tokens, addresses = prefix.pad_mask.shape[1], [k.data_ptr() for k, _ in prefix.keys_values]
        ready = served.ready(prefix, flow_times(STEPS, served.device), n)
        x = noise(B * n).requires_grad_(steer)
        with Copies(tokens) as copies, torch.set_grad_enabled(steer):
            served.velocity_at(ready, x, 1)
    assert copies.found == set()
    assert ready.flow.past[0][0].shape[2] == tokens + served.states + AH  # a sample's keys, none of another's
    if n == 1:  # in the room that the prefix came with
        assert [k.data_ptr() for k, _ in ready.flow.past] == addresses


def test_several_samples_of_a_row_have_the_loss_and_gradients_of_repeated_rows(kind):
    policy = build(kind).train()
    generator = torch.Generator().manual_seed(1)
    chunk, start = (torch.randn(B * N, AH, AD, generator=generator) for _ in range(2))
    t, keep = torch.rand(B * N, generator=generator), torch.zeros(B * N, AH, dtype=torch.bool)
    found = []
    for share in (for_samples, lambda _, prefix, n: prefix.repeat(n)):
        policy.zero_grad(set_to_none=True)
        prefix = share(policy, policy.encode(observation()), N)
        loss = flow_loss(policy, prefix, chunk, keep, torch.ones(B * N), start, t)
        loss.mean().backward()
        found.append(
            (len(prefix), loss.detach(), {n: p.grad for n, p in policy.named_parameters() if p.grad is not None})
        )
    (rows, shared, gradients), (_, repeated, wanted) = found
    assert rows == B
    torch.testing.assert_close(shared, repeated, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-5, rtol=1e-4, msg=name)


def test_samples_of_a_row_are_differentiable_in_parameters(kind):
    """Under gradient, what a later step writes must not overwrite what an earlier one needs."""
    policy = build(kind)
    sample(policy, policy.encode(observation()), noise(), STEPS).sum().backward()
    assert policy.core.action_in_proj.weight.grad.abs().sum() > 0


def test_adapters_stay_what_they_are(kind):
    policy = build(kind, train="lora", lora_rank=2)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    want = chunks(policy)
    torch.testing.assert_close(chunks(serving(policy)), want, atol=1e-5, rtol=1e-4)
    assert not hasattr(policy.expert.layers[0].self_attn, "qkv")


def test_bf16_is_served_without_autocast(kind, library, monkeypatch):
    served, want = serving(build(kind, precision="bfloat16")), chunks(library)

    def never(*_):
        raise AssertionError("autocast while serving")

    monkeypatch.setattr("serl_launcher.policies.pi0.head.compute", never)
    with torch.no_grad():
        prefix = served.encode(observation())
    assert {x.dtype for pair in prefix.keys_values for x in pair} == {torch.bfloat16}
    assert prefix.hidden.dtype == torch.bfloat16
    assert served.features(prefix).dtype == torch.float32
    torch.testing.assert_close(chunks(served), want, atol=0.1, rtol=0.1)


def test_without_features_the_last_layer_ends_at_its_keys(kind):
    served = serving(build(kind))
    with torch.no_grad():
        whole, short = (served.encode(observation(), features=asked) for asked in (True, False))
    for mine, other in zip(whole.keys_values, short.keys_values, strict=True):
        tokens = whole.pad_mask.shape[1]
        assert torch.equal(mine[0][:, :, :tokens], other[0][:, :, :tokens])
    assert short.hidden is None
    with pytest.raises(ValueError, match="features=False"):
        served.features(short)


def test_a_policy_that_serves_is_not_copied_in_silence(kind):
    moved = copy.deepcopy(serving(build(kind)))
    with pytest.raises(RuntimeError, match="moved, cast or copied"):
        chunks(moved)


def test_a_prefix_that_is_ready_is_not_repeated(kind):
    served = serving(build(kind))
    with torch.no_grad():
        ready = served.ready(served.encode(observation()), flow_times(STEPS, served.device))
    with pytest.raises(ValueError, match="before it is made ready"):
        ready.repeat(2)
    assert len(replace(ready, flow=None).repeat(2)) == 2 * B


@pytest.mark.slow
def test_compiled_steps_read_new_parameters_from_the_fused_buffers(kind):
    torch._dynamo.reset()
    plain, compiled = (serving(build(kind)) for _ in range(2))
    compiled.compile_layers("on", "aot_eager")
    for _ in range(2):
        torch.testing.assert_close(chunks(compiled), chunks(plain), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(guided(compiled), guided(plain), atol=1e-5, rtol=1e-4)
        with torch.no_grad():
            for mine, other in zip(plain.parameters(), compiled.parameters(), strict=True):
                mine.mul_(1.05)
                other.copy_(mine)
    for layer in (compiled._layer, compiled._vision_layer):
        assert layer._forms
        assert not layer._failed
