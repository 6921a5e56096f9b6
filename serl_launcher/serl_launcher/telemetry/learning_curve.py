"""learning_curve.png: success over wall time, how much help it took, and the loss. Called by `summary.write_summary`.

    panel 1   online success without help (sliding window, 95% band) and the evaluations with their intervals
    panel 2   share of online episodes in which the operator took over
    panel 3   training loss
Stages are shaded behind all three, in minutes since the run began.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serl_launcher.run.files import write_whole
from serl_launcher.telemetry.history import EpisodeRecord, RunHistory, StageRecord
from serl_launcher.telemetry.statistics import sliding, speed, wilson

WINDOW = 30  # online episodes per point
SHADES = {"demo": "#dcd3c4", "train": "#cfd8dc", "eval": "#c8e6c9", "online": "#d6e4f5"}
BLUE, RED, GREY, GREEN = "#1f5fa8", "#b5402e", "#4a4a4a", "#2e7d32"


def draw(history: RunHistory, path: Path) -> None:
    """Draw and write the picture, whole."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    success, help_, loss = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1.4, 1.4])
    online = [episode for episode in history.episodes if episode.mode == "online" and episode.whole]
    _draw_success(success, history, online)
    _draw_help(help_, history, online)
    _draw_loss(loss, history)
    for axis in (success, help_, loss):
        _shade(axis, history, label=axis is success)
        axis.grid(axis="y", color="white", linewidth=1)
        axis.grid(axis="y", color="#00000018", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels()
    loss.set_xlabel("minutes since the run began")
    loss.set_xlim(0, max((history.end_time - history.start_time) / 60, 0.1))
    figure.suptitle(_title(history), fontsize=13, x=0.01, ha="left")
    write_whole(path, lambda part: figure.savefig(part, format="png"))


def _title(history: RunHistory) -> str:
    config = history.config
    names = [(config.get(group) or {}).get("name") for group in ("algo", "policy", "task")]
    return "  ·  ".join([*(name for name in names if name), f"seed {config.get('seed')}"])


def _minutes(history: RunHistory, time: float) -> float:
    return (time - history.start_time) / 60


def _windows(
    history: RunHistory, online: Sequence[EpisodeRecord], outcomes: Sequence[bool]
) -> list[tuple[float, int, int]]:
    """(minute, how many true, of how many) over the last WINDOW episodes; fewer than ten say nothing."""
    rows = zip(online, sliding(outcomes, WINDOW), strict=True)
    return [(_minutes(history, e.end_time), k, n) for e, (k, n) in rows if n >= min(10, len(online))]


def _draw_success(axis: Any, history: RunHistory, online: Sequence[EpisodeRecord]) -> None:
    if online:
        points = _windows(history, online, [episode.autonomous for episode in online])
        curve = [(minute, wins / n, *wilson(wins, n)) for minute, wins, n in points]
        minutes, rate, low, high = zip(*curve, strict=True)
        axis.fill_between(minutes, low, high, color=BLUE, alpha=0.18, linewidth=0)
        axis.plot(minutes, rate, color=BLUE, linewidth=2, label=f"online without help, last {WINDOW} episodes")
    for stage in history.stages:
        if stage.mode == "eval" and stage.episodes:
            _draw_evaluation(axis, history, stage)
    axis.set_ylim(0, 1.04)
    axis.set_ylabel("success rate")
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    if unique:
        axis.legend(unique.values(), unique.keys(), loc="lower right", framealpha=0.9, fontsize=9)


def _draw_evaluation(axis: Any, history: RunHistory, stage: StageRecord) -> None:
    n, wins = len(stage.episodes), stage.successes
    low, high = wilson(wins, n)
    minute = _minutes(history, (stage.start_time + stage.end_time) / 2)
    error = [[wins / n - low], [high - wins / n]]
    axis.errorbar(
        minute, wins / n, yerr=error, fmt="o", color=RED, markersize=7, capsize=4, linewidth=1.6,
        label="evaluation on unseen seeds, 95% interval",
    )  # fmt: skip
    below = wins / n > 0.5  # where the label hides neither the curve nor the edge
    fast = speed([e.n_ticks for e in stage.episodes], [e.success for e in stage.episodes])
    pace = fast["successes_per_1000_ticks"]
    axis.annotate(
        f"{wins / n:.2f}", (minute, low if below else high), xytext=(0, -6 if below else 6), textcoords="offset points",
        ha="center", va="top" if below else "bottom", color=RED, fontsize=11, fontweight="bold",
    )  # fmt: skip
    if pace:  # behind the rate, so that neither runs into the next stage's
        axis.annotate(
            f"{pace:.0f} in 1,000 ticks", (minute, low if below else high), xytext=(0, -21 if below else 21),
            textcoords="offset points", ha="right" if minute > _minutes(history, history.end_time) / 2 else "left",
            va="top" if below else "bottom", color=RED, fontsize=8,
            bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 1},
        )  # fmt: skip


def _draw_help(axis: Any, history: RunHistory, online: Sequence[EpisodeRecord]) -> None:
    axis.set_ylabel("episodes\nwith help")
    axis.set_ylim(0, 1.04)
    if not online:
        return
    points = _windows(history, online, [episode.interventions > 0 for episode in online])
    axis.plot([minute for minute, _, _ in points], [helped / n for _, helped, n in points], color=GREEN, linewidth=2)


def _draw_loss(axis: Any, history: RunHistory) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_ylabel("loss (log)")
    rows = [row for row in history.metrics if _loss(row) is not None]
    if not rows:
        return
    for stage in dict.fromkeys(row.get("stage") for row in rows):  # a gap between stages, where nothing was trained
        mine = [row for row in rows if row.get("stage") == stage]
        minutes, values = [_minutes(history, row["time"]) for row in mine], [_loss(row) for row in mine]
        axis.plot(minutes, values, color=GREY, linewidth=0.7, alpha=0.45)
        axis.plot(minutes, _smooth(values), color=GREY, linewidth=1.8)  # type: ignore[arg-type]
    if min(_loss(row) for row in rows) > 0:  # type: ignore[type-var]
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())


def _loss(row: Any) -> float | None:
    return next((value for key, value in row.items() if key.startswith("losses/") and value is not None), None)


def _smooth(values: Sequence[float], weight: float = 0.85) -> list[float]:
    """Exponential average, unbiased at the start."""
    result, total, norm = [], 0.0, 0.0
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        result.append(total / norm)
    return result


def _shade(axis: Any, history: RunHistory, label: bool) -> None:
    """Stage backgrounds; a stage lasts until the next begins. Names stand above the first panel where they fit."""
    end = _minutes(history, history.end_time)
    starts = [_minutes(history, stage.start_time) for stage in history.stages]
    for stage, start, stop in zip(history.stages, starts, [*starts[1:], end], strict=False):
        axis.axvspan(start, stop, color=SHADES.get(stage.mode, "#eeeeee"), alpha=0.6, linewidth=0, zorder=0)
        if label and stop - start > 0.03 * end:
            axis.text((start + stop) / 2, 1.06, stage.name, ha="center", va="bottom", fontsize=9, color=GREY)
