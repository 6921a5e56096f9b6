"""DSRL on a small frozen flow: densities, who moves, and problems with known optima in both noise variants."""

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from configured import agent_settings
from toy_flow import ToyFlow, chunks, take_average, transitions

from serl_launcher.agents.dsrl import DSRLAgent
from serl_launcher.agents.observations import observation
from serl_launcher.agents.steering import Steering, add_steering, steer
from serl_launcher.learner.learner import Learner
from serl_launcher.policies.base import PolicyInput, sample
from serl_launcher.replay.learning import LearningBatch

TARGET = np.array([0.6, -0.4])


def make_agent(variant="per_step", ah=2, state_dim=1, **settings):
    torch.manual_seed(0)
    policy = ToyFlow(state_dim=state_dim, ah=ah, ad=1)
    with torch.no_grad():
        policy.net[-1].weight.mul_(0.1)  # a flow that hardly moves: the noise reaches every action
    add_steering(policy, state_dim, variant, bound=2.0)
    defaults = {"flow_steps": 2, "critics": 2, "widths": (32, 32), "warmup_steps": 50, "entropy_per_dim": -2.0}
    defaults |= {"memory": 1024, "memory_batch": 64}
    defaults |= {"return_bound": False, "tau": 0.005, "init_temperature": 0.01, "q_limit": 1e3}
    settings = agent_settings("dsrl_pi0", **(defaults | settings))
    return DSRLAgent(policy, settings, feature_dim=state_dim, horizon=ah)


def make_learner(agent, lr=3e-3, ema_decay=0.9):
    return Learner(
        agent, lambda p: torch.optim.Adam(p, lr=lr), Accelerator(cpu=True), max_grad_norm=10.0, ema_decay=ema_decay
    )


def bandit_batch(rng, b=64):
    """Reward −Σ (a_i − target_i)² over a chunk of two ticks, one state."""
    action = rng.uniform(-1, 1, (b, 2, 1))
    state = np.zeros((b, 1))
    return transitions(state, action, -((action[..., 0] - TARGET) ** 2).sum(1), state, np.ones(b), np.zeros(b))


def act(policy, state=0.0, b=128):
    with torch.no_grad():
        prefix = policy.encode(PolicyInput({}, np.full((b, 1), state, np.float32), [""] * b))
        noise = steer(policy, prefix, torch.randn(b, policy.action_horizon, 1))
        return sample(policy, prefix, noise, steps=2).clamp(-1, 1)


@pytest.mark.parametrize("variant", ["per_step", "tiled"])
def test_the_noise_density_against_a_histogram(variant):
    torch.manual_seed(0)
    steering = Steering(1, 1, 1, variant, bound=2.0)
    with torch.no_grad():
        steering.body[-1].bias.copy_(torch.tensor([0.4, math.log(0.6)]))
    drawn = steering.draw(torch.zeros(200_000, 1), torch.randn(200_000, 1, 1))
    low, high = 0.7, 0.9
    share = ((drawn.w > low) & (drawn.w < high)).float().mean().item()
    inside = drawn.log_prob.exp()[((drawn.w > low) & (drawn.w < high)).flatten()]
    assert share == pytest.approx(inside.mean().item() * (high - low), rel=0.03)
    assert drawn.w.abs().max() < 2.0


def test_the_noise_actors_gradient_agrees_with_finite_differences():
    agent = make_agent().double()
    features, epsilon = torch.randn(3, 1, dtype=torch.float64), torch.randn(3, 2, 1, dtype=torch.float64)
    with torch.no_grad():
        agent.steering.body[-1].weight.normal_(std=0.1)
    agent.noise_actor_loss(features, epsilon)[0].backward()
    for parameter in agent.steering.body.parameters():
        flat, gradient = parameter.detach().view(-1), parameter.grad.view(-1)[0].item()
        kept, values = flat[0].item(), []
        for h in (1e-6, -1e-6):
            with torch.no_grad():
                flat[0] = kept + h
            values.append(agent.noise_actor_loss(features, epsilon)[0].item())
        with torch.no_grad():
            flat[0] = kept
        assert gradient == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4, abs=1e-8)


def test_before_the_gate_opens_the_policy_is_the_plain_flow():
    agent = make_agent("tiled")
    prefix = agent.policy.encode(PolicyInput({}, np.zeros((4, 1), np.float32), [""] * 4))
    noise = torch.randn(4, 2, 1)
    assert torch.equal(steer(agent.policy, prefix, noise), noise)
    with torch.no_grad():
        agent.steering.gate.fill_(1.0)
    steered = steer(agent.policy, prefix, noise)
    assert torch.equal(steered[:, 0], steered[:, 1])  # one noise for the whole horizon
    assert not torch.equal(steered, noise)


