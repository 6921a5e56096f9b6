"""Half an hour of a whole run with a random fault of any kind every 20 s: nothing lost, the end by the schedule.

`SOAK_MINUTES` of faults, one every `SOAK_EVERY_S`, then the run is started again with the stage's goal met, and must
end by its schedule. `SOAK_ACTORS`: how many act; those beyond start.sh's own are run_actors.sh's, on the same learner.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import zmq
from chaos import SEED
from hostile import Hostile
from whole_run import ROOT, Run, check

MINUTES = float(os.environ.get("SOAK_MINUTES", "30"))
EVERY_S = float(os.environ.get("SOAK_EVERY_S", "20"))
ACTORS = int(os.environ.get("SOAK_ACTORS", "1"))
DISK_MB = 6000
MODULES = {
    "gateway": "serl_launcher.gateway",
    "policy": "serl_launcher.serving",
    "trainer": "serl_launcher.learner",
    "exporter": "serl_launcher.exporter",
    "actor": "actor=true",
}
ROLES = [*MODULES][:4]
STAGES = (
    "schedule.stages=[{name: demos, mode: demo, episodes: 4}, {name: sft, mode: train, steps: 40}, "
    "{name: online, mode: online, steps: STEPS}, {name: after, mode: eval, episodes: 4}]"
)


@pytest.fixture
def disk(tmp_path):
    """A file system of its own, to be filled; skipped where this user may not mount one."""
    image, folder = tmp_path / "image", tmp_path / "disk"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(DISK_MB << 20)
    for words in (["mkfs.ext4", "-q", "-F", str(image)], ["mount", "-o", "loop", str(image), str(folder)]):
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"cannot mount a file system here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


class Night:
    """The run, and what happens to it."""

    def __init__(self, disk: Path, ports: tuple[int, int]):
        self.disk, self.ports, self.rng = disk, ports, random.Random(SEED)
        self.memory: dict[str, list[tuple[float, int]]] = defaultdict(list)
        self.done: Counter[str] = Counter()
        self.deck: list[str] = []
        self.began = time.monotonic()
        self.others: subprocess.Popen | None = None
        self.start("1000000")

    def start(self, steps: str) -> None:
        words, log = STAGES.replace("STEPS", steps), self.disk / "start.log"
        if log.exists():
            log.rename(self.disk / f"start.{time.monotonic_ns()}.log")
        self.run = Run(self.disk, self.ports, words, "rollout.video_every=0", stages_of_its_own=True)
        if ACTORS > 1 and (self.others is None or self.others.poll() is not None):
            self.others = self._start_others()

    def _start_others(self) -> subprocess.Popen:
        """Actors beside start.sh's own; they outlive its learner and go on with the next."""
        words = ["ip=127.0.0.1", "run=small", f"runs_dir={self.disk}", "rollout.video_every=0"]
        words += [f"port={self.ports[0]}", f"broadcast_port={self.ports[1]}", "unique_identifier=more"]
        with (self.disk / "others.log").open("ab") as log:
            return subprocess.Popen(
                ["bash", "run_actors.sh", str(ACTORS - 1), *words], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def close(self) -> None:
        """End what is left."""
        self.run.__exit__()
        if self.others is not None and self.others.poll() is None:
            self.others.terminate()
            self.others.wait(120)

    def faults(self) -> dict[str, Callable[[], None]]:
        """Every kind of fault by name."""
        found: dict[str, Callable[[], None]] = {}
        for name in MODULES:
            found[f"kill -9 {name}"] = lambda name=name: self._signal(name, signal.SIGKILL)
            found[f"SIGSTOP {name}"] = lambda name=name: self._stop(name)
        for name in ("params/latest.json", "status.json", "episodes.jsonl", "dataset_status.json", "acceptance.jsonl"):
            found[f"empty {name}"] = lambda name=name: self._damage(name)
        return found | {
            "flip a bit of the newest parameters": self._flip,
            "kill -9 everything": self._kill_all,
            "full disk": self._fill,
            "e-stop": self._press,
            "hostile messages": self._attack,
            "idle connections": self._crowd,
        }

    def provoke(self) -> None:
        """One fault, drawn at random; none again before each came."""
        faults = self.faults()
        if not self.deck:
            self.deck = self.rng.sample([*faults], len(faults))
        name = self.deck.pop()
        print(f"{time.monotonic() - self.began:7.1f} s  {name}", flush=True)
        faults[name]()
        self.done[name] += 1

    def measure(self) -> None:
        """Resident memory of each process, MB."""
        for name in MODULES:
            pid = self._pid(name)
            if pid is not None:
                status = Path(f"/proc/{pid}/status")
                lines = status.read_text().splitlines() if status.exists() else []
                for line in lines:
                    if line.startswith("RssAnon"):
                        self.memory[name].append((time.monotonic() - self.began, int(line.split()[1]) >> 10))

    def growth(self) -> dict[str, float]:
        """Median memory of the last third against the first third after the warm-up, by process."""
        found = {}
        for name, samples in self.memory.items():
            values = [mb for at, mb in samples if at > 120]
            third = max(1, len(values) // 3)
            found[name] = round(statistics.median(values[-third:]) / statistics.median(values[:third]), 2)
        return found

    def _pid(self, name: str) -> int | None:
        """Of the actors any one; None while it is being started again."""
        found = self.run.pids(MODULES[name])
        return self.rng.choice(found) if found else None

    def _signal(self, name: str, number: signal.Signals) -> None:
        pid = self._pid(name)
        if pid is not None:
            os.kill(pid, number)

    def _stop(self, name: str) -> None:
        """For good: a role is noticed and started again. The actor is let go after a while: nobody stops a person's."""
        pid = self._pid(name)
        if pid is None:
            return
        os.kill(pid, signal.SIGSTOP)
        if name == "actor":
            time.sleep(6)
            os.kill(pid, signal.SIGCONT)

    def _kill_all(self) -> None:
        for process in [self.run.process, *([self.others] if self.others else [])]:
            process.send_signal(signal.SIGKILL)
            process.wait()
        deadline = time.monotonic() + 60
        while any(self._pid(name) for name in MODULES):
            assert time.monotonic() < deadline, "a process outlived start.sh"
            time.sleep(0.1)
        self.start("1000000")

    def _damage(self, name: str) -> None:
        path = self.run.folder / name
        if path.exists():
            path.write_bytes(b"")

    def _flip(self) -> None:
        files = sorted((self.run.folder / "params").glob("v*.safetensors"))
        if files:
            with files[-1].open("r+b") as file:
                file.seek(files[-1].stat().st_size // 2)
                byte = file.read(1)[0]
                file.seek(-1, 1)
                file.write(bytes([byte ^ 1]))

    def _fill(self) -> None:
        ballast = self.disk / "ballast"
        free = shutil.disk_usage(self.disk).free
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, free - (1 << 20)))
        time.sleep(8)
        ballast.unlink()

    def _press(self) -> None:
        latch = self.run.folder / "estop"
        latch.touch()
        time.sleep(5)
        latch.unlink(missing_ok=True)

    def _attack(self) -> None:
        context, hostile = zmq.Context(), Hostile(self.rng.randrange(1 << 30))
        dealer = context.socket(zmq.DEALER)
        dealer.connect(f"tcp://127.0.0.1:{self.ports[0]}")
        for _ in range(300):
            dealer.send_multipart(hostile.make()[1])
        time.sleep(2)
        context.destroy(linger=0)

    def _crowd(self) -> None:
        crowd = []
        for _ in range(200):
            end = socket.socket()
            end.connect_ex(("127.0.0.1", self.ports[0]))
            crowd.append(end)
        time.sleep(5)
        for end in crowd:
            end.close()


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_run_of_faults_loses_nothing_and_ends_by_its_schedule(disk, free_ports, figures):
    night = Night(disk, free_ports)
    try:
        night.run.wait_for(lambda status: status["stage"]["name"] == "online" and status["counts"]["online"] >= 2, 300)
        night.began = time.monotonic()
        while time.monotonic() - night.began < MINUTES * 60:
            turn = time.monotonic()
            night.provoke()
            assert night.run.process.poll() is None, night.run.text()[-4000:]
            time.sleep(max(0.0, turn + EVERY_S - time.monotonic()))
            night.measure()
        online = night.run.status()["counts"]["online"]
        night.run.wait_for(lambda status: status["counts"]["online"] > online, 120)
        night.run.process.send_signal(signal.SIGTERM)
        night.run.process.wait(120)
        night.start("1")
        summary = night.run.end(300)
        assert night.others is None or night.others.wait(120) == 0, (disk / "others.log").read_text()[-4000:]
    finally:
        night.close()
    report = check(night.run.folder)
    growth = night.growth()
    figures.row(
        "soak", "0 acknowledged lost, 0 doubled, end by the schedule, memory flat (≤ 1.2)", max(growth.values()) <= 1.2,
        minutes=MINUTES, actors=ACTORS, faults=sum(night.done.values()), kinds=len(night.done),
        episodes=summary["episodes"], transitions=summary["transitions"], policy_versions=summary["policy_versions"],
        memory_growth=growth,
        memory_mb={name: samples[-1][1] for name, samples in night.memory.items()},
    )  # fmt: skip
    assert "nothing lost" in report
    assert max(growth.values()) <= 1.2, growth
