"""What a session with a card runs first (`bash test.sh -m gpu`): answers, swaps, training and memory on CUDA.

Every test runs on a CPU as well (most are slow there), through the same code: graphs are recordings then, as in
test_graphs, and inductor is aot_eager. Figures are compared at full float32 precision: there graphs, compiled layers
and plain ones differ by the order of their sums alone (1e-4 of the action range on a card); bfloat16 keeps 8 bits
(2e-2). TF32, in which a card serves, would part them by 1e-3 a product.
"""

import copy
import logging
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from omegaconf import OmegaConf
from serving_samples import body
from test_graphs import record
from tiny import HORIZON, ROOT, SPEC, random_batch, tiny_config, tiny_policy

from serl_launcher.agents.flow_matching import FlowMatchingAgent
from serl_launcher.learner import checkpoint
from serl_launcher.learner.learner import REFUSED, Learner
from serl_launcher.learner.step_log import numbers
from serl_launcher.policies import kernels
from serl_launcher.policies.base import PolicyInput, flow_loss
from serl_launcher.policies.pi0.build import build_pi0
from serl_launcher.policies.pi0.tiny import TinySize
from serl_launcher.run.parameters import publish
from serl_launcher.serving import graphs
from serl_launcher.serving.engine import PolicyEngine
from serl_launcher.serving.graphs import GraphRunner, capture_cuda
from serl_launcher.serving.query import query_from_body
from serl_launcher.serving.upload import Upload

ON_CARD = pytest.param("cuda", marks=pytest.mark.gpu)
SLOW_ON_CPU = pytest.param("cpu", marks=pytest.mark.slow)
SERVED = [
    ("pi0_tiny", "float32", "on"),
    ("pi0_tiny", "bfloat16", "on"),
    ("pi05_tiny", "bfloat16", "off"),
    ("groot_tiny", "float32", "on"),
    ("groot_tiny", "bfloat16", "off"),
]


@pytest.fixture(autouse=True)
def chosen_kernels_come_back():
    names = {name: getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in kernels.ATTENTION}
    with kernels.exact():
        yield
    for name, on in names.items():
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(on)


def compiler(device):
    return "inductor" if device == "cuda" else "aot_eager"


def engine_on(device, folder, name, precision, compile):
    cfg = tiny_config(serving__device=device, serving__max_batch=2)
    cfg.policy = OmegaConf.load(ROOT / "config" / "policy" / f"{name}.yaml")
    options = {"action_horizon": HORIZON, "precision": precision, "attention": "sdpa"}
    cfg.policy = OmegaConf.merge(cfg.policy, options)
    cfg.policy.size.image_size = 32
    engine = PolicyEngine(cfg, folder)
    engine.policy.compile_layers(compile, compiler(device))
    if device == "cpu":
        engine._graphs, engine._upload = GraphRunner(engine._forward, record), Upload(engine.device, 1000)
    torch.set_float32_matmul_precision("highest")  # the engine chose TF32
    return engine


def plain(engine, queries):
    """Without graphs and compiled code."""
    captured, engine._graphs = engine._graphs, None
    try:
        with torch.compiler.set_stance("force_eager"):
            return np.stack(engine.act(queries))
    finally:
        engine._graphs = captured


@pytest.mark.parametrize("device", [SLOW_ON_CPU, ON_CARD])
@pytest.mark.parametrize(("name", "precision", "compile"), SERVED)
def test_graphs_and_compiled_layers_answer_as_plain_ones_and_follow_swaps(
    device, name, precision, compile, tmp_path, caplog
):
    caplog.set_level(logging.INFO, "policy")
    engine = engine_on(device, tmp_path, name, precision, compile)
    engine.warm_up()
    assert engine._graphs.captured == 2, caplog.text
    assert "attention calls of an answer: " in caplog.text
    places = {n: p.data_ptr() for n, p in engine.policy.named_parameters()}
    queries, answers = [query_from_body(body(k), SPEC) for k in range(2)], []
    for version in (0, 1):
        tensors = {n: p.detach().cpu().float() + 0.02 * version for n, p in engine._published.items()}
        published = {"step": 0, "base": engine._base, "policy": "t", "now": 0.0, "keep": 3}
        publish(tmp_path, tensors, version=version, **published)
        assert engine.refresh(), caplog.text
        for n in (1, 2):
            answers.append(np.stack(engine.act(queries[:n])))
            atol = 2e-2 if precision == "bfloat16" else 1e-4
            np.testing.assert_allclose(answers[-1], plain(engine, queries[:n]), atol=atol)
    assert not np.allclose(answers[1], answers[3], atol=1e-3)
    assert places == {n: p.data_ptr() for n, p in engine.policy.named_parameters()}
    assert (engine._graphs.captured, engine._graphs.plain) == (2, 0)
    assert "runs uncompiled" not in caplog.text


