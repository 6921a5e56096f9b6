"""Rejection sampling on problems with known optima: the real ring, rule, view, agent and learner, in cycles.

    policy ── episodes ──▶ ring ──▶ rule ──▶ view ──▶ flow matching ──▶ policy

A control accepts every episode; it imitates itself and stays where it was.
"""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from configured import rule as accepting
from toy_flow import ToyFlow

from serl_launcher.agents.flow_matching import FlowMatchingAgent
from serl_launcher.learner.learner import Learner
from serl_launcher.policies.base import PolicyInput, sample
from serl_launcher.replay.ring import RingReader, RingWriter
from serl_launcher.replay.threshold import QuantileThreshold
from serl_launcher.replay.views import ChunkView
from serl_transport.contract.specs import TaskSpec

SPEC = TaskSpec.from_dict(
    {
        "name": "t",
        "prompt": "p",
        "cameras": {"front": [1, 1]},
        "state_names": ["s"],
        "state_low": [0],
        "state_high": [1],
        "action_names": ["a"],
        "action_low": [-1],
        "action_high": [1],
        "control_hz": 10,
        "max_ticks": 5,
    }
)


def act(policy, state):
    """One action for each state, as the policy server samples them, clipped: float32[b]."""
    with torch.no_grad():
        prefix = policy.encode(PolicyInput({}, np.float32(state)[:, None], [""] * len(state)))
        return sample(policy, prefix, torch.randn(len(state), 1, 1), steps=3).clamp(-1, 1).numpy()[:, 0, 0]


def put(ring, ordinal, states, actions, rewards, done):
    """An episode of n actions, n rewards and n + 1 states."""
    n, last = len(actions), np.arange(len(actions)) == len(actions) - 1
    ring.append(ordinal, "online", done, {
        "observation.images.front": np.zeros((n + 1, 1, 1, 3), np.uint8),
        "observation.state": np.float32(states)[:, None],
        "action": np.float32(actions)[:, None],
        "next.reward": np.float32(rewards),
        "next.done": last & done,
        "next.truncated": last & (not done),
        "next.success": last & done,
        "intervention": np.zeros(n, bool),
        "policy_version": np.zeros(n, np.int64),
        "time_ns": np.zeros(n, np.int64),
    })  # fmt: skip


def improve(folder, rollout, rule, threshold=None, cycles=6, steps=100):
    """Cycles of episodes from the policy as it is and of flow matching on what was accepted; returns the policy."""
    torch.manual_seed(0)
    rng, policy = np.random.default_rng(0), ToyFlow()
    learner = Learner(
        FlowMatchingAgent(policy, noise_samples=4), lambda p: torch.optim.Adam(p, lr=3e-3), Accelerator(cpu=True),
        max_grad_norm=10.0, ema_decay=0.9,
    )  # fmt: skip
    ring = RingWriter(SPEC, 4000, folder, shared=folder)
    view = ChunkView(rule, SPEC, 1, threshold=threshold)
    view.attach(RingReader(ring.path))
    ordinal = 0
    for _ in range(cycles):
        for episode in rollout(policy, rng):
            put(ring, ordinal, *episode)
            ordinal += 1
        view.refresh()
        for _ in range(steps):
            learner.step(view.sample(rng, 128), 1.0)
    ring.close()
    return policy


TARGET = {0.0: -0.5, 1.0: 0.5}  # the best action of each context


def bandit(policy, rng, b=100):
    """Episodes of one tick in a context drawn at random; return −(a − target)²."""
    context = rng.integers(0, 2, b).astype(np.float32)
    for s, a in zip(context, act(policy, context), strict=True):
        yield [s, s], [a], [-((a - TARGET[s]) ** 2)], True


@pytest.mark.parametrize("rejects", [True, False])
def test_the_bandits_optimum_is_reached_and_without_rejection_it_is_not(tmp_path, rejects):
    rule = accepting(min_return=-np.inf, min_ticks=1, noop_threshold=0.0)
    threshold = QuantileThreshold(start=-9.0, quantile=0.7, window=100) if rejects else None
    policy = improve(tmp_path, bandit, rule, threshold)
    actions = {context: act(policy, np.full(512, context)) for context in TARGET}
    missed = [abs(actions[context].mean() - target) for context, target in TARGET.items()]
    if rejects:
        assert max(missed) < 0.1
        assert max(a.std() for a in actions.values()) < 0.1  # it began with 0.7
    else:
        assert min(missed) > 0.3


def chain(policy, rng, b=60):
    """States 0, 1, 2; a > 0 goes right, else left (0 stays). Right of 2: reward 1, terminated. Five ticks at most.

    Nothing of a chain is drawn at random but the policy's noise; b of them run side by side.
    """
    places, actions = [np.zeros(b, int)], []
    for _ in range(SPEC.max_ticks):
        here = places[-1]
        actions.append(act(policy, 0.5 * np.minimum(here, 2)))
        there = np.clip(here + np.where(actions[-1] > 0, 1, -1), 0, 3)
        places.append(np.where(here == 3, 3, there))
    for path, taken in zip(np.stack(places, 1), np.stack(actions, 1), strict=True):
        done = bool(path[-1] == 3)
        n = int(np.argmax(path == 3)) if done else SPEC.max_ticks
        rewards = np.zeros(n)
        rewards[-1] = done
        yield 0.5 * np.minimum(path[: n + 1], 2), taken[:n], rewards, done


@pytest.mark.parametrize("rejects", [True, False])
def test_the_chains_optimum_is_reached_and_without_rejection_it_is_not(tmp_path, rejects):
    settings = {} if rejects else {"min_return": -np.inf, "require_success": False}
    rule = accepting(noop_threshold=0.0, **settings)
    policy = improve(tmp_path, chain, rule)
    success = np.mean([done for *_, done in chain(policy, None, 512)])  # 0.28 where each step is a coin's toss
    right = [(act(policy, np.full(512, 0.5 * state)) > 0).mean() for state in range(3)]
    if rejects:
        assert success > 0.95
        assert min(right) > 0.9
    else:
        assert success < 0.6
