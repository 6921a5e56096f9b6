"""The real trainer on a real ring, with a gateway whose answers are scripted; used by the trainer's tests."""

from __future__ import annotations

import numpy as np
from omegaconf import OmegaConf
from tiny import SPEC, tiny_config

from serl_launcher.learner.wiring import build_trainer
from serl_launcher.run.paths import RunPaths


class ScriptedGateway:
    """Answers progress with a status: this stage until its steps are done, or `limit` reports, then done."""

    def __init__(self, ring, stage, limit):
        self.ring, self.stage, self.limit, self.reports = ring, stage, limit, []
        self.evaluations = {}

    def hello(self):
        return {}

    def experience(self):
        """Ticks told at the latest report; here the rate limiter lets everything pass."""
        return 1000 * len(self.reports)

    def progress(self, **report):
        self.reports.append(report | {"stage_steps": dict(report["stage_steps"])})
        over = report["stage_steps"].get(self.stage["name"], 0) >= self.stage["steps_goal"]
        return {
            "stage": self.stage,
            "done": over or len(self.reports) >= self.limit,
            "ring": str(self.ring.path),
            "counts": {"transitions": 1000 * len(self.reports), "experience": self.experience()},
            "eval": self.evaluations,
        }


def put(ring, ordinal, mode="demo", success=True, n=8):
    """A random episode of n ticks whose last one brings reward 1 on success."""
    rng = np.random.default_rng(ordinal)
    last = np.arange(n) == n - 1
    state = rng.uniform(0, 1, (n + 1, 3)).astype(np.float32)
    ring.append(ordinal, mode, success, {
        **{f"observation.images.{c}": rng.integers(0, 256, (n + 1, 32, 32, 3), np.uint8) for c in SPEC.cameras},
        "observation.state": state,
        "action": rng.uniform(-0.02, 0.02, (n, 2)).astype(np.float32),
        "next.reward": (last & success).astype(np.float32),
        "next.done": last & success,
        "next.truncated": last & (not success),
        "next.success": last & success,
        "intervention": np.zeros(n, bool),
        "policy_version": np.zeros(n, np.int64),
        "time_ns": np.zeros(n, np.int64),
    }, episode_id=f"e{ordinal}")  # fmt: skip


def make(tmp_path, ring, algo="reject_sampling_pi0", mode="train", steps=4, limit=40, **changes):
    """A trainer of one stage `s`; `changes` are dotted keys with __ for the dots."""
    cfg = tiny_config(
        algo, trainer__batch_size=4, trainer__device="cpu", trainer__log_period=1, trainer__publish_period=100,
        trainer__checkpoint_period=2, telemetry__tensorboard=False, rollout__execute_horizon=2,
        serving__flow_steps=2,
    )  # fmt: skip
    if algo.startswith("sac"):
        cfg.algo.agent.update({"warmup_steps": 1, "actor_period": 1, "critics": 2, "widths": [16]})
        cfg.algo.view.min_online = 1
    cfg.schedule = {"stages": [{"name": name, "mode": "eval", "episodes": 10} for name in "ab"]}
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value)
    gateway = ScriptedGateway(ring, {"name": "s", "mode": mode, "steps_goal": steps}, limit)
    return build_trainer(cfg, RunPaths(tmp_path), gateway), gateway
