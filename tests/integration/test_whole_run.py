"""The quick start in small, as a user starts it: real actor, gateway, policy server, trainer and exporter.

One run ends by itself; in the other (marker `faults`) trainer, gateway and actor are killed in mid-run, and what was
acknowledged is compared with the journal and the dataset.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEPS = {"sft": 40, "online": 60}


class Run:
    """`bash start.sh --no-tmux` in a folder of its own; killed with its children when the test ends."""

    def __init__(self, folder: Path, ports: tuple[int, int], *overrides: str) -> None:
        self.folder = folder / "small"
        self.log = folder / "start.log"
        words = [
            "run=small",
            f"runs_dir={folder}",
            f"port={ports[0]}",
            f"broadcast_port={ports[1]}",
            "schedule.stages.0.episodes=4",
            f"schedule.stages.1.steps={STEPS['sft']}",
            "schedule.stages.2.episodes=4",
            f"schedule.stages.3.steps={STEPS['online']}",
            "schedule.stages.4.episodes=4",
            "replay.capacity_frames=4000",
            "trainer.checkpoint_period=10",
            "trainer.publish_period=10",
            "exporter.period_s=5",
            *overrides,
        ]
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                ["bash", "start.sh", "--no-tmux", *words], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(60)

    def status(self) -> dict:
        try:
            return json.loads((self.folder / "status.json").read_text())
        except FileNotFoundError:
            return {}

    def wait_for(self, what, timeout_s: float = 120) -> dict:
        """The status once `what(status)` holds."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            status = self.status()
            if status and what(status):
                return status
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            time.sleep(0.1)
        raise AssertionError(f"no such status within {timeout_s} s: {self.status()}\n{self.log.read_text()[-4000:]}")

    def kill(self, module: str) -> int:
        """kill -9 the process of this run whose command line holds `module`; its pid."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "cmdline").read_bytes().decode().split("\0")
                except OSError:
                    continue
                mine = str(self.folder) in words or f"runs_dir={self.folder.parent}" in words
                if mine and module in words and "accelerate.commands.launch" not in words:
                    os.kill(int(entry.name), signal.SIGKILL)
                    return int(entry.name)
        raise AssertionError(f"no process of this run holds {module}")

    def end(self, timeout_s: float = 240) -> dict:
        """Wait for the end; the summary."""
        code = self.process.wait(timeout_s)
        assert code == 0, self.log.read_text()[-4000:]
        return json.loads((self.folder / "summary.json").read_text())


def check(folder: Path) -> str:
    """tools/check_run.py: acknowledged ⊆ journal = dataset, nothing twice."""
    words = [sys.executable, "tools/check_run.py", str(folder)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(400)
def test_a_small_run_goes_through_every_stage_and_ends_by_itself(tmp_path, free_ports):
    with Run(tmp_path, free_ports) as run:
        summary = run.end()
    assert summary["transitions"] > 0
    assert summary["episodes"] >= 4 + 4 + 3 + 4
    assert 0 <= summary["success_rate_before_online"] <= 1
    assert {stage["name"]: stage["steps"] for stage in summary["stages"]}["online"] >= STEPS["online"] - 20
    assert summary["policy_versions"] >= (STEPS["sft"] + STEPS["online"]) // 10
    assert (run.folder / "learning_curve.png").stat().st_size > 10_000
    assert "nothing lost" in check(run.folder)


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_killing_trainer_gateway_and_actor_in_mid_run_loses_nothing(tmp_path, free_ports):
    def step_reached(step):
        return lambda status: status["trainer"]["step"] >= step

    def online_episodes(n):
        return lambda status: status["counts"]["online"] >= n

    with Run(tmp_path, free_ports, "+schedule.stages.3.episodes=40") as run:
        run.wait_for(step_reached(15))
        run.kill("serl_launcher.learner")
        run.wait_for(online_episodes(3), 180)
        run.kill("serl_launcher.gateway")
        run.wait_for(online_episodes(15), 180)
        run.kill("actor=true")
        run.wait_for(online_episodes(25), 180)
        run.kill("serl_launcher.learner")
        run.kill("serl_launcher.exporter")
        run.kill("serl_launcher.serving")
        summary = run.end(300)
    assert summary["success_rate_episodes"] == 4
    report = check(run.folder)
    assert "nothing lost" in report
    text = run.log.read_text()
    for role in ("trainer", "gateway", "exporter", "policy"):
        assert f"{role} started again" in text, text[-4000:]
