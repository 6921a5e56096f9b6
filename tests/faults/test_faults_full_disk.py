"""A real learner and a real actor while the learner's disk is full: nothing ends, actions are answered, all goes on."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import check_run
import pytest

from serl_launcher.learner import checkpoint
from serl_launcher.run.internal import InternalClient
from serl_launcher.run.parameters import PublishedVersion, read_tensors
from serl_transport.contract.errors import ServerSilent

ROOT = Path(__file__).parents[2]
WORDS = (
    "run=full", "schedule.stages.0.episodes=2", "schedule.stages.1.steps=20", "schedule.stages.2.episodes=1",
    "schedule.stages.3.steps=100000", "replay.capacity_frames=4000", "trainer.checkpoint_period=10",
    "trainer.publish_period=10", "trainer.log_period=5", "exporter.period_s=2", "gateway.dead_actor_s=120",
)  # fmt: skip


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 of 700 MB on a loop device over a sparse file; skipped where this user may not mount one."""
    image, folder = tmp_path / "image", tmp_path / "disk"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(700 << 20)
    for words in (["mkfs.ext4", "-q", "-m", "0", "-F", str(image)], ["mount", "-o", "loop", str(image), str(folder)]):
        made = subprocess.run(words, capture_output=True, text=True, check=False)
        if made.returncode:
            pytest.skip(f"cannot make a file system here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> None:
    """Give every block of it to one file; what the roles free meanwhile, too."""
    with (disk / "ballast").open("ab") as file:
        size = 512 << 20
        while size >= 4096:
            try:
                os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, size)
            except OSError:
                size //= 2


class Sides:
    """`run_learner.sh` with its run folder on the small disk, `run_actor.sh` with its spool elsewhere."""

    def __init__(self, disk: Path, elsewhere: Path, ports: tuple[int, int]) -> None:
        self.disk, self.run = disk, disk / "runs" / "full"
        self.logs = {side: elsewhere / f"{side}.log" for side in ("learner", "actor")}
        words = [*WORDS, f"port={ports[0]}", f"broadcast_port={ports[1]}"]
        self.learner = self._start("learner", [*words, f"runs_dir={disk / 'runs'}"])
        self.actor = self._start("actor", [*words, f"runs_dir={elsewhere}"])
        self.ledger = elsewhere / "full" / "spool" / "actor-0.acknowledged.jsonl"

    def _start(self, side: str, words: list[str]) -> subprocess.Popen:
        with self.logs[side].open("wb") as out:
            return subprocess.Popen(
                ["bash", f"run_{side}.sh", *words], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def status(self) -> dict[str, Any]:
        """From the gateway itself: status.json is old while the disk is full."""
        client = InternalClient(self.run, "test", patience_s=1.0)
        try:
            return client.status()
        except ServerSilent:
            return {}
        finally:
            client.close()

    def wait_for(self, what: Callable[[dict[str, Any]], Any], seconds: float, why: str) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while not ((status := self.status()) and what(status)):
            assert self.learner.poll() is None, self.text()
            assert self.actor.poll() is None, self.text()
            assert time.monotonic() < deadline, f"never within {seconds} s: {why}\n{status}\n{self.text()}"
            time.sleep(0.2)
        return status

    def pids(self) -> dict[str, int]:
        """Of the roles as they were started first, by name."""
        (line,) = re.findall(r"learner of run full: (.*); logs in", self.logs["learner"].read_text())
        return {name: int(pid) for name, pid in (part.split() for part in line.split(", "))}

    def text(self) -> str:
        files = [*self.logs.values(), *sorted((self.run / "logs").glob("*.log"))]
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in files)

    def close(self) -> None:
        for process in (self.actor, self.learner):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(60)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def answered(status: dict[str, Any]) -> int:
    return (status.get("serving") or {}).get("requests") or 0


@pytest.mark.timeout(400)
def test_recording_and_training_wait_for_room_and_everything_else_goes_on(small_disk, tmp_path, free_ports, figures):
    elsewhere = tmp_path / "robot-host"
    elsewhere.mkdir()
    sides = Sides(small_disk, elsewhere, free_ports)
    try:
        sides.wait_for(lambda s: s["stage"]["name"] == "online" and s["trainer"]["step"] >= 40, 200, "it trains online")
        pids = sides.pids()
        fill(small_disk)
        full = sides.wait_for(lambda s: s["trainer"]["waits"] and s["storage"], 60, "both wait")
        fill(small_disk)
        assert full["trainer"]["waits"].startswith("the disk is full: training waits, policy version ")
        assert "disk is full" in full["storage"]
        before = time.monotonic()
        later = sides.wait_for(lambda s: answered(s) >= answered(full) + 20, 60, "actions are answered on a full disk")
        answers_per_s = 20 / (time.monotonic() - before)
        assert later["trainer"]["step"] == full["trainer"]["step"]
        os.kill(pids["gateway"], signal.SIGKILL)  # the worst moment to start one
        sides.wait_for(lambda s: s["time"] > time.time() - 2, 60, "the gateway is back")
        back = sides.wait_for(lambda s: s["trainer"]["waits"] and s["storage"], 60, "a restarted gateway waits, too")
        sides.wait_for(lambda s: answered(s) >= answered(back) + 5, 60, "actions are answered by it")
        assert "recording and training wait" in sides.logs["learner"].read_text()
        (small_disk / "ballast").unlink()
        freed = time.monotonic()
        ticks, step = back["counts"]["transitions"], back["trainer"]["step"]
        sides.wait_for(
            lambda s: s["counts"]["transitions"] > ticks and s["trainer"]["step"] > step + 10
            and not s["trainer"]["waits"] and not s["storage"], 60, "recording and training go on",
        )  # fmt: skip
        back_s = time.monotonic() - freed
        alive = {name: Path(f"/proc/{pid}").exists() for name, pid in pids.items()}
        assert alive == {name: name != "gateway" for name in pids}, sides.text()
        sides.actor.send_signal(signal.SIGTERM)
        assert sides.actor.wait(60) == 0, sides.text()
    finally:
        sides.close()
    said = sides.logs["learner"].read_text()
    assert re.findall(r"(\w+) started again", said) == ["gateway"], said[-4000:]
    assert "takes writes again" in said
    report = check_run.check(sides.run, [sides.ledger])
    assert not report.problems, report.text()
    assert whole_files(sides.run)
    figures.row(
        "full learner disk", "no role ends, actions are answered, all goes on", True, back_s=round(back_s, 1),
        answers_per_s_while_full=round(answers_per_s, 1), acknowledged=report.counts["acknowledged items"], lost=0,
    )  # fmt: skip


def whole_files(run: Path) -> bool:
    """The newest version and every checkpoint can be read, no half file lies about, no metrics row is torn."""
    newest = PublishedVersion.read(run / "params")
    assert newest is not None
    read_tensors(run / "params" / newest.file)
    folders = sorted((run / "checkpoints").iterdir())
    assert folders == checkpoint.complete(run / "checkpoints")
    for folder in folders:
        checkpoint.load(folder)
    for name in ("metrics/trainer.jsonl", "acceptance.jsonl", "episodes.jsonl"):
        assert [json.loads(line) for line in (run / name).read_text().splitlines()]
    return not [path for path in run.rglob("*") if path.name.endswith(".part")]
