"""One run of ours, in lock step (benchmarks/lockstep.py). Called by command.py; a row comes with each evaluation."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence

from lockstep import Budget, Lockstep, Point
from side_by_side.side_task import Settings, load_config


class Clocked(Lockstep):
    """Knows how much wall time its evaluations took."""

    evaluation_wall_s = 0.0

    def evaluate(self, trials: int, first_seed: int) -> Point:
        """As the parent."""
        began = time.monotonic()
        try:
            return super().evaluate(trials, first_seed)
        finally:
            self.evaluation_wall_s += time.monotonic() - began


def run(settings: Settings, words: Sequence[str], budget: dict) -> Iterator[dict]:
    """Rows `before`, `curve`, `after`; `words` are overrides of the config, `budget` of lockstep.Budget."""
    started = time.monotonic()
    own = Budget(
        demos=settings.demos,
        env_steps=settings.env_steps,
        eval_episodes=settings.eval_episodes,
        curve_every=settings.curve_every,
        curve_episodes=settings.curve_episodes,
        **budget,
    )
    with tempfile.TemporaryDirectory(prefix="flowserl-side-") as folder:
        fixed = [f"task={settings.task}", f"seed={settings.seed}", f"runs_dir={folder}", "run=ours"]
        fixed += ["telemetry.tensorboard=false", "serving.device=cpu"]
        side = Clocked(load_config([*fixed, *words]), own)
        try:
            for name, point in side.points():
                row = point.row()
                wall = time.monotonic() - started - side.evaluation_wall_s
                yield row | {"point": name, "cpu_minutes": row["minutes"], "minutes": round(wall / 60, 3)}
        finally:
            side.close()
