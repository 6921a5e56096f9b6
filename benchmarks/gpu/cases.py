"""The policies that stages measure, made as a run makes them: a config, from it an engine or a learner on the device.

Weights are random and made on the device. `released` is the released architecture with three cameras of 224 px and a
7-joint arm; `tiny` has the same classes small, for a rehearsal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from full_size import FLOW_STEPS, SIZES, SMALLER, TINY
from gpu.device import Card, Host
from gpu.record import Record
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from suites._policy_table import task
from torch import nn

from flowserl_cli.compose import load_config
from serl_launcher.agents.build import build_policy
from serl_launcher.policies.base import FlowPolicy
from serl_launcher.policies.estimate import Estimate, estimate, meta_policy
from serl_launcher.replay.views import ChunkBatch
from serl_launcher.serving.engine import PolicyEngine
from serl_launcher.serving.query import Query
from serl_transport.contract.specs import TaskSpec

HORIZON = {"pi0": 50, "pi05": 50, "groot_n1_7": 40}  # ticks of a released chunk
MEMORY_GOAL = 0.10  # of preflight's forecast
TINY_BATCH = 2  # in a rehearsal, in place of 32
EXPERT, FULL = "++policy.train=expert", ("++policy.train=full", "++policy.checkpointing=true")


@dataclass(frozen=True, slots=True)
class Case:
    """A policy in one use; the forecast is made of it."""

    head: str
    words: tuple[str, ...] = (EXPERT,)
    batch: int = 1  # of a training step
    questions: int = 1  # answered together
    noise_samples: int = 1


CASES = {
    "pi0": Case("pi0", batch=32),
    "groot": Case("groot_n1_7", (), batch=32),
    "pi0_batch32": Case("pi0", questions=32),
    "pi05": Case("pi05"),
    "pi0_full": Case("pi0", FULL, batch=32),
    "pi0_noise4": Case("pi0", batch=32, noise_samples=4),
}


class Bench:
    """Cases at one size on one device. size: released or tiny; folder: for published parameters."""

    def __init__(self, size: str, device: Card | Host, folder: Path) -> None:
        self.size, self.device, self.folder = size, device, folder

    def case(self, name: str) -> Case:
        """The case at this size."""
        case = CASES[name]
        if self.size == "released":
            return case
        batch, questions = (min(n, TINY_BATCH) for n in (case.batch, case.questions))
        return Case(case.head, case.words, batch, questions, case.noise_samples)

    def config(self, name: str) -> DictConfig:
        """As a run has it."""
        case, tiny = self.case(name), self.size == "tiny"
        words = [f"policy={TINY[case.head] if tiny else case.head}", "policy.init=random", *case.words]
        words += [*SMALLER, *SIZES["tiny"][case.head]] if tiny else []
        words += [f"policy.action_horizon={4 if tiny else HORIZON[case.head]}", f"trainer.batch_size={case.batch}"]
        words += [f"serving.flow_steps={FLOW_STEPS[case.head]}", f"serving.max_batch={case.questions}"]
        words += [f"algo.agent.noise_samples={case.noise_samples}", "++policy.compile=off"]
        where = self.device.torch_device.type
        cfg = load_config([*words, f"trainer.device={where}", f"serving.device={where}"])
        OmegaConf.set_struct(cfg, False)
        cfg.task.spec = task(64 if tiny else 224).to_dict()
        return cfg

    def built_there(self, name: str) -> DictConfig:
        """The same, whose policy is made on the device: on a host its random weights would take minutes."""
        cfg = self.config(name)
        there = {"_target_": "gpu.cases.on_device", "made_by": cfg.policy["_target_"]}
        cfg.policy = OmegaConf.merge(cfg.policy, there | {"where": self.device.torch_device.type})
        return cfg

    def engine(self, name: str) -> PolicyEngine:
        """The policy server's engine of a case."""
        return PolicyEngine(self.built_there(name), self.folder / "params")

    def learner(self, name: str) -> tuple[FlowPolicy, Any, ChunkBatch]:
        """The trainer's learner of a case, and a batch for it."""
        from serl_launcher.learner.wiring import build_learner

        cfg = self.built_there(name)
        policy = build_policy(cfg, spec_of(cfg))
        return policy, build_learner(cfg, policy, spec_of(cfg)), chunks(cfg, policy)

    def record_memory(self, record: Record, name: str, case: str, work: str) -> None:
        """The most that was taken since `forget_peak`; a rehearsal's, libraries and all, is held to no forecast."""
        within = {"within": MEMORY_GOAL} if self.size == "released" else {}
        record.figure(name, self.device.peak_bytes() / 1e9, "GB", case=case, work=work, **within)

    def goal(self, goals: Mapping[str, float], name: str) -> dict[str, float]:
        """What a figure is to reach, for its row; a rehearsal's reaches nothing."""
        return {"goal": goals[name]} if self.size == "released" and name in goals else {}

    def forecast(self, name: str) -> Estimate:
        """Preflight's, of a case."""
        case, cfg = self.case(name), self.config(name)
        policy, _ = meta_policy(cfg.policy, spec_of(cfg), instantiate(cfg.policy.size))
        batches = dict(batch=case.batch, noise_samples=case.noise_samples, questions=case.questions)
        return estimate(policy, spec_of(cfg), FLOW_STEPS[case.head], **batches)


def on_device(made_by: str, where: str, **options: Any) -> FlowPolicy:
    """A policy of `made_by`, a builder that config/policy names, with its tensors on a device from the start."""
    with torch.device(where):
        return get_object(made_by)(**options)


def spec_of(cfg: DictConfig) -> TaskSpec:
    """The config's task."""
    return TaskSpec.from_dict(OmegaConf.to_container(cfg.task.spec, resolve=True))


def questions(spec: TaskSpec, n: int) -> list[Query]:
    """Random pictures and states, the noise of each seeded."""
    rng, found = np.random.default_rng(0), []
    for seed in range(n):
        images = {c: rng.integers(0, 256, (*hw, 3), dtype=np.uint8) for c, hw in spec.cameras.items()}
        state = rng.uniform(spec.state_low, spec.state_high).astype(np.float32)
        found.append(Query(images, state, spec.prompt, seed=seed))
    return found


def chunks(cfg: DictConfig, policy: nn.Module) -> ChunkBatch:
    """Random pictures, states and chunks inside the task's limits."""
    spec, b, rng = spec_of(cfg), cfg.trainer.batch_size, np.random.default_rng(0)
    shape: tuple[Any, ...] = (b, policy.action_horizon, len(spec.action_names))
    return ChunkBatch(
        images={c: rng.integers(0, 256, (b, *hw, 3), dtype=np.uint8) for c, hw in spec.cameras.items()},
        state=rng.uniform(spec.state_low, spec.state_high, (b, len(spec.state_names))).astype(np.float32),
        action=rng.uniform(spec.action_low, spec.action_high, shape).astype(np.float32),
        is_pad=np.zeros(shape[:2], bool),
        demo=np.ones(b, bool),
        operator=np.zeros(b, bool),
        weight=np.ones(b, np.float32),
        prompts=[spec.prompt] * b,
    )


def published(engine: PolicyEngine, scale: float) -> dict[str, torch.Tensor]:
    """What a trainer publishes, in fp32 on the host, a little moved."""
    return {name: p.detach().float().cpu() * scale for name, p in engine._published.items()}
