"""SAC on a small flow: gradients by finite differences, who gets which gradient, and problems with known optima."""

import math
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from configured import agent_settings
from path_density import path_log_prob, points_of
from toy_flow import ToyFlow, chunks, take_average, transitions

from serl_launcher.agents.base import follow
from serl_launcher.agents.observations import observation
from serl_launcher.agents.sac import SACAgent, noise_unit
from serl_launcher.learner import checkpoint
from serl_launcher.learner.learner import Learner
from serl_launcher.learner.step_log import numbers
from serl_launcher.policies.base import PolicyInput, sample
from serl_launcher.replay.learning import LearningBatch
from serl_transport.contract.specs import TaskSpec


def make_agent(policy=None, horizon=None, unit=None, **settings):
    torch.manual_seed(0)
    policy = policy or ToyFlow()
    feature_dim = policy.net[0].in_features - policy.action_horizon * policy.action_dim - 1
    defaults = {
        "flow_steps": 3,
        "critics": 2,
        "widths": (32, 32),
        "warmup_steps": 0,
        "actor_period": 1,
        "behaviour_weight": 0.0,
        "normalise_q": False,
        "return_bound": False,
        "imitation_weight": 0.0,
        "tau": 0.005,
        "init_std": 0.1,
        "max_std": 0.5,
        "target_std": 0.08,
        "init_temperature": 1e-3,
        "q_limit": 1e3,
    }
    settings = agent_settings("sac_pi0", **(defaults | settings))
    horizon = policy.action_horizon if horizon is None else horizon
    return SACAgent(policy, settings, feature_dim=feature_dim, horizon=horizon, unit=unit)


def make_learner(agent, lr=3e-3, ema_decay=0.9):
    return Learner(
        agent, lambda p: torch.optim.Adam(p, lr=lr), Accelerator(cpu=True), max_grad_norm=10.0, ema_decay=ema_decay
    )


def bandit_batch(rng, b=64):
    """One state a context, one action; reward −(a − target)², target = 0.5 in state 0 and −0.4 in state 1."""
    state = rng.integers(0, 2, (b, 1)).astype(np.float32)
    action = rng.uniform(-1, 1, (b, 1, 1)).astype(np.float32)
    reward = -((action[:, 0, 0] - np.where(state[:, 0] == 0, 0.5, -0.4)) ** 2)
    return transitions(state, action, reward, state, np.ones(b), np.zeros(b))


def act(policy, state, b=64):
    """Chunks as the policy server samples them, clipped: float32[b, ah, ad]."""
    with torch.no_grad():
        prefix = policy.encode(PolicyInput({}, np.full((b, 1), state, np.float32), [""] * b))
        noise = torch.randn(b, policy.action_horizon, policy.action_dim)
        return sample(policy, prefix, noise, steps=3).clamp(-1, 1)


