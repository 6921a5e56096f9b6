"""SO-101 by its documented commands and a lab's folder, every process a real one, on LeRobot's driver and fake servos.

Ten demonstrations at the leader arm, cloning, evaluation, online rejection sampling with help, evaluation. The arms and
the person are in so101_hand.py; the run and its figures are those of any other.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from whole_run import ROOT, check

pytest.importorskip("lerobot", reason="a robot host without LeRobot's drivers")
pytest.importorskip("scservo_sdk", reason="the lerobot extra is not installed")

LAB = Path(__file__).parent / "so101_lab" / "config"
TASK = ["--config-dir", str(LAB), "task=so101_fake", "run=so101"]
LEARNER = [
    "schedule.stages.0.episodes=10", "schedule.stages.1.steps=150", "schedule.stages.2.episodes=10",
    "schedule.stages.3.steps=300", "+schedule.stages.3.episodes=20", "schedule.stages.4.episodes=10",
    "replay.capacity_frames=8000", "trainer.publish_period=25", "trainer.batch_size=16", "exporter.period_s=10",
]  # fmt: skip
ACTOR = ["rollout.watchdog.stop_ms=3000"]  # a loaded machine answers late, and that is not what is tried here


def start(command, log: Path, lab: Path, **popen) -> subprocess.Popen:
    with log.open("w") as out:
        return subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "SO101_LAB": str(lab)}, stdout=out, stderr=subprocess.STDOUT,
            **({"stdin": subprocess.DEVNULL} | popen),
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_demonstrations_cloning_help_and_evaluation_on_an_so101(tmp_path, free_ports):
    from so101_hand import Arms, Person

    words = [*TASK, f"runs_dir={tmp_path}", f"port={free_ports[0]}", f"broadcast_port={free_ports[1]}"]
    master, slave = os.openpty()
    begun = time.monotonic()
    with Arms(tmp_path / "lab") as arms:
        learner = start(["bash", "run_learner.sh", *words, *LEARNER], tmp_path / "learner.log", tmp_path / "lab")
        actor = start(["bash", "run_actor.sh", *words, *ACTOR], tmp_path / "actor.log", tmp_path / "lab", stdin=slave)
        person = Person(arms, lambda: os.write(master, b"\r"))
        person.start()
        try:
            assert learner.wait(2500) == 0, (tmp_path / "learner.log").read_text()[-3000:]
        finally:
            for process in (actor, learner):
                process.terminate()
                process.wait(60)
    summary = json.loads((tmp_path / "so101" / "summary.json").read_text())
    figures = {key: value for key, value in summary.items() if "success" in key or "operator" in key}
    print(json.dumps(figures), f"{(time.monotonic() - begun) / 60:.1f} minutes", file=sys.stderr)
    assert summary["episodes"] >= 10 + 10 + 20 + 10
    assert "nothing lost" in check(tmp_path / "so101")
    assert summary["success_rate"] > summary["success_rate_before_online"]
    assert person.helped
    os.close(slave)
    os.close(master)