@pytest.mark.parametrize("device", [SLOW_ON_CPU, ON_CARD])
def test_compiled_layers_train_under_checkpoints(device, caplog):
    size = TinySize(width=16, vision_width=16, image_size=32, patch_size=16)
    policy = build_pi0("t", SPEC, "random", 0, HORIZON, size, attention="sdpa").to(device).train()
    compiled = copy.deepcopy(policy)
    compiled.compile_layers("on", compiler(device))
    compiled.checkpointing = True
    want, got = gradients(policy, device), gradients(compiled, device)
    assert "runs uncompiled" not in caplog.text
    assert want.keys() <= got.keys()
    for name, gradient in got.items():
        expected = want.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-2, msg=name)


def gradients(policy, device):
    batch, generator = random_batch(2), torch.Generator().manual_seed(0)
    chunk, noise = (torch.randn(2, HORIZON, policy.action_dim, generator=generator).to(device) for _ in range(2))
    keep, ones = torch.zeros(2, HORIZON, dtype=torch.bool, device=device), torch.ones(2, device=device)
    prefix = policy.encode(PolicyInput(batch.images, batch.state, batch.prompts))
    loss = flow_loss(policy, prefix, chunk, keep, ones, noise, 0.4 * ones)
    loss.sum().backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("device", ["cpu", ON_CARD])
def test_a_bucket_that_goes_gives_its_memory_back(device, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_BUCKETS", 2)
    alive = []

    def watched(forward, inputs, pool):
        made = (record if device == "cpu" else capture_cuda)(forward, inputs, pool)
        alive.append(weakref.ref(made[0]))
        return made

    runner = GraphRunner(lambda inputs: inputs["x"] * 2, watched)
    allocated = []
    for k in range(8):
        x = torch.ones(2**k, 2 ** (20 - k), device=device)
        assert runner({"noise": x[:1], "x": x}).shape == x.shape
        del x
        allocated.append(torch.cuda.memory_allocated() if device == "cuda" else 0)
    assert [reference() is not None for reference in alive] == [False] * 6 + [True] * 2
    assert allocated[-1] <= allocated[2] + 2**20


@pytest.fixture
def learner_on():
    """Learners of the tiny policy on a device; accelerate knows one device a process."""

    def make(device):
        AcceleratorState._reset_state(reset_partial_state=True)
        agent = FlowMatchingAgent(tiny_policy(), noise_samples=2)
        optimizer = partial(torch.optim.AdamW, lr=1e-3)
        return Learner(agent, optimizer, Accelerator(cpu=device == "cpu"), max_grad_norm=1.0, ema_decay=0.9)

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("device", [SLOW_ON_CPU, ON_CARD])
def test_a_step_that_is_not_finite_is_left_out_by_the_device(device, learner_on):
    learner, bad = learner_on(device), random_batch()
    bad.state[0, 0] = np.nan
    assert numbers([learner.step(random_batch(), 1.0)])[0][REFUSED] == 0
    before = {name: tensor.clone() for name, tensor in learner.tensors().items()}
    assert {tensor.device.type for tensor in before.values()} == {device}
    assert numbers([learner.step(bad, 1.0)])[0][REFUSED] == 1
    assert all(torch.equal(before[name], tensor) for name, tensor in learner.tensors().items())
    assert numbers([learner.step(random_batch(), 1.0)])[0][REFUSED] == 0
    assert not all(torch.equal(before[name], tensor) for name, tensor in learner.tensors().items())


@pytest.mark.parametrize("device", [SLOW_ON_CPU, ON_CARD])
def test_a_checkpoint_goes_to_the_card_by_the_host_and_nothing_is_there_twice(device, learner_on, tmp_path):
    learner = learner_on(device)
    learner.step(random_batch(), 1.0)
    state = {"step": 1, "counters": learner.counters()}
    folder = checkpoint.save(tmp_path, 1, learner.tensors(), learner.optimizer_state(), state, keep=1)
    want = {name: tensor.clone() for name, tensor in learner.tensors().items()}
    learner.step(random_batch(), 1.0)
    allocated = torch.cuda.memory_allocated() if device == "cuda" else 0
    tensors, optimizer, _ = checkpoint.load(folder, learner.on_card)
    moments = [x for group in optimizer.values() for row in group["state"].values() for x in row.values()]
    assert {x.device.type for x in [*moments, *tensors.values()]} == {"cpu"}
    learner.load_tensors(tensors)
    learner.load_optimizer_state(optimizer)
    del optimizer, moments
    assert all(torch.equal(want[name], tensor) for name, tensor in learner.tensors().items())
    if device == "cuda":
        assert torch.cuda.memory_allocated() <= allocated + 2**16
