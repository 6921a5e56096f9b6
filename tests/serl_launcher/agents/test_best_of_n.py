"""Best of n: which chunk is sent, what the critics learn from, and two modes of which imitation takes both."""

import numpy as np
import pytest
import torch
from configured import agent_settings
from toy_flow import ToyFlow, learn_left_and_right

from serl_launcher.agents.choosing import add_chooser, best_chunks, served_chunks
from serl_launcher.agents.implicit_q import ImplicitQAgent
from serl_launcher.policies.base import PolicyInput

STEPS = 4


def make_agent(candidates=8, **settings):
    torch.manual_seed(0)
    policy = ToyFlow(state_dim=1, ah=2, ad=1)
    add_chooser(policy, 1, 2, candidates, 2, (32, 32))
    defaults = {"flow_steps": STEPS, "critics": 2, "widths": (32, 32), "warmup_steps": 0}
    settings = agent_settings("best_of_n_pi0", **(defaults | {"q_limit": 1e3, "target_members": 2} | settings))
    return ImplicitQAgent(policy, settings, feature_dim=1, horizon=2)


def observed(policy, b):
    return policy.encode(PolicyInput({}, np.zeros((b, 1), np.float32), [""] * b))


def open_gate(agent):
    with torch.no_grad():
        agent.policy.chooser.gate.fill_(1.0)


@torch.no_grad()
def test_of_the_chunks_of_each_observation_the_one_that_the_least_member_likes_most_is_sent():
    agent = make_agent(candidates=3)
    policy, prefix = agent.policy, observed(agent.policy, 2)
    given = torch.linspace(-0.8, 0.9, 6)[:, None, None].expand(6, 2, 1)
    assert torch.equal(best_chunks(policy, prefix, given), given[[0, 3]])  # the gate is closed: the first
    open_gate(agent)
    q = policy.chooser.critic(prefix.state.repeat_interleave(3, 0), given.contiguous()).min(0).values.view(2, 3)
    assert torch.equal(best_chunks(policy, prefix, given), given.view(2, 3, 2, 1)[torch.arange(2), q.argmax(1)])


@torch.no_grad()
def test_a_chunk_is_judged_as_the_robot_would_be_sent_it():
    agent = make_agent(candidates=2)
    open_gate(agent)
    prefix = observed(agent.policy, 1)
    beyond = torch.tensor([1.0, 7.0])[:, None, None].expand(2, 2, 1)  # both are sent as 1: the first of equals
    assert torch.equal(best_chunks(agent.policy, prefix, beyond), beyond[:1])


def test_of_two_modes_that_imitation_takes_the_critics_choose_the_better():
    """People go left and right, only right is worth something: imitation alone goes either way, the choice right."""
    agent = make_agent()
    learn_left_and_right(agent)
    with torch.no_grad():
        prefix = observed(agent.policy, 200)
        chosen = served_chunks(agent.policy, prefix, torch.randn(1600, 2, 1), STEPS)
        agent.policy.chooser.gate.fill_(0.0)
        plain = served_chunks(agent.policy, prefix, torch.randn(1600, 2, 1), STEPS)
    assert (chosen.mean((1, 2)) > 0).float().mean() > 0.95
    assert 0.3 < (plain.mean((1, 2)) > 0).float().mean() < 0.7


def test_a_chooser_for_other_chunks_than_the_actor_executes_is_refused():
    policy = ToyFlow(state_dim=1, ah=2, ad=1)
    add_chooser(policy, 1, 2, 4, 2, (8,))
    with pytest.raises(ValueError, match=r"algo\.served\.horizon: expected rollout\.execute_horizon 1, got 2"):
        ImplicitQAgent(policy, agent_settings("best_of_n_pi0"), feature_dim=1, horizon=1)
