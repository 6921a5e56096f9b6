"""A synthetic run folder whose figures are known."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

START = 1.7e9  # unix s


class SampleRun:
    """Writes episodes and metrics along a made-up clock."""

    def __init__(self, root: Path, stages: Sequence[tuple[str, str]]) -> None:
        self.root = root
        self.now = START
        self.step = 0
        self.episodes: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        config = {
            "seed": 7,
            "task": {"name": "pick"}, "policy": {"name": "pi0_tiny"}, "algo": {"name": "reject_sampling_pi0"},
            "schedule": {"stages": [{"name": name, "mode": mode} for name, mode in stages]},
        }  # fmt: skip
        (root / "metrics").mkdir(parents=True, exist_ok=True)
        (root / "config.yaml").write_text(yaml.safe_dump(config))

    def episode(
        self, mode: str, stage: str, seed: int, success: bool, help_ticks: int = 0, whole: bool = True, **changes: Any
    ) -> None:
        """Ten ticks in six seconds, five of them driven."""
        index = len(self.episodes)
        self.episodes.append(
            {
                "episode_id": f"e{index}", "ordinal": index, "actor": "actor-0", "boot": "b",
                "mode": mode, "stage": stage,
                "seed": seed, "n_ticks": 10, "return": float(success), "success": success,
                "interventions": help_ticks, "policy_version_first": 0, "policy_version_last": 0,
                "truncated_by": None if whole else "dead_actor", "whole": whole, "start_time": self.now,
                "end_time": self.now + 6, "seconds": 5.0, **changes,
            }
        )  # fmt: skip
        self.now += 6

    def train(self, stage: str, steps: int, loss: float) -> None:
        """A logged line every 20 steps, 3 s each."""
        for _ in range(0, steps, 20):
            self.step, self.now = self.step + 20, self.now + 3
            row = {
                "step": self.step,
                "time": self.now,
                "stage": stage,
                "losses/flow": loss,
                "policy/version": self.step // 100,
            }
            self.rows.append(row)

    def save(self) -> Path:
        """Write the files; the run folder."""
        for name, rows in (("episodes.jsonl", self.episodes), ("metrics/trainer.jsonl", self.rows)):
            (self.root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return self.root
