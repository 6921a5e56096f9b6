"""summary.json and learning_curve.png of a run. The supervisor calls `write_summary` when every stage is done, and when
a learner without stages, which serves evaluations, is stopped.

Also `python -m serl_launcher.telemetry.summary <run_dir>`, at any time. docs/data.md explains each figure.
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from serl_launcher.run.files import write_sealed
from serl_launcher.run.paths import RunPaths
from serl_launcher.telemetry.history import EpisodeRecord, RunHistory, StageRecord, read_history
from serl_launcher.telemetry.statistics import speed, wilson

RECENT = 40  # online episodes that stand in for an evaluation when the schedule has none


def write_summary(run_dir: Path) -> dict[str, Any]:
    """Write summary.json and learning_curve.png, each whole; returns the summary.

    Raises ValueError when the folder is no run.
    """
    from serl_launcher.telemetry.learning_curve import draw

    paths, history = RunPaths(Path(run_dir)), read_history(Path(run_dir))
    digest = hashlib.sha256(paths.config.read_bytes()).hexdigest()
    summary = summarise(history) | {"run": paths.root.name, "config_sha256": digest}
    write_sealed(paths.summary, summary, indent=2)
    draw(history, paths.learning_curve)
    return summary


def summarise(history: RunHistory) -> dict[str, Any]:
    """The figures, the most wanted ones first."""
    before, after = _evaluations(history.stages)
    final = _rate(after.successes, len(after.episodes)) if after else _recent_rate(history)
    start = _rate(before.successes, len(before.episodes)) if before else _rate(0, 0)
    online = [episode for episode in history.episodes if episode.mode == "online"]
    return {
        "success_rate": final["rate"],
        "success_rate_interval": final["interval"],
        "success_rate_episodes": final["episodes"],
        "success_rate_from": after.name if after else f"last {RECENT} online episodes",
        "median_seconds_to_success": _median_seconds(after.episodes) if after else None,
        **_speed(after.episodes if after else ()),
        "success_rate_before_online": start["rate"],
        "success_rate_before_online_interval": start["interval"],
        "episodes": len(history.episodes),
        "successes": sum(episode.success for episode in history.episodes if episode.mode != "eval"),
        "accepted_episodes": history.accepted,
        "quarantined": history.quarantined,
        "interventions": sum(episode.interventions > 0 for episode in online),
        "intervention_ticks": sum(episode.interventions for episode in online),
        "human_ticks": sum(e.n_ticks if e.mode == "demo" else e.interventions for e in history.episodes),
        "intervention_rate_first_third": _helped(online[: len(online) // 3]),
        "intervention_rate_last_third": _helped(online[len(online) - len(online) // 3 :]),
        "transitions": sum(episode.n_ticks for episode in history.episodes),
        "minutes": round((history.end_time - history.start_time) / 60, 2),
        "policy_versions": _newest(history, "version", "policy/version"),  # the first one published is 1
        "steps": _newest(history, "step", "step"),
        "seed": history.config.get("seed"),
        "algo": (history.config.get("algo") or {}).get("name"),
        "policy": (history.config.get("policy") or {}).get("name"),
        "task": (history.config.get("task") or {}).get("name"),
        "git_revision": _git_revision(),
        "code": history.config.get("code"),  # of a lab's own package; as the last start wrote it
        "stages": [stage_row(stage) for stage in history.stages],
        "operators": history.operators,
    }


def _evaluations(stages: Sequence[StageRecord]) -> tuple[StageRecord | None, StageRecord | None]:
    """The last evaluation before online training began, and the last one after (or the only one, without online)."""
    begin = next((k for k, stage in enumerate(stages) if stage.mode == "online"), None)
    evaluations = [(k, stage) for k, stage in enumerate(stages) if stage.mode == "eval" and stage.episodes]
    if begin is None:
        return None, evaluations[-1][1] if evaluations else None
    before = [stage for k, stage in evaluations if k < begin]
    after = [stage for k, stage in evaluations if k >= begin]
    return before[-1] if before else None, after[-1] if after else None


def _recent_rate(history: RunHistory) -> dict[str, Any]:
    recent = [episode for episode in history.episodes if episode.mode == "online" and episode.whole][-RECENT:]
    return _rate(sum(episode.autonomous for episode in recent), len(recent))


def _rate(successes: int, n: int) -> dict[str, Any]:
    if n == 0:
        return {"rate": None, "interval": None, "episodes": 0}
    low, high = wilson(successes, n)
    return {"rate": round(successes / n, 4), "interval": [round(low, 4), round(high, 4)], "episodes": n}


def _median_seconds(episodes: Sequence[EpisodeRecord]) -> float | None:
    """From the first tick to the end, of the successes whose time is known."""
    seconds = [e.seconds for e in episodes if e.success and e.seconds is not None]
    return round(median(seconds), 3) if seconds else None


def _speed(episodes: Sequence[EpisodeRecord]) -> dict[str, float | None]:
    return speed([e.n_ticks for e in episodes], [e.success for e in episodes])


def _helped(episodes: Sequence[EpisodeRecord]) -> float | None:
    return round(sum(e.interventions > 0 for e in episodes) / len(episodes), 4) if episodes else None


def _newest(history: RunHistory, told: str, logged: str) -> int:
    """The trainer's count: as the status tells it, which the log, written now and then, may lag behind."""
    rows = (row.get(logged) for row in history.metrics)
    figures = [(history.status.get("trainer") or {}).get(told), *rows]
    return int(max((figure for figure in figures if figure is not None), default=0))


def stage_row(stage: StageRecord) -> dict[str, Any]:
    """A stage in figures, as summary.json has them."""
    result = _rate(stage.successes, len(stage.episodes))
    return {
        "name": stage.name,
        "mode": stage.mode,
        "episodes": result["episodes"],
        "success_rate": result["rate"],
        "success_rate_interval": result["interval"],
        "median_seconds_to_success": _median_seconds(stage.episodes),
        **_speed(stage.episodes),
        "ticks": stage.ticks,
        "steps": stage.steps,
        "minutes": round((stage.end_time - stage.start_time) / 60, 2),
    }


def _git_revision() -> str | None:
    """Commit of the running code, with `+changes` when the tree was edited; None outside a repository."""
    folder = Path(__file__).parent
    try:
        revision = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+changes", "--exclude=*"],
            cwd=folder, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return revision.stdout.strip() or None


if __name__ == "__main__":
    try:
        print(json.dumps(write_summary(Path(sys.argv[1])), indent=2))
    except (IndexError, ValueError) as error:
        sys.exit(f"usage: python -m serl_launcher.telemetry.summary <run_dir>\n{error}")
