"""Two or more runs beside each other: what differs in config, code and libraries, their figures, their curves.

    run folders ─▶ compare ─▶ lines for a terminal;  draw ─▶ a picture: success over episodes, loss over steps

Called by tools/runs.py. What belongs to a place (folders, ports, names) is no difference between experiments.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from serl_launcher.run.config import dotted
from serl_launcher.run.files import write_whole
from serl_launcher.run.paths import RunPaths
from serl_launcher.run.record import config_of, read_starts
from serl_launcher.telemetry.history import RunHistory, read_history
from serl_launcher.telemetry.registry import row
from serl_launcher.telemetry.statistics import sliding, wilson

WINDOW = 30  # online episodes per point
PLACES = (
    "run",
    "runs_dir",
    "port",
    "broadcast_port",
    "ip",
    "bind_host",
    "on_complete",
    "actor",
    "learner",
    "code.config_dir",
)
FIGURES = (
    "success_rate", "success_rate_interval", "success_rate_from", "held_out_loss", "episodes", "transitions", "steps",
    "policy_versions", "minutes",
)  # fmt: skip
COLOURS = ("#1f5fa8", "#b5402e", "#2e7d32", "#8a6d1d", "#6a3d9a", "#4a4a4a")


def compare(runs: Sequence[Path]) -> list[str]:
    """Lines: a table of figures, then each key of the config that differs, then code and libraries that differ.

    ValueError names a folder that is no run.
    """
    rows = [row(run) for run in runs]
    names = labels(runs)
    lines = table(["figure", *names], [[key, *(_shown(found.get(key)) for found in rows)] for key in FIGURES])
    configs = [dotted(_config(run)) for run in runs]
    keys = [key for key in dict.fromkeys(key for config in configs for key in config) if not _is_place(key)]
    changed = [key for key in keys if len({repr(config.get(key)) for config in configs}) > 1]
    lines += ["", f"config: {len(changed)} keys differ"]
    if changed:
        cells = [[key, *(_shown(config.get(key)) for config in configs)] for key in changed]
        lines += table(["key", *names], cells)
    code = [["commit", *(_shown(found["commit"]) for found in rows)]]
    code += [["code", *(_code(found) for found in rows)], ["data", *(_shown(found.get("dataset")) for found in rows)]]
    known = [found["libraries"] or {} for found in rows]
    for name in dict.fromkeys(name for libraries in known for name in libraries):
        if len({libraries.get(name) for libraries in known}) > 1:
            code.append([name, *(_shown(libraries.get(name)) for libraries in known)])
    return [*lines, "", *table(["code, data", *names], code)]


def draw(runs: Sequence[Path], path: Path) -> None:
    """The curves of the runs over each other, as PNG, written whole."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    success, loss = figure.subplots(2, 1, height_ratios=[3, 2])
    for place, (run, name) in enumerate(zip(runs, labels(runs), strict=True)):
        history, colour = read_history(run), COLOURS[place % len(COLOURS)]
        _draw_success(success, history, name, colour)
        points = [(r["step"], value) for r in history.metrics if (value := _loss(r)) is not None]
        if points:
            loss.plot(*zip(*points, strict=True), color=colour, linewidth=1.2, label=name)
    success.set(ylim=(0, 1.04), ylabel="success rate", xlabel="online episodes (points: evaluations)")
    loss.set(ylabel="loss", xlabel="trainer step")
    for axis in (success, loss):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=9)
    write_whole(path, lambda part: figure.savefig(part, format="png"))


def labels(runs: Sequence[Path]) -> list[str]:
    """A short name of each folder: its own, with those above it where two are called the same."""
    for depth in range(1, 8):
        names = ["/".join(run.absolute().parts[-depth:]) for run in runs]
        if len(set(names)) == len(names):
            return names
    return [str(run) for run in runs]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Cells in columns."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in (head, *rows)
    ]


def _draw_success(axis: Any, history: RunHistory, name: str, colour: str) -> None:
    online = [episode for episode in history.episodes if episode.mode == "online" and episode.whole]
    if online:
        points = sliding([episode.autonomous for episode in online], WINDOW)
        rates = [wins / n for wins, n in points]
        low, high = zip(*(wilson(wins, n) for wins, n in points), strict=True)
        count = range(1, len(online) + 1)
        axis.plot(count, rates, color=colour, linewidth=1.8, label=f"{name}, without help, last {WINDOW}")
        axis.fill_between(count, low, high, color=colour, alpha=0.12, linewidth=0)
    for stage in history.stages:
        if stage.mode != "eval" or not stage.episodes:
            continue
        before = sum(episode.end_time <= stage.start_time for episode in online)
        wins, n = stage.successes, len(stage.episodes)
        low_, high_ = wilson(wins, n)
        error = [[wins / n - low_], [high_ - wins / n]]
        axis.errorbar(before, wins / n, yerr=error, fmt="o", color=colour, capsize=3, label=f"{name}, {stage.name}")


def _loss(metrics: Mapping[str, Any]) -> float | None:
    return next((value for key, value in metrics.items() if key.startswith("losses/") and value is not None), None)


def _config(run: Path) -> dict[str, Any]:
    starts = read_starts(RunPaths(run))
    return config_of(RunPaths(run), starts[-1] if starts else None) or {}


def _is_place(key: str) -> bool:
    return key in PLACES


def _code(found: Mapping[str, Any]) -> str:
    return f"{_shown(found['code'])}{f' +{found["changed"]} changed' if found['changed'] else ''}"


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
