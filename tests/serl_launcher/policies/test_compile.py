"""torch.compile of the layers: same numbers, same gradients, new weights seen, a compiler that fails is told once."""

import copy
import logging
import shutil

import numpy as np
import pytest
import torch
from tiny import SPEC

from serl_launcher.policies.base import PolicyInput, flow_loss, sample
from serl_launcher.policies.compiling import CompiledLayer, check_switch
from serl_launcher.policies.groot.build import build_groot
from serl_launcher.policies.groot.tiny import TinyGrootSize
from serl_launcher.policies.pi0.build import build_pi0, build_pi05
from serl_launcher.policies.pi0.tiny import TinyPI05Size, TinySize

B, AH = 2, 4
SHAPE = dict(width=16, vision_width=16, image_size=32, patch_size=16)
BUILD = {
    "pi0": lambda: build_pi0("t", SPEC, "random", 0, AH, TinySize(**SHAPE), attention="sdpa"),
    "pi05": lambda: build_pi05("t", SPEC, "random", 0, AH, TinyPI05Size(**SHAPE), attention="sdpa"),
    "groot": lambda: build_groot("t", SPEC, "random", 0, AH, TinyGrootSize(image_size=32)),
}


def observation():
    rng = np.random.default_rng(0)
    images = {camera: rng.integers(0, 256, (B, 32, 32, 3), dtype=np.uint8) for camera in SPEC.cameras}
    return PolicyInput(images, rng.uniform(-1, 1, (B, 3)).astype(np.float32), ["pick up", "pick up the red cube"])


def chunks(policy):
    noise = torch.randn(B, AH, policy.action_dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return sample(policy, policy.encode(observation()), noise, steps=3)


def gradients(policy):
    generator = torch.Generator().manual_seed(1)
    chunk, noise = (torch.randn(B, AH, policy.action_dim, generator=generator) for _ in range(2))
    t = torch.rand(B, generator=generator)
    keep = torch.zeros(B, AH, dtype=torch.bool)
    policy.zero_grad(set_to_none=True)
    flow_loss(policy, policy.encode(observation()), chunk, keep, torch.ones(B), noise, t).sum().backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def failures(caplog):
    return [r.getMessage() for r in caplog.records if "runs uncompiled" in r.getMessage()]


@pytest.mark.parametrize(
    ("kind", "backend"),
    [pytest.param(kind, backend, marks=pytest.mark.slow) for kind in BUILD for backend in ("aot_eager", "inductor")],
)
def test_compiled_layers_compute_the_same_and_see_new_weights(kind, backend, caplog):
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler on a CPU")
    torch._dynamo.reset()
    policy = BUILD[kind]()
    compiled = copy.deepcopy(policy)
    compiled.compile_layers("on", backend)
    with caplog.at_level(logging.WARNING, "policy"):
        for _ in range(2):
            torch.testing.assert_close(chunks(compiled), chunks(policy), atol=1e-5, rtol=1e-4)
            with torch.no_grad():
                for mine, theirs in zip(policy.parameters(), compiled.parameters(), strict=True):
                    mine.mul_(1.05)
                    theirs.copy_(mine)
        want, got = gradients(policy), gradients(compiled)
    assert failures(caplog) == []
    assert want.keys() <= got.keys()  # a compiled layer has zeros where the plain one has none
    for name, gradient in got.items():
        expected = want.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, expected, atol=2e-5, rtol=1e-3, msg=name)


def test_a_compiler_that_fails_costs_one_line(caplog):
    def broken(graph, inputs):
        raise RuntimeError("no such kernel")

    policy = BUILD["pi0"]()
    want = chunks(policy)
    policy.compile_layers("on", broken)
    with caplog.at_level(logging.WARNING, "policy"):
        assert torch.equal(chunks(policy), want)
        assert torch.equal(chunks(policy), want)
    assert [line.split()[1] for line in failures(caplog)] == ["vision_layer", "gemma_layer"]


def test_auto_compiles_nothing_on_a_cpu():
    def never(graph, inputs):
        raise AssertionError("compiled on a CPU")

    layer = CompiledLayer(lambda module, x: x + 1, "auto", never)
    assert layer(None, torch.zeros(1)).item() == 1


def test_the_switch_names_its_key():
    assert [check_switch("policy.compile", x) for x in (True, False, "auto")] == ["on", "off", "auto"]
    with pytest.raises(ValueError, match=r"policy\.compile: expected one of .* got 'yes'"):
        build_pi0("t", SPEC, "random", 0, AH, TinySize(**SHAPE), compile="yes")
