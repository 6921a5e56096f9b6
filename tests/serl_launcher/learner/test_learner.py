"""The learner: it learns, its average follows, and a checkpoint continues to the same bits."""

import copy
import math
import re

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tiny import random_batch, tiny_policy

from serl_launcher.agents.base import ParameterGroup
from serl_launcher.agents.flow_matching import FlowMatchingAgent
from serl_launcher.learner import checkpoint
from serl_launcher.learner.learner import Learner, Schedule
from serl_launcher.learner.stage import StageProgress, StageSettings, TrainingStage
from serl_launcher.learner.step_log import numbers


def make_learner(lr=3e-3):
    agent = FlowMatchingAgent(tiny_policy(), noise_samples=2)
    return Learner(
        agent, lambda p: torch.optim.AdamW(p, lr=lr), Accelerator(cpu=True), max_grad_norm=1.0, ema_decay=0.9
    )


def test_the_loss_of_a_fixed_batch_falls():
    torch.manual_seed(0)
    learner, batch = make_learner(lr=1e-2), random_batch()
    losses = [learner.step(batch, 1.0)["losses/flow"] for _ in range(25)]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])


class Quadratic(torch.nn.Module):
    """Its loss on a batch x is the mean of (w − x)²: the gradient is 2 (w − mean x)."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(()))

    def forward(self, batch, step):
        loss = (self.w - batch).square().mean()
        return {"policy": loss}, {"losses/flow": loss.detach()}

    def groups(self):
        return {"policy": ParameterGroup({"w": self.w})}

    def trainable_state(self):
        return {"w": self.w}

    def after_step(self, taken):
        pass


def test_several_batches_make_the_step_of_one_that_holds_them_all():
    xs, ends = torch.tensor([1.0, 2.0, 4.0, 9.0]), []
    for batch in (xs, [xs[:2], xs[2:]]):
        learner = Learner(
            Quadratic(), lambda p: torch.optim.SGD(p, lr=0.1), Accelerator(cpu=True), max_grad_norm=1e9, ema_decay=0.9
        )
        metrics = learner.step(batch, 1.0)
        ends.append((learner.agent.w.item(), float(metrics["losses/flow"]), float(metrics["optim/grad_norm"])))
    assert ends[0] == pytest.approx((0.1 * 2 * 4, 25.5, 8.0))  # mean of x: 4, of x²: 25.5
    assert ends[1] == pytest.approx(ends[0])


def test_the_average_takes_the_policys_place_for_a_look():
    learner = make_learner()
    for _ in range(2):
        learner.step(random_batch(), 1.0)
    name = "core.action_out_proj.weight"
    raw, average = learner.agent.trainable_state()[name].detach().clone(), learner.averaged[name].clone()
    with learner.averaged_in_place() as agent:
        assert torch.equal(agent.trainable_state()[name], average)
    assert torch.equal(learner.agent.trainable_state()[name], raw)
    assert torch.equal(learner.averaged[name], average)


def test_the_average_lies_between_start_and_now():
    learner = make_learner()
    name = "core.action_out_proj.weight"
    start = learner.averaged[name].clone()
    for _ in range(5):
        learner.step(random_batch(), 1.0)
    now, average = learner.agent.trainable_state()[name], learner.averaged[name]
    assert not torch.equal(average, start)
    assert (average - start).norm() < (now - start).norm()


@pytest.mark.parametrize("mapped", [False, True])
def test_resuming_gives_the_same_parameters_as_going_on(tmp_path, mapped):
    torch.manual_seed(0)
    first = make_learner()
    for k in range(3):
        first.step(random_batch(seed=k), 1.0)
    state = {"counters": first.counters(), "torch_rng": torch.get_rng_state().tolist()}
    folder = checkpoint.save(tmp_path, 3, first.tensors(), first.optimizer_state(), state, keep=2)
    for k in range(3, 6):
        first.step(random_batch(seed=k), 1.0)

    second = make_learner()
    tensors, optimizer, state = checkpoint.load(folder, mapped)
    second.load_tensors(tensors)
    second.load_optimizer_state(optimizer)
    second.load_counters(state["counters"])
    torch.set_rng_state(torch.tensor(state["torch_rng"], dtype=torch.uint8))
    for k in range(3, 6):
        second.step(random_batch(seed=k), 1.0)
    assert second.step_count == 6
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, second.tensors()[name]), name


def test_a_step_that_is_not_finite_is_refused_and_changes_nothing():
    learner = make_learner()
    learner.step(random_batch(), 1.0)
    before = {n: t.clone() for n, t in learner.tensors().items()}
    bad = random_batch()
    bad.state[0, 0] = np.nan
    row = numbers([learner.step(bad, 1.0)])[0]
    told = r"step 2: losses/flow nan, optim/grad_norm nan; the step was not taken"
    assert re.fullmatch(told, str(learner.fault(2, row)))
    assert all(torch.equal(before[n], t) for n, t in learner.tensors().items())
    state = learner.optimizer_state()["policy"]["state"].values()
    assert all(torch.isfinite(x).all() for row in state for x in row.values())
    assert {float(row["step"]) for row in state} == {1.0}
    row = numbers([learner.step(random_batch(), 1.0)])[0]
    assert learner.fault(3, row) is None
    assert not torch.equal(
        before["raw.core.action_out_proj.weight"], learner.tensors()["raw.core.action_out_proj.weight"]
    )


def test_an_optimizer_that_cannot_leave_a_step_out_is_not_called():
    learner = Learner(
        Quadratic(), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), Accelerator(cpu=True), max_grad_norm=1e9,
        ema_decay=0.9,
    )  # fmt: skip
    assert learner.fault(1, numbers([learner.step(torch.tensor([math.nan]), 1.0)])[0])
    assert learner.agent.w.item() == 0
    assert not learner.optimizer_state()["policy"]["state"]
    learner.step(torch.tensor([4.0]), 1.0)
    assert learner.agent.w.item() == pytest.approx(0.8)


def test_the_optimizer_of_a_checkpoint_goes_on_however_it_was_run():
    """One of before optimizers were fused on a CPU."""
    torch.manual_seed(0)
    first = make_learner()
    first.step(random_batch(), 1.0)
    state = copy.deepcopy(first.optimizer_state())
    for group in state["policy"]["param_groups"]:
        group["fused"] = None
    second = make_learner()
    second.load_tensors(first.tensors())
    second.load_optimizer_state(state)
    second.load_counters(first.counters())
    for learner in (first, second):
        torch.manual_seed(1)
        learner.step(random_batch(seed=1), 1.0)
    assert all(torch.equal(t, second.tensors()[n]) for n, t in first.tensors().items())


def test_a_checkpoint_of_another_shape_is_named():
    learner = make_learner()
    tensors = {n: t.clone() for n, t in learner.tensors().items()}
    tensors["raw.core.action_out_proj.bias"] = torch.zeros(7)
    with pytest.raises(ValueError, match=r"raw.core.action_out_proj.bias: expected shape \(2,\), got \(7,\)"):
        learner.load_tensors(tensors)


def test_a_checkpoint_without_manifest_never_existed(tmp_path):
    learner = make_learner()
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, learner.tensors(), learner.optimizer_state(), {}, keep=2)
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step_000002", "step_000003"]
    (tmp_path / "step_000003" / "manifest.json").unlink()
    (tmp_path / "step_000002" / "tensors.safetensors").write_bytes(b"torn")
    assert checkpoint.complete(tmp_path) == []


def test_schedule_warms_up_and_ends_at_its_share_of_the_peak():
    schedule = Schedule(peak=0.5, steps=100, warmup=10, final=0.1)
    assert schedule.scale(0) == pytest.approx(0.05, rel=0.01)
    # Half way the cosine is 0.1 + 0.9 · 0.5.
    assert schedule.scale(50) == pytest.approx(0.5 * 0.55)
    assert schedule.scale(100) == pytest.approx(0.05)


def test_an_online_stage_takes_no_more_steps_than_its_new_transitions_allow():
    stages = StageProgress(
        StageSettings(warmup_steps=1, final_lr_scale=0.1, online_lr_scale=0.5, max_steps_per_tick=2.0)
    )
    online, train = TrainingStage("s", "online", 100), TrainingStage("t", "train", 100)
    stages.enter(online, 500)
    assert not stages.allows(online, 500)
    for _ in range(19):
        stages.count(online)
    assert stages.allows(online, 510)
    stages.count(online)
    assert not stages.allows(online, 510)
    assert stages.allows(train, 500)
