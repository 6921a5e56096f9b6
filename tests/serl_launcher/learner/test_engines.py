"""Several ranks learn what one does: processes over gloo, each engine and algorithm; checkpoints go both ways."""

import math
import re
from dataclasses import fields, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from ranks_rig import on_ranks
from tiny import HORIZON, SPEC, random_batch, random_transitions, tiny_config
from toy_flow import ToyFlow

from serl_launcher.agents import shares
from serl_launcher.agents.build import build_agent, build_policy
from serl_launcher.agents.flow_matching import FlowMatchingAgent
from serl_launcher.learner import checkpoint
from serl_launcher.learner.engines import Engine, Sharded, make_accelerator, make_engine
from serl_launcher.learner.learner import Learner
from serl_launcher.policies.groot.build import build_groot
from serl_launcher.policies.groot.tiny import TinyGrootSize
from serl_launcher.policies.sharding import rows_of
from serl_launcher.replay.learning import LearningBatch

CPU = OmegaConf.create({"trainer": {"device": "cpu"}})


def test_shares_of_a_draw_are_the_draw():
    draws = {
        "rows": lambda b: shares.normal((b, 3), torch.device("cpu")),
        "second axis": lambda b: shares.normal((2, b, 3), torch.device("cpu"), axis=1).movedim(1, 0),
        "uniform": lambda b: shares.uniform((b,), torch.device("cpu")),
        "times": lambda b: shares.times(b, torch.device("cpu")),
    }
    for name, draw in draws.items():
        torch.manual_seed(3)
        whole = draw(6)
        found = []
        for rank in range(3):
            torch.manual_seed(3)
            with shares.sharing(rank, 3):
                found.append(draw(2))
        assert torch.equal(torch.cat(found), whole), name
    with shares.sharing(0, 4), pytest.raises(ValueError, match="6 rows cannot be shared equally by 4 ranks"):
        shares.mine(torch.zeros(6))


def test_an_engine_that_cannot_be_is_refused():
    two, one = (SimpleNamespace(process_index=0, num_processes=n) for n in (2, 1))
    made = [
        type(make_engine(OmegaConf.create({"launch": {"engine": e}}), two)) for e in (None, "ddp", "zero2", "fsdp2")
    ]
    assert made == [Engine, Engine, Sharded, Sharded]
    assert type(make_engine(OmegaConf.create({"launch": {"engine": "fsdp2"}}), one)) is Engine  # nothing to part
    with pytest.raises(ValueError, match=r"launch\.engine=plain: expected one process, got 2"):
        make_engine(OmegaConf.create({"launch": {"engine": "plain"}}), two)
    with pytest.raises(ValueError, match=r"launch\.engine: expected one of plain, ddp, zero2, fsdp2, got 'zero3'"):
        make_engine(OmegaConf.create({"launch": {"engine": "zero3"}}), one)
    with pytest.raises(ValueError, match=r"Adagrad is not known .*launch\.engine=ddp"):
        Sharded(two, reshard=True).check(object.__new__(torch.optim.Adagrad))


def test_rows_are_dealt_as_torch_deals_them():
    for n, ranks in [(5, 2), (1, 2), (4, 3), (2, 4), (8, 8)]:
        chunks = torch.arange(n).chunk(ranks)
        for rank in range(ranks):
            want = chunks[rank] if rank < len(chunks) else torch.arange(0)
            assert torch.equal(rows_of(torch.arange(n), rank, ranks), want), (n, ranks, rank)


class Weighed(FlowMatchingAgent):
    """Its loss is not finite where a row's state is beyond 5."""

    def forward(self, batch, step):
        losses, metrics = super().forward(batch, step)
        return {"policy": losses["policy"] + (math.inf if (batch.state > 5).any() else 0)}, metrics


def toy_steps(engine):
    """Six steps, of which the fourth's batch is bad in the last row alone; the curve and what there is then."""
    accelerator = make_accelerator(CPU)
    engine = make_engine(OmegaConf.create({"launch": {"engine": engine}}), accelerator)
    torch.manual_seed(0)
    agent = Weighed(ToyFlow(state_dim=3, ah=HORIZON, ad=2, width=7), noise_samples=2)  # rows that no two ranks share
    adam = partial(torch.optim.Adam, lr=1e-2)
    learner = Learner(agent, adam, accelerator, max_grad_norm=1.0, ema_decay=0.9, engine=engine)
    curve = []
    for k in range(6):
        batch = replace(random_batch(4, seed=k), images={})
        batch.state[-1] = 9.0 if k == 3 else 0.5
        half = share(batch, engine.rank, engine.ranks)
        row = learner.step([half, half] if k == 5 else half, 1.0)
        curve.append([float(row[key]) for key in ("losses/flow", "optim/grad_norm", "optim/refused")])
    return curve, {n: t.detach().clone() for n, t in learner.tensors().items()}, learner.optimizer_state()


def test_two_ranks_take_the_steps_of_one():
    [(curve, tensors, state)] = on_ranks(1, toy_steps, "plain")
    assert [row[2] for row in curve] == [0, 0, 0, 1, 0, 0]
    for engine in ("ddp", "zero2"):
        first, second = on_ranks(2, toy_steps, engine)
        np.testing.assert_allclose(first[0], curve, rtol=1e-4, atol=1e-6, err_msg=engine)
        assert first[0] == second[0]  # all ranks say the same
        for name, tensor in tensors.items():
            torch.testing.assert_close(first[1][name], tensor, rtol=1e-4, atol=1e-5)
        assert bool(second[1]) == (engine == "ddp")
        for k, row in state["policy"]["state"].items():
            mine = first[2]["policy"]["state"][k]
            assert mine["exp_avg"].shape == row["exp_avg"].shape
            assert float(mine["step"]) == float(row["step"]) == 5


