"""The end of a run with a slow robot: its last episode is served to its end, its data is kept, then it is told to stop.

Real learner (gateway, policy server, trainer, exporter) and two real actors: `fast` brings the stage to its end while
`slow`, at 2 Hz, is in the middle of an episode of 30 s.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rig import environment, until
from whole_run import check

ROOT = Path(__file__).parents[2]
STAGES = "schedule.stages=[{name: online, mode: online, episodes: 3, steps: 10}]"


class Machines:
    """A learner and actors as two machines have them: nobody starts or stops one for the other."""

    def __init__(self, folder: Path, ports: tuple[int, int]) -> None:
        self.run, self._folder = folder / "end", folder
        self._words = ["run=end", f"runs_dir={folder}", f"port={ports[0]}", f"broadcast_port={ports[1]}"]
        self.processes: dict[str, subprocess.Popen] = {}

    def start(self, name: str, *words: str) -> subprocess.Popen:
        argv = [sys.executable, str(ROOT / "examples" / "train_rlpd.py"), *words, *self._words]
        with (self._folder / f"{name}.screen").open("w") as out:
            self.processes[name] = subprocess.Popen(
                argv, cwd=ROOT, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=environment()
            )  # fmt: skip
        return self.processes[name]

    def learn(self) -> None:
        self.start("learner", "learner=true", STAGES, "gateway.dead_actor_s=6", "trainer.publish_period=10",
                   "replay.capacity_frames=4000", "telemetry.dashboard_period_s=1")  # fmt: skip

    def act(self, name: str, hz: float, *words: str) -> None:
        self.start(name, "actor=true", f"unique_identifier={name}", f"rollout.rate_hz={hz}", "rollout.video_every=0",
                   *words)  # fmt: skip

    def screen(self, name: str) -> str:
        return (self._folder / f"{name}.screen").read_text()

    def status(self) -> dict:
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            return json.loads((self.run / "status.json").read_text())
        return {}

    def wait(self, condition, what: str, seconds: float = 120) -> None:
        try:
            until(condition, seconds, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.screens()}") from None

    def exit_code(self, name: str, seconds: float) -> int:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.processes[name].wait(seconds)
        raise AssertionError(f"{name} did not end within {seconds} s\n{self.screens()}")

    def rows(self, actor: str) -> list[dict]:
        rows = [json.loads(line) for line in (self.run / "episodes.jsonl").read_text().splitlines()]
        return [row for row in rows if row["actor"] == actor]

    def screens(self) -> str:
        return "\n".join(f"--- {name}\n{self.screen(name)[-2500:]}" for name in self.processes)

    def driven(self) -> set[str]:
        """Actors that the policy has driven for a tick."""
        actors = self.status().get("actors") or {}
        return {name for name, actor in actors.items() if actor["policy_version"] >= 0}

    def to_the_end_of_the_stage(self, hz: float = 2) -> None:
        """Until nothing is left to do but the slow robot's episode."""
        self.learn()
        self.act("slow", hz, "rollout.operator=false", "rollout.batch_ticks=5")
        self.wait(lambda: self.driven() == {"slow"}, "slow begins")
        self.act("fast", 20)
        self.wait(lambda: self.status().get("done"), "the schedule is done")


@pytest.fixture
def machines(tmp_path, free_ports):
    made = Machines(tmp_path, free_ports)
    yield made
    for process in made.processes.values():
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.mark.timeout(400)
def test_the_last_episode_is_served_to_its_end_and_everybody_leaves(machines, figures):
    machines.to_the_end_of_the_stage()
    done = time.monotonic()
    assert machines.exit_code("fast", 20) == 0
    assert machines.exit_code("slow", 60) == 0
    left = time.monotonic()
    assert machines.exit_code("learner", 60) == 0
    last = machines.rows("slow")[-1]
    figures.row("end of a run: slow robot", "its last episode is whole, both leave", True,
                open_for_s=round(left - done, 1), ticks=last["n_ticks"])  # fmt: skip
    assert (last["n_ticks"], last["truncated_by"]) in ((60, "time_limit"), (60, None)) or last["success"]
    for name in ("fast", "slow"):
        assert "the learner says stop: every stage of the schedule is done" in machines.screen(name)
        assert "stay in the spool" not in machines.screen(name)
    assert "waiting for actor slow: it makes its last episode" in machines.screen("learner")
    assert "is complete" in machines.screen("learner")
    assert "nothing lost" in check(machines.run)


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_an_operators_stop_waits_for_open_episodes_but_not_for_ever_for_who_vanished(machines):
    machines.learn()
    machines.act("slow", 2, "rollout.operator=false")
    machines.act("gone", 2, "rollout.operator=false")
    machines.wait(lambda: machines.driven() == {"slow", "gone"}, "both begin")
    time.sleep(8)  # the first batches of ten ticks are there
    port = machines._words[2].removeprefix("port=")
    words = [sys.executable, "tools/operate.py", "stop", "--port", port]
    stop = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert stop.returncode == 0, stop.stderr
    machines.processes["gone"].kill()
    assert machines.exit_code("slow", 60) == 0
    assert machines.exit_code("learner", 60) == 0
    assert "the learner says stop: an operator stopped the run" in machines.screen("slow")
    assert "actor gone is not waited for any longer: silent for" in machines.screen("learner")
    assert machines.rows("slow")[-1]["n_ticks"] == 60
    assert machines.rows("gone")[-1]["truncated_by"] == "dead_actor"
    assert "nothing lost" in check(machines.run)


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_ctrl_c_twice_does_not_wait_and_the_robot_is_not_left_waiting(machines):
    machines.to_the_end_of_the_stage(hz=1)  # an episode of a minute
    machines.wait(lambda: "waiting for actor slow" in machines.screen("learner"), "the learner waits", 20)
    machines.wait(lambda: machines.processes["fast"].poll() is not None, "fast has left", 20)
    learner = machines.processes["learner"]
    learner.send_signal(signal.SIGINT)
    machines.wait(lambda: "not waiting for slow" in machines.screen("learner"), "it says so", 20)
    learner.send_signal(signal.SIGINT)
    assert machines.exit_code("learner", 15) == 130
    assert machines.exit_code("slow", 60) == 0  # hold_limit_s, then the flush
    screen = machines.screen("slow")
    assert "cut at tick" in screen
    assert "the learner says stop: every stage of the schedule is done, and it has left" in screen
    assert "step batches stay in the spool; the next start of this actor delivers them" in screen
    assert os.listdir(machines.run / "spool" / "slow")