def test_online_the_flow_is_frozen_and_in_a_train_stage_it_is_cloned():
    agent = make_agent(warmup_steps=0)
    learner, rng = make_learner(agent), np.random.default_rng(0)
    flow = agent.policy.net[0].weight
    learner.begin_stage("train")
    before = flow.detach().clone()
    labels = chunks(np.zeros((8, 1)), rng.uniform(-1, 1, (8, 2, 1)))
    assert "losses/flow" in learner.step(LearningBatch(labels, bandit_batch(rng, 8)), 1.0)
    assert not torch.equal(before, flow)
    learner.begin_stage("online")
    before, noise_actor = flow.detach().clone(), agent.steering.body[-1].bias.detach().clone()
    for _ in range(3):
        learner.step(LearningBatch(labels, bandit_batch(rng, 8)), 1.0)
    assert torch.equal(before, flow)
    assert not torch.equal(noise_actor, agent.steering.body[-1].bias)


def test_each_group_receives_the_gradient_of_its_own_loss_only():
    agent = make_agent(warmup_steps=0)
    agent.begin_stage("online")
    losses, _ = agent(LearningBatch(None, bandit_batch(np.random.default_rng(0), 8)), 0)
    assert set(losses) == {"critic", "noise_critic", "noise_actor", "temperature"}
    owners = {name: set(map(id, group.tensors.values())) for name, group in agent.groups().items()}
    for name, loss in losses.items():
        agent.zero_grad()
        loss.backward(retain_graph=True)
        touched = {id(p) for p in agent.parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert touched
        assert touched <= owners[name], name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "optimum"),
    # One noise for both ticks cannot do better than the mean of the two targets.
    [("per_step", TARGET), ("tiled", [0.1, 0.1])],
)
def test_the_bandits_optimum_is_reached(variant, optimum):
    # A noise policy that stays wide keeps showing Q_W both sides of the optimum; the mean is what is asked for.
    agent = make_agent(variant, entropy_per_dim=0.0)
    agent.begin_stage("online")
    learner, rng = make_learner(agent, lr=1e-2, ema_decay=0.98), np.random.default_rng(0)
    torch.manual_seed(1)
    for _ in range(700):
        learner.step(LearningBatch(None, bandit_batch(rng)), 1.0)
    take_average(learner)
    assert act(agent.policy)[..., 0].mean(0).tolist() == pytest.approx(list(optimum), abs=0.12)


def test_the_chains_optimum_is_reached():
    agent = make_agent(ah=1, tau=0.1, target_members=1)
    agent.begin_stage("online")
    learner, rng = make_learner(agent, lr=1e-2, ema_decay=0.98), np.random.default_rng(0)
    torch.manual_seed(1)
    for _ in range(400):
        state, action = rng.integers(0, 3, 64), rng.uniform(-1, 1, (64, 1, 1))
        after = np.clip(state + np.where(action[:, 0, 0] > 0, 1, -1), 0, 3)
        goal = after == 3
        data = transitions(
            state[:, None] * 0.5, action, goal, np.minimum(after, 2)[:, None] * 0.5, np.full(64, 0.8), ~goal
        )
        learner.step(LearningBatch(None, data), 1.0)
    take_average(learner)
    for state in range(3):
        assert (act(agent.policy, 0.5 * state) > 0).float().mean() > 0.95
        q = agent.critic(torch.full((1, 1), 0.5 * state), torch.full((1, 1, 1), 0.5)).mean().item()
        assert q == pytest.approx(0.8 ** (2 - state), abs=0.1)


def test_one_pass_of_the_flow_serves_many_samples_and_the_oldest_leave():
    agent = make_agent(warmup_steps=0, memory=20, memory_batch=64)
    agent.begin_stage("online")
    rng, seen = np.random.default_rng(0), []
    agent.critic.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for k in range(4):
        batch = bandit_batch(rng, 8)
        batch.state[:] = k
        seen.clear()
        _, metrics = agent(LearningBatch(None, batch), 0)
        assert {len(features) for features in seen} == {64}
    assert metrics["batch/encoded"] == 20
    assert set(seen[0].flatten().tolist()) == {1.0, 2.0, 3.0}  # 4 of the second batch, all of the last two
    agent.begin_stage("online")
    assert len(agent.memory) == 0


def test_what_the_memory_holds_of_a_transition_is_what_flow_and_steering_said():
    agent = make_agent("tiled", prior_share=1.0)
    data = agent.encode(batch := bandit_batch(np.random.default_rng(0), 8))
    prefix = agent.observe(observation(batch))
    assert torch.equal(data.w_chunk, agent.act(prefix, agent.steering.spread(data.w)))
    assert data.w.abs().max() <= agent.steering.bound
    torch.testing.assert_close(data.chunk.numpy(), batch.action)
    assert data.reward.tolist() == batch.reward.tolist()


def test_a_variant_that_is_not_known_is_named():
    with pytest.raises(ValueError, match="expected one of per_step, tiled, got 'both'"):
        make_agent("both")
