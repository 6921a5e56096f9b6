"""SAC and DSRL on a policy whose actions are relative: critics see each chunk from its own state, limits move along."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hydra.utils import instantiate
from tiny import HORIZON, SPEC, random_batch, random_transitions, tiny_config

from serl_launcher.agents.build import build_agent, build_policy
from serl_launcher.agents.observations import observation
from serl_launcher.learner.learner import Learner
from serl_launcher.replay.learning import LearningBatch

EXECUTED = 2
OFFSET, SCALE = 0.005, 0.02  # of the relative action x, metres; g stays absolute, ±1
RELATIVE = {"exclude": ["g"], "low": [[OFFSET - SCALE, 0]], "high": [[OFFSET + SCALE, 0]]}


def make(algo, **changes):
    changes = {"rollout__execute_horizon": EXECUTED, "policy__relative": RELATIVE, "policy__seed": 0, **changes}
    cfg = tiny_config(f"{algo}_pi0", **changes)
    cfg.algo.agent.update({"warmup_steps": 0, "critics": 2, "widths": [16]})
    torch.manual_seed(0)
    policy = build_policy(cfg, SPEC)
    return cfg, policy, build_agent(cfg, policy, SPEC)


@pytest.fixture(scope="module")
def sac():
    """(policy, agent)"""
    return make("sac")[1:]


def state_near_the_limits(b=3):
    """x's own state lies within ±0.02, so that some actions are beyond the limits and some are not."""
    return np.linspace(-0.02, 0.02, b).astype(np.float32)[:, None] * np.float32([1, 0, 0]) + np.float32([0, 0.3, 1])


def test_critics_see_what_the_robot_is_sent_from_each_rows_own_state(sac):
    policy, agent = sac
    state, chunk = torch.tensor(state_near_the_limits()), torch.randn(3, HORIZON, 2)
    anchor = policy.anchor_of(state)
    assert anchor.flatten().tolist() == pytest.approx([-0.02, 0, 0, 0, 0.02, 0])
    sent = policy.physical_actions(chunk, anchor)
    by_hand = (chunk[..., 0] * SCALE + OFFSET + state[:, :1]).clamp(-0.02, 0.02)
    torch.testing.assert_close(sent[..., 0], by_hand)
    torch.testing.assert_close(sent[..., 1], chunk[..., 1].clamp(-1, 1))
    labels = agent.labels(sent[:, :EXECUTED].numpy(), torch.device("cpu"), anchor)
    torch.testing.assert_close(agent.executed(chunk, anchor), labels, atol=1e-5, rtol=1e-5)
    low, high = agent._limits(anchor)
    torch.testing.assert_close(low[:, 0, 0], (-0.02 - OFFSET - state[:, 0]) / SCALE, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(high[:, 1, 0], (0.02 - OFFSET - state[:, 0]) / SCALE, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="relative to a state"):
        agent.executed(chunk)


def test_the_replays_actions_are_labels_from_the_state_of_their_first_tick(sac):
    """What is executed under one anchor and stored as absolute is the same chunk, seen from where it begins."""
    _, agent = sac
    batch = random_transitions(3)
    batch.state[:] = state_near_the_limits()
    prefix = agent.observe(observation(batch))
    labels = agent.labels(batch.action, torch.device("cpu"), prefix.anchor)
    want = (batch.action[..., 0] - OFFSET - batch.state[:, :1]) / SCALE
    np.testing.assert_allclose(labels[..., 0], want, rtol=1e-4, atol=1e-4)
    repeated = prefix.repeat(2).take(torch.tensor([5, 0]))
    torch.testing.assert_close(repeated.anchor, prefix.anchor[[2, 0]])


def test_noise_is_a_share_of_what_a_target_moves_in_a_tick_in_the_policys_unit(sac):
    _, agent = sac
    # No targets here: an action may be anywhere in its range, 0.02 of a unit of 0.02, which is 1.
    assert agent.noise_scale.log_unit.exp().tolist() == pytest.approx([1.0, 1.0])
    wide = RELATIVE | {"low": [[-0.2, 0]], "high": [[0.2, 0]]}
    _, _, agent = make("sac", policy__relative=wide)
    assert agent.noise_scale.log_unit.exp().tolist() == pytest.approx([0.1, 1.0])


def test_squashing_is_refused():
    with pytest.raises(ValueError, match=r"algo\.agent\.squash: .* relative to the state, with which the limits move"):
        make("sac", algo__agent__squash=True)


@pytest.mark.parametrize("algo", ["sac", pytest.param("dsrl", marks=pytest.mark.slow)])
def test_steps_are_taken_in_both_stages(algo):
    cfg, _, agent = make(algo, **({"algo__agent__cal_ql_weight": 0.5} if algo == "sac" else {}))
    optimizers = {name: instantiate(node, _partial_=True) for name, node in cfg.algo.optimizers.items()}
    learner = Learner(
        agent, lambda p: torch.optim.AdamW(p, lr=1e-3), Accelerator(cpu=True), max_grad_norm=1.0, ema_decay=0.5,
        optimizers=optimizers,
    )  # fmt: skip
    for mode in ("train", "online"):
        learner.begin_stage(mode)
        for k in range(2):
            metrics = learner.step(LearningBatch(random_batch(seed=k), random_transitions(seed=k)), 1.0)
    assert all(np.isfinite(value) for value in metrics.values())
