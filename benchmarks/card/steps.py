"""Training steps of the trainer, counted: the learner, the agents and the optimizers of config/, on the fake card.

    step of algo=…    sampled batch on the host ─▶ losses ─▶ backward ─▶ clipping ─▶ optimizer ─▶ average

`trained(card, name)` builds the learner as learner.wiring does, takes two steps (the first makes what later ones find)
and counts the second, which is not logged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from suites._policy_table import observe

from card.calls import SPEC, build, features_of
from card.count import Counts
from card.fake import DEVICE, FakeCard
from flowserl_cli.compose import load_config
from serl_launcher.agents.steering import add_steering
from serl_launcher.learner import engines, wiring
from serl_launcher.policies.base import FlowPolicy
from serl_launcher.policies.precision import hold
from serl_launcher.replay.learning import LearningBatch
from serl_launcher.replay.transitions import TransitionBatch
from serl_launcher.replay.views import ChunkBatch


@dataclass(frozen=True, slots=True)
class Step:
    """One kind of training step."""

    head: str
    train: str  # full or expert
    algo: str
    mode: str  # of the stage: train or online


STEPS = {
    "pi0/expert_step": Step("pi0", "expert", "reject_sampling_pi0", "train"),
    "pi0/full_step": Step("pi0", "full", "reject_sampling_pi0", "train"),
    "pi0/sac_step": Step("pi0", "expert", "sac_pi0", "online"),
    "pi0/dsrl_step": Step("pi0", "expert", "dsrl_pi0", "online"),
    "groot_n1_7/expert_step": Step("groot_n1_7", "expert", "reject_sampling_pi0", "train"),
}


EVERYTHING = {  # so that the step that is counted moves the actor too
    "sac_pi0": ["algo.agent.warmup_steps=0", "algo.agent.actor_period=1"],
    "dsrl_pi0": ["algo.agent.warmup_steps=0"],
}


@dataclass(slots=True)
class Trained:
    """One step of `batch` samples."""

    batch: int
    counts: Counts
    kept: int  # bytes that the forward pass keeps for the backward pass, and what the step began with beside weights


def trained(card: FakeCard, name: str, batch: int, *words: str) -> Trained:
    """Build the learner, take a step, count the next one. words: of the config, beside the step's own."""
    step = STEPS[name]
    policy = build(step.head, step.train)
    hold(policy, policy.precision, masters=True)
    policy.checkpointing = step.train == "full"
    card.place(policy)
    cfg = load_config([f"algo={step.algo}", *EVERYTHING.get(step.algo, []), *words])
    if step.algo.startswith("dsrl"):
        add_steering(policy, features_of(policy), cfg.algo.served.variant, cfg.algo.served.bound)
        policy.steering.to(DEVICE)
    data, kept = batch_of(policy, batch, cfg.rollout.execute_horizon, step.algo), []
    with an_accelerator():
        learner = wiring.build_learner(cfg, policy, SPEC)
        learner.agent.train()
        learner.begin_stage(step.mode)
        data = learner.prepare(data)  # as the thread that makes batches ahead
        learner.step(data, 1.0)
        with card.counting(learner.agent) as counts, watching(learner, lambda: kept.append(counts.kept)):
            learner.step(data, 1.0)
    return Trained(batch, counts, kept[0])


@contextmanager
def an_accelerator() -> Iterator[None]:
    """The trainer's, which is told that its device is the card."""

    def made(**_: Any) -> Accelerator:
        accelerator = Accelerator(cpu=True)
        PartialState().device = accelerator.state.device = DEVICE
        return accelerator

    try:
        with patch.object(engines, "Accelerator", made):
            yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@contextmanager
def watching(learner: Any, look: Callable[[], None]) -> Iterator[None]:
    """Call `look` between forward and backward pass."""
    backward = learner._engine.backward

    def looked(*given: Any, **further: Any) -> Any:
        look()
        return backward(*given, **further)

    with patch.object(learner._engine, "backward", looked):
        yield


def batch_of(policy: FlowPolicy, b: int, horizon: int, algo: str) -> ChunkBatch | LearningBatch:
    """What the trainer samples, on the host."""
    observation, joints = observe(SPEC, b), len(SPEC.action_names)
    action = np.zeros((b, policy.action_horizon, joints), np.float32)
    known = dict(images=observation.images, state=observation.state, prompts=observation.prompts, demo=np.ones(b, bool))
    pad, ones = np.zeros(action.shape[:2], bool), np.ones(b, np.float32)
    chunks = ChunkBatch(action=action, is_pad=pad, operator=np.zeros(b, bool), weight=ones, **known)
    if algo.startswith("reject"):
        return chunks
    after = dict(next_images=observation.images, next_state=observation.state)
    figures = dict(reward=ones, discount=ones, return_to_go=ones, value_lower_bound=ones, bootstrap=np.ones(b, bool))
    return LearningBatch(
        chunks, TransitionBatch(action=action[:, :horizon], is_pad=pad[:, :horizon], **known, **after, **figures)
    )
