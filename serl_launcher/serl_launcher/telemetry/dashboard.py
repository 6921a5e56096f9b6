"""The learner's pane: the status document as a few lines of text. The supervisor prints them.

    render(status, …)          what the supervisor shows: one of these two, what ails the roles, or that news is late
    render_status(status)      up to 7 lines + one per actor, at most 100 columns, for a terminal that is redrawn
    render_line(status)        the same in one line, for logs

Metrics are explained in docs/data.md.
"""

import time
from collections.abc import Mapping
from typing import Any

from serl_launcher.telemetry.statistics import wilson

WIDTH = 100
BAR = 24  # cells of the progress bar
LATE_S = 4.0  # the gateway writes its status every second
SILENT_S = 10.0  # an actor that was not heard for so long brings no episodes


def render(status: Mapping[str, Any], silent_s: float, troubles: Mapping[str, str], whole: bool) -> list[str]:
    """The pane (`whole`) or one line; nothing before the first status.

    silent_s: for how long the gateway has told nothing new; its old figures are not shown then. troubles: role -> text.
    """
    lines = []
    if status and silent_s > LATE_S:
        since = time.strftime("%H:%M:%S", time.localtime(time.time() - silent_s))
        lines = [f"{status.get('run', '?')}  gateway silent for {_age(silent_s)}, since {since}: no figures"]
    elif status:
        lines = render_status(status) if whole else [render_line(status)]
    if not whole:
        said = [*lines, *(f"{name} {text}" for name, text in troubles.items())]
        return [" · ".join(said)] if said else []
    return [*lines, *(_fit(f"  {name:<10} {text}") for name, text in troubles.items())]


def render_status(status: Mapping[str, Any]) -> list[str]:
    """Lines of the learner's pane; parts that are not known yet are shown as a dash or left out."""
    lines = [_stage_line(status), _learning_line(status), _episodes_line(status)]
    if asked := operators_asked(status):
        lines.insert(1, f"  operator   {asked}")
    if waits := waits_for(status):
        lines.insert(1, f"  waits      {waits}")
    evaluation = _evaluation_line(status)
    if evaluation:
        lines.append(evaluation)
    lines.append(_flow_line(status))
    lines += [_actor_line(name, actor) for name, actor in _actors(status)]
    return [_fit(line) for line in lines]


def _fit(line: str) -> str:
    return line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"


def render_line(status: Mapping[str, Any]) -> str:
    """The most important figures in one line."""
    stage, counts = status.get("stage") or {}, status.get("counts") or {}
    done, goal, unit = _progress(stage)
    parts = [
        f"{stage.get('name', 'idle')} {done}/{goal} {unit}" if goal else str(stage.get("name", "idle")),
        f"step {_get(status, 'trainer', 'step', default=0)}",
        f"loss {_number(_loss(status))}",
        f"episodes {counts.get('episodes', 0)}" + _accepted(status, ", "),
        f"success {_rate(status)}",
        f"help {_percent(_get(status, 'rates', 'intervention_rate'))}",
        f"v{_get(status, 'trainer', 'version', default=-1)}",
    ]
    said = [f"{name}: {actor['trouble']}" for name, actor in _actors(status) if actor.get("trouble")]
    return " · ".join([*parts, *filter(None, [operators_asked(status), waits_for(status)]), *said])


def operators_asked(status: Mapping[str, Any]) -> str | None:
    """What people asked of the run and holds; None: nothing."""
    operator = status.get("operator") or {}
    said = ["actors paused"] if operator.get("paused") else []
    said += [f"{actor} paused" for actor in operator.get("paused_actors") or ()]
    said += [f"{who} has the keys of {actor}" for actor, who in (operator.get("keys") or {}).items()]
    said += ["training paused"] if operator.get("training_paused") else []
    said += [f"v{operator['served']} pinned"] if operator.get("served") is not None else []
    said += [f"{key}={row['value']} ({row['by']})" for key, row in (operator.get("settings") or {}).items()]
    said += [f"{operator['words']} episodes judged by people"] if operator.get("words") else []
    return " · ".join(said) or None


def waits_for(status: Mapping[str, Any]) -> str | None:
    """What only a person can bring: room on the disk, demonstrations for a stage that trains on them, an actor."""
    if refused := status.get("storage") or _get(status, "trainer", "waits"):
        return str(refused)
    if waited := _get(status, "ending", "waits_for"):
        return "; ".join(f"{name} {what}" for name, what in waited.items())
    mode, counts = _get(status, "stage", "mode"), status.get("counts")
    if status.get("done") or counts is None:
        return None
    if mode == "train" and not counts.get("demos") and not counts.get("online"):
        return f"no demonstrations in run {status.get('run', '?')} yet: run_learner_data_collection.sh records them"
    alive = any((actor.get("last_seen_s") or 0.0) < SILENT_S for actor in (status.get("actors") or {}).values())
    if mode in ("demo", "online", "eval") and not alive:
        return f"no actor is here for its {mode} episodes: run_actor.sh"
    return None


def progress_bar(done: float, goal: float, cells: int = BAR) -> str:
    """`[######....]`, full at the goal."""
    share = 1.0 if goal <= 0 else min(1.0, max(0.0, done / goal))
    full = int(share * cells)
    return "[" + "#" * full + "." * (cells - full) + "]"


