"""Four simulated actors against one, each behind a slow line of its own, one of them killed every minute: nothing lost.

The quick start's schedule with `MANY_ACTORS` (default 1,4) actors in turn. Each reaches the learner through proxies of
100 ms there and back and 20 Mbit/s. Minutes count from the first actor's start to the moment when LEVEL of the last
WINDOW online episodes succeeded without help. `MANY_WORDS`: further overrides of learner and actors, for a short try.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
from chaos import SEED, ChaosProxy, Weather
from whole_run import ROOT, Run, check

COUNTS = [int(word) for word in os.environ.get("MANY_ACTORS", "1,4").split(",")]
WORDS = shlex.split(os.environ.get("MANY_WORDS", ""))
KILL_EVERY_S = float(os.environ.get("MANY_KILL_EVERY_S", "60"))
LINE = Weather(delay_s=0.05, rate_bps=20e6)
WINDOW, LEVEL = 40, 0.9
ENDS_S = 3600.0


class Many(Run):
    """`run_learner.sh`, and `run_actor.sh` as often as wanted, each through proxies of its own."""

    def __init__(self, folder: Path, ports: tuple[int, int], actors: int):
        self.folder, self.log, self.rng = folder / "small", folder / "learner.log", random.Random(SEED)
        self._words = ["run=small", f"runs_dir={folder}", "rollout.video_every=0", *WORDS]
        own = [f"port={ports[0]}", f"broadcast_port={ports[1]}", "console.port=null"]
        self.process = self._start("run_learner.sh", own, self.log)
        self.proxies, self.actors = [], []
        for number in range(actors):
            pair = [ChaosProxy(port, LINE) for port in ports]
            self.proxies += pair
            words = ["ip=127.0.0.1", f"port={pair[0].port}", f"broadcast_port={pair[1].port}"]
            words.append(f"unique_identifier=actor-{number}")
            self.actors.append(self._start("run_actor.sh", words, folder / f"actor-{number}.log"))
        self.began, self.kills = time.time(), 0

    def _start(self, script: str, words: list[str], log: Path) -> subprocess.Popen:
        with log.open("wb") as out:
            return subprocess.Popen(
                ["bash", script, *self._words, *words], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def kill_one_now_and_then(self) -> None:
        """Until the learner ends by its schedule."""
        due, deadline = time.monotonic() + KILL_EVERY_S, time.monotonic() + ENDS_S
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.text()[-4000:]
            if time.monotonic() >= due and (found := self.pids("actor=true")):
                os.kill(self.rng.choice(found), signal.SIGKILL)
                self.kills, due = self.kills + 1, due + KILL_EVERY_S
            time.sleep(0.2)

    def end_actors(self) -> list[int]:
        """Their exit codes: 0 of those that the learner told of the end; what was killed shortly before it finds no
        learner and waits for one, as it should: SIGTERM's code."""
        deadline = time.monotonic() + 60
        while any(actor.poll() is None for actor in self.actors) and time.monotonic() < deadline:
            time.sleep(0.2)
        for actor in self.actors:
            if actor.poll() is None:
                actor.terminate()
        return [actor.wait(60) for actor in self.actors]

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.end_actors()
        for proxy in self.proxies:
            proxy.stop()


def minutes_to_level(folder: Path, began: float) -> float | None:
    """When LEVEL of the last WINDOW online episodes had succeeded without help; None: never."""
    rows = [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]
    online = sorted((row for row in rows if row["mode"] == "online" and row["whole"]), key=lambda row: row["end_time"])
    alone = [bool(row["success"]) and not row["interventions"] for row in online]
    for last in range(WINDOW, len(alone) + 1):
        if sum(alone[last - WINDOW : last]) >= LEVEL * WINDOW:
            return (online[last - 1]["end_time"] - began) / 60
    return None


@pytest.mark.soak
@pytest.mark.timeout(2 * 7200)
def test_four_actors_over_slow_lines_learn_in_a_third_of_the_time_and_lose_nothing(tmp_path, free_ports, figures):
    reached: dict[int, float | None] = {}
    for count in COUNTS:
        folder = tmp_path / f"of-{count}"
        folder.mkdir()
        with Many(folder, free_ports, count) as many:
            many.kill_one_now_and_then()
            summary = many.end(10)
            codes = many.end_actors()
        report = check(many.folder)
        reached[count] = minutes_to_level(many.folder, many.began)
        figures.row(
            f"many_actors/{count}", "0 lost, the end by the schedule", "nothing lost" in report,
            minutes_to_level=reached[count] and round(reached[count], 2), minutes=summary["minutes"],
            success_rate=summary.get("success_rate"), episodes=summary["episodes"],
            transitions=summary["transitions"], killed=many.kills,
        )  # fmt: skip
        assert "nothing lost" in report
        assert 0 in codes
        assert set(codes) <= {0, 128 + signal.SIGTERM}
    if None not in reached.values() and len(COUNTS) > 1:
        ratio = reached[COUNTS[-1]] / reached[COUNTS[0]]
        figures.row("many_actors/ratio", "a third of one actor's time at most", ratio <= 1 / 3, ratio=round(ratio, 3))
        assert ratio <= 1 / 3
    else:
        assert WORDS or len(COUNTS) == 1, f"the level was never reached: {reached}"  # a short try need not reach it