def share(batch, rank, ranks):
    """A rank's rows of a batch."""
    if isinstance(batch, LearningBatch):
        return LearningBatch(share(batch.imitation, rank, ranks), share(batch.transitions, rank, ranks))
    rows = slice(rank * len(batch) // ranks, (rank + 1) * len(batch) // ranks)

    def cut(value):
        return {k: x[rows] for k, x in value.items()} if isinstance(value, dict) else value and value[rows]

    found = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return replace(batch, **{n: v[rows] if isinstance(v, np.ndarray) else cut(v) for n, v in found.items()})


def train(algo, head, engine, steps, start=None, end=None):
    """Steps of a tiny policy, from a checkpoint where `start` names one, to one in `end`; curve, tensors and a hash."""
    cfg = tiny_config(algo, rollout__execute_horizon=2, serving__flow_steps=2, trainer__device="cpu")
    agent_settings = {"warmup_steps": 3, "critics": 3, "widths": [16], "behaviour_weight": 0.5, "memory_batch": 12}
    cfg.algo.agent.update({k: v for k, v in agent_settings.items() if k in cfg.algo.agent})
    OmegaConf.update(cfg, "launch.engine", engine, force_add=True)
    torch.manual_seed(0)
    if head == "groot":
        policy = build_groot("tiny", SPEC, "random", 0, HORIZON, TinyGrootSize(**GROOT))
    else:
        policy = build_policy(cfg, SPEC)
    accelerator = make_accelerator(cfg)
    engine = make_engine(cfg, accelerator)
    learner = Learner(
        build_agent(cfg, policy, SPEC),
        partial(torch.optim.AdamW, lr=1e-3),
        accelerator,
        max_grad_norm=1.0,
        ema_decay=0.9,
        optimizers={name: instantiate(row, _partial_=True) for name, row in (cfg.algo.get("optimizers") or {}).items()},
        engine=engine,
    )
    if start is not None:
        tensors, optimizer, state = checkpoint.load(start)
        learner.load_tensors(tensors)
        learner.load_optimizer_state(optimizer)
        learner.load_counters(state["counters"])
        torch.set_rng_state(torch.tensor(state["torch_rng"], dtype=torch.uint8))
    curve = []
    for k in range(learner.step_count, steps):
        if k in (0, 5) or k == (learner.step_count if start else 0):
            learner.begin_stage("online" if k >= 5 and "critics" in cfg.algo.agent else "train")
        batch = random_batch(8, seed=k)
        batch = batch if "critics" not in cfg.algo.agent else LearningBatch(batch, random_transitions(8, seed=k))
        curve.append({n: float(x) for n, x in learner.step(share(batch, engine.rank, engine.ranks), 1.0).items()})
    tensors, optimizer = learner.tensors(), learner.optimizer_state()
    if end is not None and engine.rank == 0:
        state = {"counters": learner.counters(), "torch_rng": torch.get_rng_state().tolist()}
        checkpoint.save(end, learner.step_count, tensors, optimizer, state, keep=1)
    with learner.averaged_in_place() as agent, torch.no_grad():
        loss = float(sum(agent(random_batch(8, seed=99), 0)[0].values())) if "critics" not in cfg.algo.agent else 0.0
    return curve, {n: t.detach().clone() for n, t in tensors.items()}, loss


GROOT = {"width": 16, "vision_width": 16, "head_width": 16, "image_size": 32}
CASES = [("reject_sampling_pi0", "pi0"), ("reject_sampling_pi0", "groot"), ("sac_pi0", "pi0"), ("dsrl_pi0", "pi0")]


def close(found, want, what):
    """Losses within 1e-4 of each other in every step, and the same metrics."""
    assert len(found) == len(want)
    for k, (a, b) in enumerate(zip(found, want, strict=True)):
        assert a.keys() == b.keys(), (what, k)
        for name in b:
            if re.match("losses/|critic/q_max", name):
                assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), (what, k, name)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("algo", "head"), CASES)
def test_every_engine_has_the_curve_of_one_rank(algo, head):
    [(curve, tensors, loss)] = on_ranks(1, train, algo, head, "plain", 50)
    for engine in ("ddp", "zero2", "fsdp2"):
        first, second = on_ranks(2, train, algo, head, engine, 50)
        close(first[0], curve, engine)
        assert first[0] == second[0], engine
        assert first[1].keys() == tensors.keys()
        assert first[2] == second[2] == pytest.approx(loss, rel=1e-3), engine
        if engine == "ddp":
            assert all(torch.equal(first[1][n], second[1][n]) for n in tensors)
        else:
            assert second[1] == {}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("algo", ["reject_sampling_pi0", "sac_pi0"])
@pytest.mark.parametrize(("before", "after"), [((2, "fsdp2"), (1, "plain")), ((1, "plain"), (2, "zero2"))])
def test_a_checkpoint_goes_on_with_another_number_of_ranks(tmp_path, algo, before, after):
    [(curve, _, _)] = on_ranks(1, train, algo, "pi0", "plain", 16)
    on_ranks(before[0], train, algo, "pi0", before[1], 8, None, tmp_path)
    (rest, *_), *_ = on_ranks(after[0], train, algo, "pi0", after[1], 16, tmp_path / "step_000008")
    close(rest, curve[8:], (before, after))
