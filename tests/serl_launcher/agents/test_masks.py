"""What a batch says of its rows reaches every loss: padded ticks are not read, weights count, and the flag itself."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_dsrl import make_agent as make_dsrl
from test_sac import make_agent as make_sac
from toy_flow import ToyFlow, chunks, transitions

from serl_launcher.agents.flow_matching import FlowMatchingAgent, imitation_loss
from serl_launcher.critics.losses import td_loss
from serl_launcher.replay.learning import LearningBatch

STATE = np.array([[0.3], [-0.2], [0.8]])
ACTION = np.array([[0.5, -0.1], [0.2, 0.9], [-0.7, 0.4]])[..., None]
PADDED = np.array([[False, False], [False, True], [False, False]])
REWARD = np.array([1.0, 0.0, 0.5])


def still(policy):
    """The same policy with velocity 0: its error at a tick is that tick's alone."""
    with torch.no_grad():
        policy.net[-1].weight.zero_()
        policy.net[-1].bias.zero_()
    return policy


# Critics.


def agents():
    return {"sac": make_sac(ToyFlow(ah=2)), "dsrl": make_dsrl(ah=2)}


def outcomes(action=ACTION, is_pad=PADDED):
    """Terminated transitions, so that the target is the reward."""
    batch = transitions(STATE, action, REWARD, STATE, np.ones(3), np.zeros(3))
    return replace(batch, is_pad=is_pad)


def critic_loss(agent, batch):
    return agent(LearningBatch(labels(), batch), 0)[0]["critic"]


@pytest.mark.parametrize("name", ["sac", "dsrl"])
@pytest.mark.parametrize("garbage", [np.nan, -0.3, -1e6])
def test_a_critic_does_not_read_what_lies_under_the_mask(name, garbage):
    agent, action = agents()[name], ACTION.copy()
    want = critic_loss(agent, outcomes())
    action[PADDED] = garbage
    loss = critic_loss(agent, outcomes(action))
    assert torch.equal(loss, want)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in agent.critic.parameters())


@pytest.mark.parametrize("name", ["sac", "dsrl"])
def test_a_critic_tells_a_padded_tick_from_one_that_stood_still(name):
    agent, action = agents()[name], ACTION.copy()
    action[PADDED] = 0
    told, untold = (critic_loss(agent, outcomes(action, mask)).item() for mask in (PADDED, np.zeros_like(PADDED)))
    assert told != pytest.approx(untold, rel=1e-4)
    # By hand: features are the state, chunks enter as they are, and the flag goes with the row it belongs to.
    state, chunk = torch.tensor(STATE, dtype=torch.float32), torch.tensor(action, dtype=torch.float32)
    q = agent.critic(state, chunk, torch.tensor(PADDED))
    assert told == pytest.approx(td_loss(q, torch.tensor(REWARD)).item(), rel=1e-5)


# Imitation.


def labels(action=ACTION, is_pad=None, weight=(1, 1, 1)):
    batch = chunks(STATE, action)
    is_pad = np.zeros_like(PADDED) if is_pad is None else is_pad
    return replace(batch, is_pad=is_pad, weight=np.array(weight, np.float32))


def by_flow_matching():
    """SFT and rejection sampling."""
    agent = FlowMatchingAgent(still(ToyFlow(ah=2)), noise_samples=2)
    return lambda batch: agent(batch, 0)[0]["policy"]


def by_sac(mode):
    """In a train stage, and beside the critic's loss in an online one; the actor's own loss waits for its turn."""
    agent = make_sac(still(ToyFlow(ah=2)), imitation_weight=1.0, warmup_steps=100, noise_samples=2)
    agent.begin_stage(mode)
    return lambda batch: agent(LearningBatch(batch, outcomes()), 0)[0]["actor"]


def by_dsrl():
    agent = make_dsrl(ah=2, noise_samples=2)
    still(agent.policy)
    agent.begin_stage("train")
    return lambda batch: agent(LearningBatch(batch, outcomes()), 0)[0]["policy"]


CALLERS = {
    "flow_matching": by_flow_matching,
    "sac_train": lambda: by_sac("train"),
    "sac_online": lambda: by_sac("online"),
    "dsrl_train": by_dsrl,
}


@pytest.fixture(params=CALLERS)
def loss_of(request):
    """The imitation loss of a batch as an agent takes it, with the same noise at each call."""
    loss = CALLERS[request.param]()

    def seeded(batch):
        torch.manual_seed(5)
        return loss(batch).item()

    return seeded


def test_an_agent_does_not_imitate_what_lies_under_the_mask(loss_of):
    garbage = ACTION.copy()
    garbage[PADDED] = 50.0
    want = loss_of(labels(is_pad=PADDED))
    assert loss_of(labels(garbage, PADDED)) == pytest.approx(want, rel=1e-6)
    assert loss_of(labels(garbage)) > want + 100  # without the mask it would


def test_a_weight_of_zero_takes_a_sample_out_of_an_agents_imitation(loss_of):
    garbage = ACTION.copy()
    garbage[1] = 50.0
    want = loss_of(labels(weight=(1, 0, 1)))
    assert loss_of(labels(garbage, weight=(1, 0, 1))) == pytest.approx(want, rel=1e-6)
    assert loss_of(labels(garbage)) > want + 100


def test_samples_count_by_their_weights_in_an_agents_imitation(loss_of):
    alone = [loss_of(labels(weight=np.eye(3)[i])) for i in range(3)]
    assert loss_of(labels(weight=(0.5, 3, 2))) == pytest.approx(0.5 * alone[0] + 3 * alone[1] + 2 * alone[2], rel=1e-5)
    assert loss_of(labels()) == pytest.approx(sum(alone), rel=1e-5)
    assert len({round(value, 4) for value in alone}) == 3


def test_the_imitation_loss_by_hand():
    policy, weight = still(ToyFlow(ah=2)), np.array([0.5, 3.0, 2.0])
    torch.manual_seed(5)
    loss = imitation_loss(policy, labels(is_pad=PADDED, weight=weight), noise_samples=2)[0]
    torch.manual_seed(5)
    noise = torch.randn(6, 2, 1).numpy()[..., 0].reshape(3, 2, 2)  # two of each sample, adjacent
    error = (ACTION[:, None, :, 0] - noise) ** 2  # v = 0, so what is missed is a − ε
    # Sample 1 has one tick that counts, the others two; the mean is over three samples of two noises each.
    per_sample = [error[0].mean(-1), error[1, :, 0], error[2].mean(-1)]
    assert loss.item() == pytest.approx(sum(w * e.sum() for w, e in zip(weight, per_sample, strict=True)) / 6, rel=1e-5)
