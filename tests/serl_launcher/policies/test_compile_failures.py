"""What may go wrong between a layer and its compiler: whose error it is, what is compiled anew, and what is said."""

import logging

import pytest
import torch
from tiny import SPEC
from torch import nn

from serl_launcher.policies import compiling
from serl_launcher.policies.base import PolicyInput, sample
from serl_launcher.policies.compiling import CompiledLayer, run_layer
from serl_launcher.policies.pi0.build import build_pi0
from serl_launcher.policies.pi0.tiny import TinySize


def layer_function(module, x):
    return module(torch.tanh(x)).sin()


class Backend:
    """Counts the graphs that it is given; fails on a size that is a symbol, as a CUDA graph would."""

    def __init__(self, made=None):
        self.graphs, self._made = 0, made

    def __call__(self, graph, inputs):
        self.graphs += 1
        symbolic = [node.name for node in graph.graph.nodes if isinstance(node.meta.get("example_value"), torch.SymInt)]
        if symbolic or any(isinstance(x, torch.SymInt) for x in inputs):
            raise RuntimeError(f"symbolic sizes: {symbolic}")
        return self._made or graph.forward


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING, "policy")
    return lambda: [r.getMessage() for r in caplog.records if "policy.compile" in r.getMessage()]


@pytest.fixture
def module():
    torch.manual_seed(0)
    return nn.Linear(4, 4)


def test_compiled_layers_are_recomputed_in_backward_as_plain_ones_are(module, said):
    backend, x = Backend(), torch.randn(3, 4)
    gradients = []
    for function in (layer_function, CompiledLayer(layer_function, "on", backend)):
        module.zero_grad()
        y = x
        for _ in range(2):
            y = run_layer(True, function, module, y)
        y.sum().backward()
        gradients.append(module.weight.grad.clone())
    torch.testing.assert_close(*gradients)
    assert backend.graphs == 2  # of an input without gradient and of one with
    assert said() == []


def test_an_error_of_the_layer_itself_is_its_callers_and_compiling_goes_on(module, said):
    backend = Backend()
    layer = CompiledLayer(layer_function, "on", backend)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        layer(module, torch.zeros(2, 5))
    assert layer(module, torch.zeros(2, 4)).shape == (2, 4)
    assert backend.graphs == 1
    assert said() == []


@pytest.mark.parametrize(
    "error",
    [RuntimeError("No available kernel. Aborting execution."), torch.OutOfMemoryError("CUDA out of memory")],
)
def test_what_compiled_code_raises_is_not_the_compilers(module, said, error):
    def fails(*inputs):
        raise error

    layer = CompiledLayer(layer_function, "on", Backend(fails))
    for _ in range(2):
        with pytest.raises(type(error), match=str(error)):
            layer(module, torch.zeros(2, 4))
    assert said() == []


def test_every_batch_size_is_compiled_with_its_own_static_shapes(module, said):
    backend = Backend()
    layer = CompiledLayer(layer_function, "on", backend)
    # torch's own limit is eight shapes a function; here it is reached sooner.
    with torch.inference_mode(), torch._dynamo.config.patch(recompile_limit=2):
        for size in (1, 2, 3, 4, 5, 2, 5):
            x = torch.randn(size, 4)
            torch.testing.assert_close(layer(module, x), layer_function(module, x))
    assert backend.graphs == 5
    assert said() == []


def test_the_bound_on_compiled_forms_is_said_when_it_is_reached(module, said, monkeypatch):
    monkeypatch.setattr(compiling, "MAX_FORMS", 2)
    backend = Backend()
    layer = CompiledLayer(layer_function, "on", backend)
    for size in (1, 2, 3, 4, 1, 3):
        x = torch.randn(size, 4)
        torch.testing.assert_close(layer(module, x), layer_function(module, x))
    assert backend.graphs == 2
    assert said() == [
        "policy.compile: layer_function is compiled for 2 forms of its inputs, no more: others run uncompiled, the "
        "first has x of (3, 4)"
    ]


def test_what_torch_gives_up_on_is_said_and_what_is_compiled_stays(module, said):
    """A layer that cannot be compiled in one piece; torch would run it in two, and say nothing."""

    def broken_at_four(module, x):
        if len(x) == 4:
            torch._dynamo.graph_break()
        return module(x)

    backend = Backend()
    layer = CompiledLayer(broken_at_four, "on", backend)
    for size in (2, 4, 5, 2):
        x = torch.randn(size, 4)
        torch.testing.assert_close(layer(module, x), module(x))
    assert backend.graphs == 1
    assert len(said()) == 1
    assert "broken_at_four runs uncompiled: " in said()[0]


def test_the_compilers_reason_is_in_the_line(module, said):
    def broken(graph, inputs):
        raise NotImplementedError("no such kernel\nmore")

    layer = CompiledLayer(layer_function, "on", broken)
    layer(module, torch.zeros(2, 4))
    assert said() == ["policy.compile: layer_function runs uncompiled: NotImplementedError: no such kernel"]


@pytest.mark.slow
def test_pi0_compiles_one_graph_a_batch_size_and_kind_of_layer(said):
    size = TinySize(width=16, vision_width=16, image_size=32, patch_size=16)
    policy = build_pi0("t", SPEC, "random", 0, 4, size, attention="sdpa").requires_grad_(False)
    backend = Backend()
    policy.compile_layers("on", backend)
    counts = []
    for b in (1, 2, 3, 2):
        images = {camera: torch.zeros(b, 32, 32, 3, dtype=torch.uint8).numpy() for camera in SPEC.cameras}
        observation = PolicyInput(images, torch.zeros(b, 3).numpy(), ["pick up"] * b)
        with torch.inference_mode():
            sample(policy, policy.encode(observation), torch.zeros(b, 4, policy.action_dim), 2)
        counts.append(backend.graphs)
    kinds = counts[0]
    assert 0 < kinds <= 6  # not one a layer: of the tower, the language model and its last layer, the expert's
    assert counts == [kinds, 2 * kinds, 3 * kinds, 3 * kinds]
    assert said() == []
