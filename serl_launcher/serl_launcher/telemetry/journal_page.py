"""journal.md of a run: what happened, for people, who may write into it. The learner's main and train_sft call it.

    a start, each stage that is over, each end ─▶ a section at the end of the page, headed by date, time and run id

Nothing above is ever read as an order or changed, so what a person wrote stays, whatever starts next. A page that was
removed begins anew. The supervisor's loop calls `look`, which says once that a disk refuses it and tries again.
"""

import os
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from serl_launcher.run.config import dotted
from serl_launcher.run.files import append_whole
from serl_launcher.run.in_force import NOBODYS
from serl_launcher.run.paths import RunPaths
from serl_launcher.run.provenance import when
from serl_launcher.run.record import config_of, read_starts
from serl_launcher.telemetry.history import RunHistory, read_history
from serl_launcher.telemetry.summary import stage_row, summarise

RETRY_S = 10.0  # after a section that the disk or a damaged file refused
SHOWN = 12  # changed keys that a start names
_OVER = re.compile(r"^## .* · stage `([^`]+)` is over$", re.MULTILINE)
_HEAD = """# {run}

{when} · run id {run_id}

Write into this page wherever you like: each start, each stage that ends and each end adds a section below, and nothing
above is changed. `tools/runs.py show <this folder>` says which code, config and data the run is made of.
"""


class JournalPage:
    """say: where a line goes that a person must see."""

    def __init__(self, paths: RunPaths, say: Callable[[str], object]) -> None:
        self._paths, self._say = paths, say
        self._seen: tuple[Any, Any] | None = None  # stage and done, as the page has them
        self._told = False  # that the disk refuses
        self._again = 0.0  # monotonic, s: not before

    def start(self) -> None:
        """The section of the newest start. OSError when the disk refuses."""
        starts = read_starts(self._paths)
        line = starts[-1]
        code = line["revision"]
        commit = code["commit"][:12] if code["commit"] else "code"
        changed = f"+{len(code['changed'])} changed files" if code["changed"] else ""
        config = config_of(self._paths, line) or {}
        names = {key: (config.get(key) or {}).get("name") for key in ("task", "policy", "algo")}
        told = ", ".join(f"{key} {name}" for key, name in names.items() if name)
        rows = [
            f"by {line['user']} on {line['host']}: `{' '.join(line['words'])}`",
            f"code {commit}{changed}, digest {code['digest']}; config {line['config']}",
            f"{told}, seed {config.get('seed')}",
            *self._changes(starts),
        ]
        self._append(f"start {line['start']} ({line['kind']}, {line['state']})", rows)

    def look(self, status: Mapping[str, Any]) -> None:
        """Called again and again with the status document: a section for each stage that is over and has none."""
        stage = status.get("stage") or {}
        now = (stage.get("index"), status.get("done"))
        if now == self._seen or stage.get("index") is None or time.monotonic() < self._again:
            return
        try:
            self._stages(int(stage["index"]), bool(status.get("done")))
        except (OSError, ValueError) as error:
            self._again = time.monotonic() + RETRY_S
            self._refused(error)
            return
        self._seen = now

    def end(self, how: str) -> None:
        """The section of an end, with the figures so far. how: for people, `complete` or `stopped by SIGINT`."""
        try:
            self._append(f"ended: {how}", _figures(read_history(self._paths.root)))
        except (OSError, ValueError) as error:
            self._refused(error)

    def _stages(self, index: int, done: bool) -> None:
        page = self._paths.page.read_text(encoding="utf-8", errors="replace") if self._paths.page.is_file() else ""
        written = set(_OVER.findall(page))
        history = read_history(self._paths.root)
        names = [stage["name"] for stage in (history.config.get("schedule") or {}).get("stages") or ()]
        over = set(names if done else names[: max(0, index)])
        for stage in history.stages:
            if stage.name in over - written:
                self._append(f"stage `{stage.name}` is over", [_stage_line(stage_row(stage))])

    def _changes(self, starts: list[dict[str, Any]]) -> list[str]:
        """What the config says otherwise than at the start before."""
        if len(starts) < 2:
            return []
        before, now = (dotted(config_of(self._paths, line)) for line in starts[-2:])
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        rows = [f"{key}: {before.get(key)} -> {now.get(key)}" for key in changed[:SHOWN]]
        return rows + ([f"and {len(changed) - SHOWN} more keys"] if len(changed) > SHOWN else [])

    def _append(self, what: str, rows: list[str]) -> None:
        path, starts = self._paths.page, read_starts(self._paths)
        run_id = starts[0]["run_id"] if starts else "not recorded"
        now = when(time.time())
        text = f"\n## {now} · run {run_id} · {what}\n\n" + "".join(f"- {row}\n" for row in rows)
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            if not size:
                text = _HEAD.format(run=self._paths.root.name, when=now, run_id=run_id) + text
            elif os.pread(descriptor, 1, size - 1) != b"\n":  # an editor that ends no last line
                text = "\n" + text
            append_whole(descriptor, text.encode())
        finally:
            os.close(descriptor)

    def _refused(self, error: Exception) -> None:
        if not self._told:
            self._say(f"{self._paths.page} takes no section ({error}); the run goes on, it is tried again")
        self._told = True


def _stage_line(row: Mapping[str, Any]) -> str:
    parts = []
    if row["episodes"]:
        rate = _rate(row["success_rate"], row["success_rate_interval"])
        parts.append(f"{row['episodes']} episodes, {rate}, {row['ticks']} ticks")
    if row["steps"]:
        parts.append(f"{row['steps']} steps")
    return f"{row['mode']}: {', '.join([*parts, f'{row["minutes"]:g} minutes'])}"


def _figures(history: RunHistory) -> list[str]:
    figures = summarise(history)
    rate = _rate(figures["success_rate"], figures["success_rate_interval"])
    return [
        f"{rate}, from {figures['success_rate_from']} ({figures['success_rate_episodes']} episodes)",
        f"{figures['episodes']} episodes, {figures['transitions']} ticks, {figures['interventions']} with help, "
        f"{figures['steps']} steps, {figures['policy_versions']} versions, {figures['minutes']:g} minutes",
        *_acts(history.operators),
    ]


def _acts(operators: Mapping[str, Any]) -> list[str]:
    """What people did to the run, by kind and name; nothing where nobody did anything."""
    acts = {kind: n for kind, n in operators.get("acts", {}).items() if kind not in NOBODYS}
    told = ", ".join(f"{kind} {n}" for kind, n in acts.items())
    lines = [f"acts of {', '.join(operators['by'])}: {told} (tools/operate.py log, acts.jsonl)"] if acts else []
    for what, people in (operators.get("people") or {}).items():
        if people:
            lines.append(f"{what.replace('_', ' ')}: {', '.join(f'{name} {n} episodes' for name, n in people.items())}")
    return lines


def _rate(rate: float | None, interval: list[float] | None) -> str:
    return f"success {rate:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]" if rate is not None and interval else "no rate"
