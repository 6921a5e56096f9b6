"""Advantage-weighted flow matching: its losses by hand, its weights, and two modes of which only one is worth it."""

import numpy as np
import pytest
import torch
from configured import agent_settings
from hydra.errors import InstantiationException
from toy_flow import ToyFlow, chunks, learn_left_and_right, transitions

from serl_launcher.agents.implicit_q import ImplicitQAgent
from serl_launcher.critics.losses import expectile_loss
from serl_launcher.policies.base import PolicyInput, sample
from serl_launcher.replay.learning import LearningBatch


def make_agent(**settings):
    torch.manual_seed(0)
    defaults = {"flow_steps": 4, "critics": 2, "widths": (32, 32), "warmup_steps": 0, "q_limit": 1e3}
    settings = agent_settings("advantage_weighted_pi0", **(defaults | {"target_members": 2} | settings))
    return ImplicitQAgent(ToyFlow(state_dim=1, ah=2, ad=1), settings, feature_dim=1, horizon=2)


def observed(agent, b):
    return agent.policy.encode(PolicyInput({}, np.zeros((b, 1), np.float32), [""] * b))


def test_the_expectile_loss_and_its_gradient_by_hand():
    value = torch.tensor([0.0, 1.0], requires_grad=True)
    loss = expectile_loss(value, torch.tensor([0.5, 0.5]), 0.8)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * (0.8 * 0.25 + 0.2 * 0.25) / 2)
    torch.testing.assert_close(value.grad, torch.tensor([-0.8 * 0.5, 0.2 * 0.5]) / 2)


def test_the_value_comes_to_the_expectile_of_what_it_is_shown():
    drawn = torch.tensor(np.random.default_rng(0).normal(size=4001), dtype=torch.float64)
    grid = torch.linspace(-1, 2, 601, dtype=torch.float64)
    best = grid[torch.stack([expectile_loss(v.expand_as(drawn), drawn, 0.8) for v in grid]).argmin()]
    above, below = (drawn - best).clamp(min=0).sum(), (best - drawn).clamp(min=0).sum()
    assert (0.8 * above / (0.2 * below)).item() == pytest.approx(1, abs=0.02)  # Newey and Powell's definition


@torch.no_grad()
def test_the_backup_is_the_next_states_value_and_ends_with_the_episode():
    agent = make_agent()
    batch = transitions(np.zeros((2, 1)), np.zeros((2, 2, 1)), [0.5, 0.25], np.ones((2, 1)), [0.9, 0.9], [1, 0])
    v = agent.of_state(torch.ones(1, 1)).item()
    torch.testing.assert_close(agent.backup(batch), torch.tensor([0.5 + 0.9 * v, 0.25]))


def test_before_it_is_warm_the_return_that_followed_is_learned_and_nothing_is_weighted():
    agent = make_agent(warmup_steps=5)
    agent.begin_stage("online")
    batch = transitions(np.zeros((2, 1)), np.zeros((2, 2, 1)), [0.3, 0.7], np.ones((2, 1)), [0.9] * 2, [1, 1])
    _, metrics = agent(LearningBatch(chunks(np.zeros((2, 1)), np.zeros((2, 2, 1))), batch), 0)
    assert metrics["critic/target"].item() == pytest.approx(0.5)
    assert "advantage/weight" not in metrics


@torch.no_grad()
def test_a_weight_is_exp_of_the_advantage_over_its_scale_and_cut():
    agent = make_agent(advantage_scale=0.5, most_weight=1.5)
    batch, prefix = chunks(np.zeros((3, 1)), np.linspace(-0.9, 0.9, 6).reshape(3, 2, 1)), observed(agent, 3)
    pad = np.zeros((3, 2), bool)
    q = agent.target(prefix.state, torch.tensor(batch.action), torch.tensor(pad)).min(0).values
    want = ((q - agent.of_state(prefix.state)) / 0.5).exp().clamp(max=1.5)
    metrics = {}
    torch.testing.assert_close(agent.weights(batch, metrics, prefix), want)
    assert metrics["advantage/weight"].item() == pytest.approx(want.mean().item())


@pytest.mark.parametrize("key", ["expectile", "advantage_scale", "most_weight"])
def test_a_setting_that_makes_no_weights_is_refused_by_its_key(key):
    with pytest.raises(InstantiationException, match=rf"algo\.agent\.{key}: expected .*, got 0"):
        make_agent(**{key: 0})


def test_of_two_modes_that_were_accepted_the_one_of_more_value_is_learned():
    """People go left and right, only right is worth something; without weights half of the chunks go left."""
    shares = {scale: _share_right(make_agent(advantage_scale=scale)) for scale in (0.1, 1e6)}
    assert shares[0.1] > 0.95
    assert 0.3 < shares[1e6] < 0.7


def _share_right(agent):
    learn_left_and_right(agent)
    with torch.no_grad():
        drawn = sample(agent.policy, observed(agent, 200), torch.randn(200, 2, 1), 4)
    return (drawn.mean((1, 2)) > 0).float().mean().item()