@pytest.mark.parametrize("squash", [False, True])
def test_the_actors_gradient_agrees_with_finite_differences(squash):
    agent = make_agent(ToyFlow(state_dim=2, ah=2, ad=1), behaviour_weight=0.7, squash=squash, init_temperature=0.3)
    agent.double()
    agent.reference.tensors = {n: p.detach() + 0.05 for n, p in agent.policy.named_parameters()}
    prefix = agent.policy.encode(PolicyInput({}, np.array([[0.3, -0.2], [0.1, 0.8]]), ["", ""]))
    noise = 0.1 * torch.randn(2, 2, 1, dtype=torch.float64)  # within the limits, where the clip is the identity
    step_noise = 0.1 * torch.randn(3, 2, 2, 1, dtype=torch.float64)
    reference = agent.reference_path(prefix, noise, step_noise, agent.noise_scale(prefix.state).detach())
    agent.reference_path = lambda *args: reference  # a target: it does not move with σ

    def loss():
        return agent.actor_loss(prefix, noise, step_noise)[0]

    loss().backward()
    checked = 0
    for parameter in [*agent.policy.parameters(), *agent.noise_scale.parameters()]:
        for index in (0, parameter.numel() // 2):
            flat, gradient = parameter.detach().view(-1), parameter.grad.view(-1)[index].item()
            kept, h = flat[index].item(), 1e-6
            with torch.no_grad():
                flat[index] = kept + h
                above = loss().item()
                flat[index] = kept - h
                below = loss().item()
                flat[index] = kept
            assert gradient == pytest.approx((above - below) / (2 * h), rel=1e-4, abs=1e-8)
            checked += gradient != 0
    assert checked > 8


def test_the_actors_loss_by_its_formula():
    agent = make_agent(ToyFlow(state_dim=2, ah=2, ad=1), behaviour_weight=0.7, init_temperature=0.3, horizon=1)
    agent.reference.tensors = {n: p.detach() * 0.5 for n, p in agent.policy.named_parameters()}
    prefix = agent.policy.encode(PolicyInput({}, np.array([[0.3, -0.2]], np.float32), [""]))
    noise, step_noise = agent.draw(1, prefix)
    loss, temperature_loss, _ = agent.actor_loss(prefix, noise, step_noise)
    with torch.no_grad():
        log_std = agent.noise_scale(prefix.state)
        path = agent.path(prefix, noise, step_noise, log_std)
        velocity = partial(agent.policy.velocity, prefix)
        points = points_of(velocity, noise, step_noise, log_std, 1)
        log_p = path_log_prob(velocity, points, log_std, 1, False)
        # The critic sees the one executed tick, clipped, and enters once.
        q = agent.critic(prefix.state, path.chunk[:, :1].clamp(-1, 1)).mean(0)
        reference = ToyFlow(state_dim=2, ah=2, ad=1)
        reference.load_state_dict(agent.reference.tensors)
        x = noise
        for k in range(3):  # the reference from the same x_0 and the same ε_k
            x = x + reference.velocity(prefix, x, torch.full((1,), k / 3)) / 3 + log_std[k].exp() * step_noise[k]
        want = 0.3 * log_p - q + 0.7 * (path.chunk - x).square().mean((1, 2))
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    temperature_loss.backward()
    assert agent.log_alpha.grad.item() == pytest.approx(-log_p.item() - agent.target_entropy, rel=1e-5)


def test_at_the_start_of_online_training_the_policy_is_its_own_reference():
    agent = make_agent(behaviour_weight=1.0)
    with torch.no_grad():
        agent.policy.net[0].weight.add_(1.0)  # imitation moved it after construction
    agent.begin_stage("online")
    prefix = agent.policy.encode(PolicyInput({}, np.zeros((4, 1), np.float32), [""] * 4))
    metrics = agent.actor_loss(prefix, *agent.draw(4, prefix))[2]
    assert metrics["actor/drift"].item() == pytest.approx(0, abs=1e-12)


def test_the_reference_moves_with_the_agent():
    agent = make_agent().double()
    assert {p.dtype for p in agent.auxiliary_state().values() if p.is_floating_point()} == {torch.float64}
    agent.to("meta")
    on_host = {name for name, p in agent.auxiliary_state().items() if p.device.type != "meta"}
    assert on_host == {"online_steps"}  # the host decides by it


def test_each_group_receives_the_gradient_of_its_own_loss_only():
    agent = make_agent(behaviour_weight=1.0)
    agent.begin_stage("online")
    batch = LearningBatch(None, bandit_batch(np.random.default_rng(0)))
    losses, _ = agent(batch, 0)
    assert set(losses) == {"actor", "critic", "temperature"}
    owners = {name: set(map(id, group.tensors.values())) for name, group in agent.groups().items()}
    for name, loss in losses.items():
        agent.zero_grad()
        loss.backward(retain_graph=True)
        touched = {id(p) for p in agent.parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert touched
        assert touched <= owners[name], name


def test_the_actor_waits_for_the_critic_and_then_takes_every_nth_step():
    agent = make_agent(warmup_steps=3, actor_period=2)
    agent.begin_stage("online")
    learner, rng = make_learner(agent), np.random.default_rng(0)
    moved = []
    for _ in range(8):
        before = agent.policy.net[0].weight.detach().clone()
        learner.step(LearningBatch(None, bandit_batch(rng, 8)), 1.0)
        moved.append(not torch.equal(before, agent.policy.net[0].weight))
    assert moved == [False, False, False, False, True, False, True, False]


def test_a_critic_beyond_its_limit_stops_the_step_and_says_so():
    agent = make_agent(q_limit=1e-9)
    agent.begin_stage("online")
    learner = make_learner(agent)
    before = {n: t.clone() for n, t in learner.tensors().items()}
    row = numbers([learner.step(LearningBatch(None, bandit_batch(np.random.default_rng(0))), 1.0)])[0]
    told = r"step 1: the critic diverges: \|Q\| = [\d.e-]+, beyond q_limit 1e-09 \(.*\); the step was not taken"
    assert re.fullmatch(told, str(learner.fault(1, row)))
    counted = "carried.online_steps"
    assert all(torch.equal(before[n], t) for n, t in learner.tensors().items() if n != counted)


def test_targets_follow_exponentially_and_stand_still_where_a_step_is_refused():
    target, source = torch.tensor([[0.0, 8.0]]), torch.tensor([[4.0, 4.0]])
    follow([target], [source], 0.25 * torch.tensor(1.0))
    assert target.tolist() == [[1.0, 7.0]]
    follow([target], [source], 0.25 * torch.tensor(0.0))
    assert target.tolist() == [[1.0, 7.0]]


def test_the_bandits_optimum_is_reached():
    agent = make_agent(target_std=0.05)
    agent.begin_stage("online")
    learner, rng = make_learner(agent, lr=1e-2, ema_decay=0.98), np.random.default_rng(0)
    torch.manual_seed(1)
    for _ in range(450):
        metrics = learner.step(LearningBatch(None, bandit_batch(rng)), 1.0)
    take_average(learner)
    for state, target in ((0, 0.5), (1, -0.4)):
        assert act(agent.policy, state).mean().item() == pytest.approx(target, abs=0.08)
        value = agent.critic(torch.full((1, 1), float(state)), torch.full((1, 1, 1), target))
        assert value.mean().item() == pytest.approx(0, abs=0.03)
    # The path kept the entropy that the temperature asks for.
    assert metrics["actor/entropy_surplus"] > -1.0


def chain_batch(rng, b=64, gamma=0.8):
    """States 0, 1, 2; a > 0 goes right, else left (0 stays); right of 2 is the goal: reward 1, terminated."""
    state = rng.integers(0, 3, b)
    action = rng.uniform(-1, 1, (b, 1, 1))
    after = np.clip(state + np.where(action[:, 0, 0] > 0, 1, -1), 0, 3)
    goal = after == 3
    scale = 0.5  # states enter as 0, 0.5, 1
    return transitions(
        state[:, None] * scale, action, goal, np.minimum(after, 2)[:, None] * scale, np.full(b, gamma), ~goal
    )


@pytest.mark.slow
def test_the_chains_optimum_is_reached():
    agent = make_agent(tau=0.1, target_members=1, target_std=0.05)
    agent.begin_stage("online")
    learner, rng = make_learner(agent), np.random.default_rng(0)
    torch.manual_seed(1)
    for _ in range(1000):  # at twice the learning rate and fewer steps its values were not stable
        learner.step(LearningBatch(None, chain_batch(rng)), 1.0)
    for state in range(3):
        assert (act(agent.policy, 0.5 * state) > 0).float().mean() > 0.95
        q = agent.critic(torch.full((1, 1), 0.5 * state), torch.full((1, 1, 1), 0.5)).mean().item()
        assert q == pytest.approx(0.8 ** (2 - state), abs=0.08)  # γ^(steps before the rewarded one)


def test_resuming_in_the_online_stage_gives_the_same_parameters_as_going_on(tmp_path):
    def run(learner, first, last):
        for k in range(first, last):
            rng = np.random.default_rng(k)
            labels = chunks(np.zeros((4, 1)), rng.uniform(-1, 1, (4, 1, 1)))
            learner.step(LearningBatch(labels, bandit_batch(rng, 8)), 1.0)

    settings = {"behaviour_weight": 1.0, "warmup_steps": 2, "actor_period": 2, "imitation_weight": 0.5}
    first = make_learner(make_agent(**settings))
    first.begin_stage("train")
    run(first, 0, 4)
    first.begin_stage("online")
    run(first, 4, 9)
    state = {"counters": first.counters(), "torch_rng": torch.get_rng_state().tolist()}
    folder = checkpoint.save(tmp_path, 9, first.tensors(), first.optimizer_state(), state, keep=1)
    run(first, 9, 14)

    second = make_learner(make_agent(**settings))
    tensors, optimizers, state = checkpoint.load(folder)
    second.load_tensors(tensors)
    second.load_optimizer_state(optimizers)
    second.load_counters(state["counters"])
    second.begin_stage("online")  # a resumed trainer enters the stage it was in
    torch.set_rng_state(torch.tensor(state["torch_rng"], dtype=torch.uint8))
    second._average_age = state["counters"]["average_age"]
    run(second, 9, 14)
    assert first.tensors().keys() == second.tensors().keys()
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, second.tensors()[name]), name
    assert any(name.startswith("carried.reference.") for name in tensors)


def test_cal_ql_lowers_values_of_unseen_actions():
    def gap(weight):
        agent = make_agent(cal_ql_weight=weight)
        agent.begin_stage("online")
        learner, rng = make_learner(agent, lr=1e-2), np.random.default_rng(0)
        torch.manual_seed(1)
        for _ in range(120):  # the data holds actions around 0.5 only, all worth 1
            action = rng.normal(0.5, 0.05, (32, 1, 1))
            zeros = np.zeros((32, 1))
            data = transitions(zeros, action, np.ones(32), zeros, np.ones(32), np.zeros(32))
            learner.step(LearningBatch(None, data), 1.0)
        q = agent.critic(torch.zeros(2, 1), torch.tensor([0.5, -0.9])[:, None, None]).mean(0)
        return (q[0] - q[1]).item()

    assert gap(0.5) > gap(0.0) + 0.3


class NarrowUnits(ToyFlow):
    """Mean and deviation of a dataset: what the robot can do, −1 to 3, lies at −1.5 and 2.5 of the model's units."""

    def normalise_actions(self, chunk, anchor=None):
        return chunk - 0.5

    def physical_actions(self, chunk, anchor=None):
        return (chunk + 0.5).clamp(-1, 3)


def test_the_critic_sees_what_the_robot_is_sent_whatever_the_units():
    policy = NarrowUnits(ah=2, ad=1)
    agent = make_agent(policy)
    made = torch.tensor([[[1.8], [0.3]], [[4.0], [-9.0]]], requires_grad=True)
    seen = agent.executed(made)
    sent = policy.physical_actions(made)  # what the server answers, and what the replay then holds
    torch.testing.assert_close(seen, agent.labels(sent.detach().numpy(), torch.device("cpu"))[:, : agent.horizon])
    assert seen[1].flatten().tolist() == pytest.approx([2.5, -1.5][: agent.horizon])
    seen.sum().backward()
    assert made.grad[:, : agent.horizon].min() == 1  # the gradient passes the clip


def test_uniform_chunks_fill_the_robots_limits(monkeypatch):
    drawn = []
    monkeypatch.setattr("serl_launcher.agents.sac.cal_ql", lambda q, policy, random, return_to_go: q.mean())
    agent = make_agent(NarrowUnits(), cal_ql_weight=1.0, cal_ql_samples=64)
    agent.critic.register_forward_pre_hook(lambda module, args: drawn.append(args[1]))
    zeros = np.zeros((8, 1))
    batch = transitions(zeros, np.zeros((8, 1, 1)), np.ones(8), zeros, np.ones(8), np.zeros(8))
    agent.critic_loss(batch, agent.observe(observation(batch)))
    random = drawn[-1]
    assert -1.5 <= random.min() < -1.2
    assert 2.2 < random.max() <= 2.5


def test_cal_ql_is_refused_where_actions_are_relative_as_poses():
    policy = ToyFlow()
    policy.poses = (0,)
    make_agent(policy)
    with pytest.raises(ValueError, match=r"algo\.agent\.cal_ql_weight: .* relative as poses"):
        make_agent(policy, cal_ql_weight=1.0)


def test_squashing_is_refused_where_the_limits_are_not_at_one():
    with pytest.raises(ValueError, match=r"algo.agent.squash.*limits lie at \[-1.5\] and \[2.5\]"):
        make_agent(NarrowUnits(), squash=True)


def test_a_target_is_at_least_the_return_that_followed():
    state, action = np.zeros((3, 1), np.float32), np.zeros((3, 1, 1), np.float32)
    # No bootstrap, so the target is the reward; then 0, 0.7 and what a cut left unknown came of it.
    batch = transitions(state, action, np.array([0.5, 0.5, -0.5]), state, np.ones(3), np.zeros(3))
    batch = replace(batch, value_lower_bound=np.array([0.0, 0.7, -np.inf], np.float32))
    for bound, expected in ((False, [0.5, 0.5, -0.5]), (True, [0.5, 0.7, -0.5])):
        target = make_agent(return_bound=bound).backup(batch)
        assert target.tolist() == pytest.approx(expected)


def test_the_entropy_of_the_backup_by_hand():
    agent = make_agent(
        ToyFlow(ah=2), flow_steps=1, init_std=0.1, init_temperature=0.3, backup_entropy=True, target_members=1
    )
    with torch.no_grad():
        for layer in (agent.policy.net[-1], agent.target.head):  # velocity 0, and Q̄ = 2 of whatever is done
            layer.weight.zero_()
            layer.bias.zero_()
        agent.target.head.bias.fill_(2.0)
    noise = torch.tensor([[0.2, -0.5], [0.2, -0.5], [2.0, 1.0]])[..., None]
    step_noise = torch.tensor([[-1.0, 0.3], [-1.0, 0.3], [2.0, 2.0]])[None, ..., None]
    agent.draw = lambda b, prefix: (noise, step_noise)
    state, reward = np.zeros((3, 1)), np.array([0.5, 0.5, 0.5])
    batch = transitions(state, np.zeros((3, 2, 1)), reward, state, np.full(3, 0.9), [True, False, True])

    # log p: four standard normals of which two are scaled by σ = 0.1; a rare path has the larger entropy bonus.
    def log_p(*drawn):
        return sum(-0.5 * x * x - 0.5 * math.log(2 * math.pi) for x in drawn) - 2 * math.log(0.1)

    want = [0.5 + 0.9 * (2 - 0.3 * log_p(0.2, -0.5, -1, 0.3)), 0.5, 0.5 + 0.9 * (2 - 0.3 * log_p(2, 1, 2, 2))]
    assert agent.backup(batch).tolist() == pytest.approx(want, rel=1e-4)
    assert want[0] < 0.5 + 0.9 * 2 < want[2]
    agent.settings = replace(agent.settings, backup_entropy=False)
    assert agent.backup(batch).tolist() == pytest.approx([2.3, 0.5, 2.3])


def test_an_execute_horizon_beyond_the_chunk_is_named():
    with pytest.raises(ValueError, match=r"execute_horizon: expected 1 to action_horizon 1, got 2"):
        make_agent(horizon=2)
    assert math.isfinite(make_agent().target_entropy)


def test_a_target_is_disturbed_by_a_share_of_what_it_moves_in_a_tick():
    numbers = {"action_low": [-100.0, -0.1], "action_high": [100.0, 0.1], "control_hz": 20.0, "max_ticks": 9}
    names = {"state_names": ["joint"], "action_names": ["joint", "dx"], "state_low": [-100.0], "state_high": [100.0]}
    task = {"name": "n", "prompt": "p", "cameras": {}, "targets": {"joint": "joint"}, **names, **numbers}
    unit = noise_unit(TaskSpec.from_dict(task))
    assert unit.tolist() == pytest.approx([0.02, 1.0])  # 2 of its 100; the displacement's own limit
    agent = make_agent(ToyFlow(ad=2), unit=unit, init_std=0.08)
    torch.testing.assert_close(agent.noise_scale(torch.zeros(1, 1))[0, 0, 0].exp(), torch.tensor([0.0016, 0.08]))
    # So much noise is what the temperature holds: α stays where it is.
    plain = make_agent(ToyFlow(ad=2), init_std=0.08)
    assert agent.target_entropy - plain.target_entropy == pytest.approx(3 * math.log(0.02), rel=1e-5)
