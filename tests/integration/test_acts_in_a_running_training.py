"""What an operator does to a running training: real gateway, trainer and policy server, and it holds in seconds."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import operate
import pytest
from damage_rig import actor, episode, run_config, serving

from serl_launcher.learner.trainer import Trainer
from serl_launcher.learner.wiring import build_trainer
from serl_launcher.replay.verdicts import read as read_verdicts
from serl_launcher.run.acts import ActsLedger
from serl_launcher.run.internal import InternalClient
from serl_launcher.run.paths import RunPaths
from serl_launcher.serving.server import PolicyServer
from serl_transport.client import TrainerClient
from serl_transport.config import TrainerConfig
from serl_transport.contract.errors import Refused

STAGES = [
    {"name": "demos", "mode": "demo", "episodes": 2},
    {"name": "online", "mode": "online", "steps": 100_000},
    {"name": "after", "mode": "eval", "episodes": 1},
]


def wait_for(question: Callable[[], Any], what: str, seconds: float = 30.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (answer := question()):
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
    return answer


@contextmanager
def thread(target: Callable[[], None], stop: Callable[[], None]) -> Iterator[None]:
    one = threading.Thread(target=target)
    one.start()
    try:
        yield
    finally:
        stop()
        one.join(30)
        assert not one.is_alive()


class Run:
    """One running training, five episodes in, and alice, who operates it."""

    def __init__(self, root: Path, gateway: Any, trainer: Trainer, alice: TrainerClient) -> None:
        self.root, self.gateway, self.trainer, self.alice = root, gateway, trainer, alice

    def ask(self, request: str, **body: Any) -> dict[str, Any]:
        reply = self.alice.request(request, body, timeout_ms=20_000)
        assert ActsLedger(self.root).rows[-1]["act"] in (request, "published")  # on disk when it is answered
        return reply["operator"]

    def refused(self, request: str, match: str, **body: Any) -> None:
        with pytest.raises(Refused, match=match):
            self.alice.request(request, body, timeout_ms=20_000)

    def status(self) -> dict[str, Any]:
        return self.gateway.status()

    @property
    def step(self) -> int:
        return self.trainer.learner.step_count

    def trains(self) -> bool:
        """Are steps taken?"""
        before = self.step
        return bool(wait_for(lambda: self.step > before, "no step is taken", 10.0))

    def verdict(self, ordinal: int) -> tuple[bool, str]:
        """The newest one on an episode, as the trainer wrote it."""
        rows = [row for row in read_verdicts(self.root / "acceptance.jsonl") if row["ordinal"] == ordinal]
        return (rows[-1]["accepted"], rows[-1]["reason"]) if rows else (False, "")

    def sampled(self) -> set[int]:
        """Ordinals of the episodes whose chunks are drawn."""
        return set(self.trainer.data._view._chunks["ordinal"].tolist())


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    cfg = run_config(tmp_path, trainer__max_steps_per_tick=1e5, trainer__keep_params=2, algo__min_accepted=0)
    cfg.schedule, paths = {"stages": STAGES}, RunPaths(tmp_path / "t")
    cfg.trainer.publish_period, cfg.trainer.checkpoint_period, cfg.gateway.dead_actor_s = 10, 100_000, 30.0
    paths.root.mkdir()
    with (
        serving(cfg, paths.root) as gateway,
        actor(gateway, paths.root) as robot,
        closing(InternalClient(paths.root, "trainer")) as link,
    ):
        deliver(robot, [("demo", "demos")] * 2 + [("online", "online")] * 2)
        trainer = build_trainer(cfg, paths, link)
        with thread(trainer.run, trainer.stop):
            wait_for(lambda: paths.latest_params.exists(), "no version")
            server = PolicyServer(cfg, paths)
            ports = TrainerConfig(gateway.port, gateway.broadcast_port)
            alice = TrainerClient("alice", "127.0.0.1", ports, role="operator", wait_for_server=False)
            with thread(server.run, server.stop), closing_client(alice):
                wait_for(lambda: trainer.stages.began, "the stage did not begin")
                deliver(robot, [("online", "online")], first=4)  # the limiter counts from there
                wait_for(lambda: trainer.learner.step_count > 2, "no step")
                yield Run(paths.root, gateway, trainer, alice)


def deliver(robot: TrainerClient, episodes: list[tuple[str, str]], first: int = 0) -> None:
    for k, (mode, stage) in enumerate(episodes, start=first):
        robot.send_item(episode(f"{stage}-{k}", mode, stage, robot.boot_id, k).to_body())
    assert robot.flush(20)


@contextmanager
def closing_client(client: TrainerClient) -> Iterator[None]:
    try:
        yield
    finally:
        client.stop()


def test_each_act_holds_in_the_running_training_and_is_in_the_ledger(run: Run, capsys) -> None:
    judge_episodes(run)
    hold_and_change_the_training(run)
    pin_a_version(run)
    # An actor, then the whole run.
    run.refused("pause", "did you mean 'robot'", actor="robt")
    assert run.ask("pause", actor="robot")["paused_actors"] == {"robot": "alice"}
    assert run.gateway.next_episode("robot", "b", {})["reason"] == "an operator paused robot (alice)"
    assert run.ask("resume", actor="robot")["paused_actors"] == {}
    # The stage ends with what was learned published, and its evaluation asks for that.
    run.refused("end_stage", "'demos' does not go on now, online does", stage="demos")
    run.ask("end_stage", stage="online")
    stage = wait_for(lambda: (s := run.status()["stage"])["name"] == "after" and s, "the stage did not end")
    assert stage["min_version"] == ActsLedger(run.root).rows[-1]["version"] <= run.trainer.publisher.version
    run.refused("set", "stage online is over", key="schedule.stages.online.steps", value=200_000)
    assert (
        operate.main(["log", "--port", str(run.gateway.port), "--broadcast-port", str(run.gateway.broadcast_port)]) == 0
    )
    listed = capsys.readouterr().out.splitlines()
    rows = ActsLedger(run.root).rows
    assert [line.split()[0] for line in listed] == [str(row["n"]) for row in rows]
    assert 'alice         verdict episode_id="online-2" word="reject"' in listed[0]
    assert json.loads((run.root / "status.json").read_text())["operator"]["acts"] >= len(rows) - 1


def judge_episodes(run: Run) -> None:
    """Words on episodes change what the next batches are made of, and taken back they do not."""
    assert run.sampled() == {0, 1, 2, 3, 4}
    run.ask("verdict", episode_id="online-2", word="reject")
    wait_for(lambda: run.verdict(2) == (False, "reject_by_person") and 2 not in run.sampled(), "reject")
    run.ask("verdict", episode_id=3, word="failure")  # by its ordinal
    wait_for(lambda: run.verdict(3) == (False, "return") and 3 not in run.sampled(), "failure")
    run.ask("verdict", episode_id="online-3", word="accept")
    wait_for(lambda: run.verdict(3) == (True, "accept_by_person") and 3 in run.sampled(), "accept")
    run.ask("verdict", episode_id="demos-0", word="discard")
    wait_for(lambda: run.sampled() == {1, 3, 4}, "discard")
    for name in ("online-2", "online-3", "demos-0"):
        run.ask("verdict", episode_id=name, word="clear")
    wait_for(lambda: run.sampled() == {0, 1, 2, 3, 4} and run.verdict(2) == (True, "accepted"), "clear")
    run.refused("verdict", "no finished episode 'online-9' in this run", episode_id="online-9", word="reject")
    run.refused("verdict", "word: expected one of accept, reject", episode_id="online-2", word="rejct")


def hold_and_change_the_training(run: Run) -> None:
    run.ask("training_pause")
    wait_for(lambda: (run.status()["trainer"]["waits"] or "").startswith("alice paused the training"), "no pause")
    at = run.step
    time.sleep(0.5)
    assert run.step == at
    version = run.status()["trainer"]["version"]
    first, again = (run.ask("publish", id="once") for _ in range(2))  # sent again after a cut link
    assert (first["publish_requests"], again["publish_requests"]) == (1, 1)
    wait_for(lambda: not run.status()["operator"]["publish_wanted"], "not published")
    assert run.status()["trainer"]["version"] == version + 1
    run.ask("training_resume")
    assert run.trains()
    run.refused("set", "did you mean 'algo.rule.min_return'", key="algo.rule.min_retrun", value=2.0)
    run.refused("set", "expected a number, got 'two'", key="algo.rule.min_return", value="two")
    run.ask("set", key="algo.rule.min_return", value=2.0)
    wait_for(lambda: run.sampled() == set(), "the rule did not change")
    run.ask("set", key="algo.rule.min_return", value=0.5)
    run.ask("set", key="trainer.publish_period", value=1)
    wait_for(lambda: run.trainer.operated.settings.publish_period == 1, "no period")
    assert run.trains()


def pin_a_version(run: Run) -> None:
    told = wait_for(lambda: run.status()["serving"].get("version"), "nothing is served")
    run.refused("serve", "version 10000 is not on disk: there are ", version=10_000)
    pinned = run.trainer.publisher.version
    assert run.ask("serve", version=pinned)["served"] == pinned >= told
    wait_for(lambda: run.status()["serving"]["version"] == pinned, "not served")
    wait_for(lambda: run.trainer.publisher.version > pinned + 3, "no newer version")  # keep_params is 2
    assert (run.root / f"params/v{pinned:06d}.safetensors").exists()
    assert run.status()["serving"]["version"] == pinned
    assert run.alice.fetch_params().version == pinned  # what an actor with a policy of its own pulls
    assert run.ask("serve", version=None)["served"] is None
    wait_for(lambda: run.status()["serving"]["version"] > pinned + 3, "not the newest")
    run.ask("set", key="trainer.publish_period", value=1000)
