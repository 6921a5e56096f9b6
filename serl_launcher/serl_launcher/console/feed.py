"""What the page shows, read from the run folder: once a second while somebody looks, on a thread of its own.

    status.json, episodes.jsonl, acceptance.jsonl, acts.jsonl, metrics/trainer.jsonl, videos/ ─▶ look()
    look() ─▶ parts, each with a number that grows when it changes ─▶ since(number) ─▶ each page what it has not got

Files only: the gateway, the trainer and a full disk do not know that somebody looks.
"""

import os
import time
from collections.abc import Mapping
from typing import Any

from serl_launcher.console.alarms import alarms
from serl_launcher.console.controls import controls
from serl_launcher.console.curves import of_episodes, of_metrics
from serl_launcher.replay.relabelled import Relabelled
from serl_launcher.run.acts import ActsLedger
from serl_launcher.run.files import read_json
from serl_launcher.run.paths import RunPaths
from serl_launcher.run.tail import Tail

EPISODES, METRICS, ACTS = 3000, 4000, 40  # rows that are kept and shown
LONGEST_LOOK_S = 2.0  # a console that was itself stopped finds nobody silent when it goes on


class Feed:
    """One run's. `look` may be called from any thread, one at a time; `since` from another.

    config: the run's, for what may be changed of it; None: nothing.
    ValueError: a word of an older release (relabelled.json) cannot be read.
    """

    def __init__(self, paths: RunPaths, config: Mapping[str, Any] | None = None) -> None:
        self._paths, self._config = paths, config
        self._episodes, self._verdicts = Tail(paths.episodes), Tail(paths.acceptance)
        self._metrics = Tail(paths.metrics / "trainer.jsonl")
        self._relabelled, self._acts = Relabelled(paths.root), ActsLedger(paths.root)
        self._rows: dict[int, dict[str, Any]] = {}  # ordinal -> row of the page's ledger, oldest first
        self._judged: dict[int, dict[str, Any]] = {}  # ordinal -> its newest verdict
        self._steps: list[dict[str, Any]] = []
        self._number = self._next = 0  # of the last whole look; of the one in hand
        self._changed: dict[int, int] = {}  # ordinal -> number of its last change
        self._parts: dict[str, tuple[int, Any]] = {}
        self._status: dict[str, Any] = {}
        self._silent_s, self._looked = 0.0, time.monotonic()
        self.videos: dict[str, str] = {}  # episode id -> file name

    def look(self) -> None:
        """Read what is new. OSError does not come out: what cannot be read is as it was."""
        self._next = self._number + 1
        self._look_at_status()
        videos = self._list_videos()
        self._relabelled.refresh()
        replaced, lines = self._episodes.read()
        if replaced:
            self._rows.clear()
        news = self._read_verdicts() | {line["ordinal"] for line in lines if _is_row(line)}
        rows = {line["ordinal"]: _row(line) for line in lines if _is_row(line)}
        self._rows |= rows
        self._drop_old()
        news |= {n for n, row in self._rows.items() if self._decorate(row, videos)}
        self._changed |= {n: self._next for n in news if n in self._rows}
        if news or replaced:
            self._put("curves", of_episodes(self._rows.values()))
        self._look_at_metrics()
        self._put("acts", [_act(row) for row in self._acts.rows[-ACTS:]][::-1])
        if self._config is not None:
            self._put("controls", controls(self._config, self._acts.state, self._status.get("stage") or {}))
        self._number = self._next

    def since(self, number: int) -> tuple[int, dict[str, Any]]:
        """(number to ask with next time, what has changed since): parts by name, and `rows` of the ledger."""
        newest, rows = self._number, self._rows
        parts = {name: body for name, (changed, body) in list(self._parts.items()) if changed > number}
        news = [row for n, changed in list(self._changed.items()) if changed > number and (row := rows.get(n))]
        return newest, parts | ({"rows": news} if news else {})

    def knows(self, episode_id: str) -> bool:
        """Is that an episode of the page's ledger?"""
        return any(row["id"] == episode_id for row in list(self._rows.values()))

    def _put(self, name: str, body: Any) -> None:
        if name not in self._parts or self._parts[name][1] != body:
            self._parts[name] = (self._next, body)

    def _look_at_status(self) -> None:
        body = read_json(self._paths.status) or self._status
        now = time.monotonic()
        passed_s, self._looked = min(now - self._looked, LONGEST_LOOK_S), now
        self._silent_s = 0.0 if body != self._status else self._silent_s + passed_s
        self._status = body
        self._put("status", {key: value for key, value in body.items() if key not in ("time", "ring")})
        self._put("alarms", alarms(body, self._silent_s))

    def _look_at_metrics(self) -> None:
        replaced, lines = self._metrics.read()
        if replaced:
            self._steps.clear()
        for line in lines:
            if isinstance(line.get("step"), int):
                while self._steps and self._steps[-1]["step"] >= line["step"]:  # a resume does steps again
                    self._steps.pop()
                self._steps.append(line)
                if len(self._steps) > METRICS:  # the whole run in ever wider steps, not its last hour
                    del self._steps[-2::-2]
        if lines or replaced:
            self._put("losses", of_metrics(self._steps))
            self._put("metrics", self._steps[-1] if self._steps else {})

    def _read_verdicts(self) -> set[int]:
        replaced, lines = self._verdicts.read()
        if replaced:
            self._judged.clear()
        lines = [line for line in lines if isinstance(line.get("ordinal"), int)]
        self._judged |= {line["ordinal"]: line for line in lines}
        return {line["ordinal"] for line in lines}

    def _decorate(self, row: dict[str, Any], videos: Mapping[str, str]) -> bool:
        """Verdict, video and a person's later word, from other files; has anything changed?"""
        verdict, word = self._judged.get(row["n"]) or {}, self._relabelled.words.get(row["id"])
        now = {
            "accepted": verdict.get("accepted"),
            "reason": verdict.get("reason"),
            "rule": verdict.get("rule"),
            "video": row["id"] in videos,
            "word": None if word is None else {"success": word.success, "use": word.use, "by": word.by},
        }
        changed = any(row.get(key) != value for key, value in now.items())
        row |= now
        return changed

    def _drop_old(self) -> None:
        for ordinal in list(self._rows)[: max(0, len(self._rows) - EPISODES)]:
            self._changed.pop(ordinal, None)
            del self._rows[ordinal]

    def _list_videos(self) -> dict[str, str]:
        try:
            with os.scandir(self._paths.videos) as entries:
                names = [entry.name for entry in entries if entry.name.endswith(".mp4") and entry.name[0] != "."]
        except OSError:
            names = []
        self.videos = {name.rpartition("-")[0]: name for name in names}
        return self.videos


