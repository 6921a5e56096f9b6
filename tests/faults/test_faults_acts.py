"""Ten acts of an operator while gateway, trainer, console and policy server are killed at random moments: each holds.

A whole run as a user starts it. Every second act is sent as the console's page sends it. An act that was answered is in
the ledger once and in force; one that was not is sent again with its id.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from whole_run import Run

from serl_launcher.replay.verdicts import read as read_verdicts
from serl_transport.client import TrainerClient
from serl_transport.config import TrainerConfig
from serl_transport.contract.errors import NotReady, Refused, ServerSilent, StorageFull

GATEWAY, TRAINER, CONSOLE, POLICY = (f"serl_launcher.{role}" for role in ("gateway", "learner", "console", "serving"))
VICTIMS = [GATEWAY, TRAINER, CONSOLE, GATEWAY, POLICY]
AWAY = (
    ServerSilent,
    NotReady,
    StorageFull,
    urllib.error.URLError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
)
STAGES = "[{name: demos, mode: demo, episodes: 4}, {name: sft, mode: train, steps: 40}, " \
    "{name: online, mode: online, steps: 1000000}, {name: after, mode: eval, episodes: 3}]"  # fmt: skip


class Alice:
    """Says ten things; a role dies at a random moment around each."""

    def __init__(self, run: Run, ports: tuple[int, int], seed: int) -> None:
        self._run, self._random = run, random.Random(seed)
        self._client = TrainerClient("alice", "127.0.0.1", TrainerConfig(*ports), role="operator")
        self.answered: dict[str, dict[str, Any]] = {}  # by the act's id
        self.killed: Counter[str] = Counter()

    def say(self, request: str, **body: Any) -> dict[str, Any]:
        """Ask until it is answered; a role is killed meanwhile."""
        victim = VICTIMS[len(self.answered) % len(VICTIMS)]
        killer = threading.Timer(self._random.uniform(0.0, 0.08), self._kill, [victim])
        killer.start()
        body["id"] = uuid.uuid4().hex
        send = self._by_page if len(self.answered) % 2 else self._directly
        reply = self._ask(send, request, body)
        killer.join()
        self.answered[body["id"]] = reply["act"]
        return reply

    def refused(self, request: str, **body: Any) -> None:
        with pytest.raises(Refused):
            self._ask(self._directly, request, body)

    def _directly(self, request: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._client.request(request, body, timeout_ms=5000)

    def _by_page(self, request: str, body: dict[str, Any]) -> dict[str, Any]:
        """As the console's page posts it."""
        place = json.loads((self._run.folder / "console.json").read_text())
        here = f"http://127.0.0.1:{place['port']}"
        asked = json.dumps({"request": request, "payload": body, "person": "alice"}).encode()
        headers = {"Origin": here, "Content-Type": "application/json"}
        post = urllib.request.Request(f"{here}/act?t={place['token']}", asked, headers)
        with urllib.request.urlopen(post, timeout=70) as answer:
            return json.loads(answer.read())["reply"]

    def _ask(self, send: Callable[..., dict[str, Any]], request: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer, or the refusal; a learner that is away is asked again."""
        deadline = time.monotonic() + 120
        while True:
            try:
                return send(request, body)
            except AWAY:
                assert time.monotonic() < deadline, f"{request} was never answered"
                time.sleep(0.1)

    def close(self) -> None:
        self._client.stop()

    def _kill(self, module: str) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(AssertionError):  # it is dead, and not started again yet
                self._run.kill(module)
                self.killed[module] += 1
                return
            time.sleep(0.02)


def lines(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "acts.jsonl").read_text().splitlines()]


def newest_verdicts(run: Run) -> dict[int, str]:
    return {row["ordinal"]: row["reason"] for row in read_verdicts(run.folder / "acceptance.jsonl")}


def episodes(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "episodes.jsonl").read_text().splitlines()]


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_ten_acts_hold_however_often_gateway_trainer_console_and_policy_server_are_killed(
    tmp_path: Path, free_ports
) -> None:
    words = [f"schedule.stages={STAGES}", "trainer.keep_params=3", "exporter.video=false", "rollout.video_every=0"]
    with Run(tmp_path, free_ports, *words, stages_of_its_own=True) as run:
        run.wait_for(lambda s: s["counts"]["online"] >= 3 and s["trainer"]["version"] >= 5, 300)
        alice = Alice(run, free_ports, seed=1)
        with contextlib.closing(alice):
            steer(run, alice)
            pinned = hold_all_at_once(run, alice)
            go_on(run, alice, pinned)
        summary = run.end(400)
    rows = lines(run)
    assert [row["n"] for row in rows] == list(range(1, len(rows) + 1))
    assert Counter(row["id"] for row in rows).most_common(1)[0][1] == 1  # nothing is done twice
    kept = {row["id"]: {key: value for key, value in row.items() if key != "crc32"} for row in rows}
    assert all(kept[act_id] == act for act_id, act in alice.answered.items())  # what was answered is there
    assert len(alice.answered) == 10
    assert (alice.killed[GATEWAY] >= 3, alice.killed[TRAINER] >= 2, alice.killed[CONSOLE] >= 1) == (True,) * 3
    assert {act["by"] for act in alice.answered.values()} == {"alice", "alice (console)"}
    assert summary["operators"]["served"] == pinned
    assert summary["operators"]["ended_stages"] == ["online"]


def steer(run: Run, alice: Alice) -> None:
    """Seven acts, one on top of the other."""
    alice.say("pause", actor="actor-0")
    alice.say("training_pause")
    online = [row for row in episodes(run) if row["mode"] == "online"]
    alice.say("verdict", episode_id=online[0]["episode_id"], word="reject")
    alice.say("verdict", episode_id=episodes(run)[0]["episode_id"], word="failure")  # a demonstration
    alice.say("set", key="trainer.max_steps_per_tick", value=7.5)
    alice.say("publish")
    version = min(int(path.stem[1:]) for path in (run.folder / "params").glob("v*.json"))
    alice.say("serve", version=version)
    alice.refused("serve", version=10**6)
    alice.refused("set", key="trainer.batch_size", value=1)


def hold_all_at_once(run: Run, alice: Alice) -> int:
    """Everything that was answered holds, in every role; the pinned version."""
    pinned = lines_of(run, "serve")[-1]["version"]
    status = run.wait_for(
        lambda s: (
            s["serving"].get("version") == pinned
            and s["serving"]["alive"]
            and (s["trainer"]["waits"] or "").startswith("alice (console) paused the training")
            and not s["operator"]["publish_wanted"]
        ),
        240,
    )
    operator = status["operator"]
    assert operator["paused_actors"] == {"actor-0": "alice"}
    assert operator["settings"]["trainer.max_steps_per_tick"]["value"] == 7.5
    assert operator["words"] == 2
    assert lines_of(run, "published")
    time.sleep(3)  # what was under way has come to its end
    before = run.status()
    time.sleep(3)
    after = run.status()
    assert after["trainer"]["step"] == before["trainer"]["step"]
    assert after["counts"]["episodes"] == before["counts"]["episodes"]
    return pinned


def lines_of(run: Run, act: str) -> list[dict[str, Any]]:
    return [row for row in lines(run) if row["act"] == act]


def go_on(run: Run, alice: Alice, pinned: int) -> None:
    """Training goes on by the verdicts, then the stage ends and the pinned version is evaluated."""
    at = run.status()["trainer"]["step"]
    alice.say("training_resume")
    alice.say("resume", actor="actor-0")
    run.wait_for(lambda s: s["trainer"]["step"] > at and s["trainer"]["alive"], 240)
    rejected = next(row["ordinal"] for row in episodes(run) if row["mode"] == "online")
    run.wait_for(lambda s: newest_verdicts(run).get(rejected) == "reject_by_person", 60)
    run.wait_for(lambda s: newest_verdicts(run)[0] in ("return", "failed"), 60)
    alice.say("end_stage", stage="online")
    run.wait_for(lambda s: s["stage"]["name"] == "after", 240)
    run.wait_for(lambda s: (s["eval"].get("after") or {}).get("version") == pinned, 240)