def _stage_line(status: Mapping[str, Any]) -> str:
    stage = status.get("stage") or {}
    title = f"{status.get('run', '?')}  {_numbered(stage)}"
    if status.get("done"):
        return f"{title}  done"
    done, goal, unit = _progress(stage)
    return f"{title}  {progress_bar(done, goal)} {done}/{goal} {unit}" if goal else title


def _numbered(stage: Mapping[str, Any]) -> str:
    return f"stage {stage.get('index', 0) + 1} {stage['name']} ({stage.get('mode')})" if stage.get("name") else "idle"


def _progress(stage: Mapping[str, Any]) -> tuple[int, int, str]:
    """(done, goal, unit) of the condition that is furthest from its goal; goal 0: the stage has no end."""
    candidates = [
        (stage.get(unit) or 0, goal, unit) for unit in ("steps", "episodes") if (goal := stage.get(f"{unit}_goal") or 0)
    ]
    return min(candidates, key=lambda item: item[0] / item[1], default=(0, 0, "steps"))


def _learning_line(status: Mapping[str, Any]) -> str:
    trainer = status.get("trainer") or {}
    alive = "" if trainer.get("alive", True) else "  (trainer is away)"
    step_s = _get(status, "trainer", "metrics", "time/step_s")
    speed = f"  {1e3 * step_s:.0f} ms/step" if isinstance(step_s, int | float) else ""
    return (
        f"  training   step {trainer.get('step', 0):<6} loss {_number(_loss(status)):<8} "
        f"policy v{trainer.get('version', -1)}{speed}{alive}"
    )


def _episodes_line(status: Mapping[str, Any]) -> str:
    counts = status.get("counts") or {}
    return (
        f"  episodes   {counts.get('episodes', 0)}{_accepted(status, '   ')}   "
        f"success {_rate(status)}   interventions {_percent(_get(status, 'rates', 'intervention_rate'))}"
    )


def _evaluation_line(status: Mapping[str, Any]) -> str | None:
    parts = []
    for stage, result in (status.get("eval") or {}).items():
        n, successes = result.get("episodes", 0), result.get("successes", 0)
        if n:
            low, high = wilson(successes, n)
            parts.append(f"{stage} {successes / n:.2f} [{low:.2f}, {high:.2f}] of {n}")
    return "  evaluation " + "   ".join(parts) if parts else None


def _flow_line(status: Mapping[str, Any]) -> str:
    counts = status.get("counts") or {}
    rate, serving = _get(status, "rates", "transitions_per_s"), status.get("serving") or {}
    parts = [f"{counts.get('transitions', 0)} transitions ({_number(rate, 1)}/s)"]
    if serving.get("p50_ms") is not None:
        batch = f", batch {serving['batch_mean']:.1f}" if serving.get("batch_mean") else ""
        parts.append(f"serving v{serving.get('version', -1)} at {serving['p50_ms']:.0f} ms{batch}")
    exported = _get(status, "exporter", "episodes")
    if exported is not None:
        aside = _get(status, "exporter", "quarantined")
        parts.append(f"dataset {exported} episodes" + (f", {aside} in quarantine" if aside else ""))
    return "  data       " + "   ".join(parts)


def _actors(status: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return sorted((status.get("actors") or {}).items())


def _actor_line(name: str, actor: Mapping[str, Any]) -> str:
    version, age = actor.get("policy_version", -1), actor.get("version_age_s")
    policy = (
        "no policy yet"
        if version is None or version < 0
        else f"policy v{version}" + (f" ({_age(age)} old)" if age is not None else "")
    )
    silent = actor.get("last_seen_s") or 0.0
    seen = f"   silent for {_age(silent)}" if silent > 3 else ""
    if left := actor.get("left"):
        return f"  actor      {name}   left: {left}"
    if trouble := actor.get("trouble"):
        return f"  actor      {name}   {trouble}{seen}"
    backlog = f"   backlog {actor['backlog']}" if actor.get("backlog") else ""
    return f"  actor      {name}   {actor.get('mode') or 'waiting'}   {policy}{backlog}{seen}"


def _loss(status: Mapping[str, Any]) -> float | None:
    metrics = _get(status, "trainer", "metrics") or {}
    return next((value for key, value in metrics.items() if key.startswith("losses/")), None)


def _rate(status: Mapping[str, Any]) -> str:
    """`0.62 [0.47, 0.75]`, or a dash before the first online episode."""
    rates = status.get("rates") or {}
    if rates.get("success_rate") is None:
        return "–"
    interval = ""
    if rates.get("success_low") is not None:
        interval = f" [{rates['success_low']:.2f}, {rates['success_high']:.2f}]"
    return f"{rates['success_rate']:.2f}{interval}"


def _accepted(status: Mapping[str, Any], separator: str) -> str:
    """How many episodes are imitated, as the trainer says; nothing where no trainer is."""
    n = _get(status, "trainer", "metrics", "replay/accepted")
    return "" if n is None else f"{separator}{n:.0f} accepted"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f}%"


def _number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _age(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _get(status: Mapping[str, Any], *keys: str, default: Any = None) -> Any:
    value: Any = status
    for key in keys:
        if not isinstance(value, Mapping) or value.get(key) is None:
            return default
        value = value[key]
    return value