def _act(row: Mapping[str, Any]) -> dict[str, str]:
    """One line of acts.jsonl for the page's list."""
    said = [f"{key} {value}" for key, value in row.items() if key not in _OF_EVERY and value is not None]
    if row["act"] == "set" and "key" in row:
        said = [f"{row['key']} = {row.get('value')}; the config says {row.get('was')}"]
    return {"n": row["n"], "time": row.get("time", ""), "by": row.get("by", ""), "text": " ".join([row["act"], *said])}


_OF_EVERY = ("n", "id", "time", "by", "act", "goals", "trains")


def _is_row(line: Mapping[str, Any]) -> bool:
    return all(isinstance(line.get(key), kind) for key, kind in _NEEDED.items())


_NEEDED: dict[str, type] = {"ordinal": int, "episode_id": str, "mode": str, "n_ticks": int, "success": bool}


def _row(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of episodes.jsonl as the page's ledger has it."""
    return {
        "n": line["ordinal"], "id": line["episode_id"], "actor": line.get("actor"), "mode": line["mode"],
        "stage": line.get("stage"), "ok": line["success"], "ret": line.get("return", 0.0), "ticks": line["n_ticks"],
        "help": line.get("interventions", 0), "version": line.get("policy_version_last", -1),
        "cut": line.get("truncated_by"), "whole": line.get("whole", True), "time": line.get("end_time", 0.0),
        "seconds": line.get("seconds"), "drivers": line.get("drivers") or [], "judge": line.get("judge"),
    }  # fmt: skip
