"""Real gateway and actor processes for the fault tests, and the oracle over what they leave behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import check_run
import numpy as np
import yaml
from fault_actor import make_spec

HERE = Path(__file__).parent
STAGES = [{"name": "online", "mode": "online", "steps": 10**9}]


def free_ports() -> tuple[int, int]:
    """Two ports that were free a moment ago."""
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]


def until(condition: Callable[[], Any], seconds: float, what: str) -> float:
    """Poll until the condition holds; how long that took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"never happened in {seconds} s: {what}"
        time.sleep(0.01)
    return time.monotonic() - start


class Rig:
    """One run folder, its gateway, its actors. `close` kills whatever is left."""

    def __init__(self, run: Path, *, pixels: int = 24, hz: float = 20.0, journal: Path | None = None,
                 segment_mb: int = 16, **changes: Any):  # fmt: skip
        self.run, self.pixels, self.hz = run, pixels, hz
        self.ports = free_ports()
        self.gateway: subprocess.Popen | None = None
        self.actors: list[subprocess.Popen] = []
        run.mkdir(exist_ok=True)
        if journal is not None:
            (run / "journal").symlink_to(journal)
        config = {
            "run": "faults", "seed": 0, "port": self.ports[0], "broadcast_port": self.ports[1],
            "bind_host": "127.0.0.1", "insecure": False,
            "task": {"spec": make_spec(pixels, hz).to_dict()}, "schedule": {"stages": STAGES},
            "replay": {"capacity_frames": 2000}, "journal": {"segment_mb": segment_mb},
            "gateway": {"dead_actor_s": 5.0, "unticketed": True},
            "exporter": {"batch_episodes": 100, "video": False}, **changes,
        }  # fmt: skip
        (run / "config.yaml").write_text(yaml.safe_dump(config))

    def start_gateway(self) -> subprocess.Popen:
        """Start it; it is ready when its status is younger than this call."""
        log = (self.run / "gateway.log").open("a")
        self.gateway = subprocess.Popen(
            [sys.executable, "-m", "serl_launcher.gateway", str(self.run)], env=environment(), stderr=log, stdout=log
        )
        log.close()
        return self.gateway

    def start_actor(self, name: str = "robot-1", ports: tuple[int, int] | None = None, **options: Any):
        """Start a scripted actor through `ports` (a proxy's), or straight to the gateway."""
        port, broadcast_port = ports or self.ports
        options |= {"run": str(self.run), "name": name, "port": port, "broadcast_port": broadcast_port,
                    "pixels": self.pixels, "hz": self.hz}  # fmt: skip
        log = (self.run / f"{options.get('tag', name)}.log").open("a")
        process = subprocess.Popen(
            [sys.executable, str(HERE / "fault_actor.py"), json.dumps(options)], env=environment(), stderr=log
        )
        log.close()
        self.actors.append(process)
        return process

    def acknowledged(self, name: str = "robot-1") -> int:
        """Lines in the actor's ledger."""
        path = self.run / "spool" / f"{name}.acknowledged.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def await_acknowledged(self, more: int = 1, seconds: float = 30.0, name: str = "robot-1") -> float:
        """Wait for so many further acknowledgements; the seconds it took."""
        before = self.acknowledged(name)
        start = time.monotonic()
        while self.acknowledged(name) < before + more:
            assert time.monotonic() - start < seconds, f"not {more} acknowledgements in {seconds} s; {self.logs()}"
            time.sleep(0.01)
        return time.monotonic() - start

    def report(self, name: str = "robot-1") -> dict[str, Any]:
        """What the actor measured so far."""
        return json.loads((self.run / f"{name}.report.json").read_text())

    def finish(self, process: subprocess.Popen, name: str = "robot-1") -> dict[str, Any]:
        """SIGTERM an actor and wait until it has delivered everything; its report."""
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, self.logs()
        report = self.report(name)
        assert report["flushed"], f"{name} could not deliver everything; {self.logs()}"
        assert report["refused"] == 0, self.logs()
        return report

    def stop_gateway(self) -> None:
        """SIGTERM; exit code 0."""
        assert self.gateway is not None
        self.gateway.terminate()
        assert self.gateway.wait(30) == 0, self.logs()

    def judge(self, dataset: bool = False) -> dict[str, int]:
        """The oracle: ledger ⊆ journal (⊆ dataset), nothing twice, checksums equal, versions monotonic."""
        if dataset:
            done = subprocess.run(
                [sys.executable, "-m", "serl_launcher.exporter", str(self.run), "--once"],
                env=environment(), capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
        report = check_run.check(self.run, live=not dataset)
        assert not report.problems, report.text()
        assert report.counts["acknowledged items"] > 0
        return report.counts

    def logs(self) -> str:
        """Ends of all logs, for a failing assertion."""
        return "\n".join(f"--- {path.name}\n{path.read_text()[-1500:]}" for path in sorted(self.run.glob("*.log")))

    def close(self) -> None:
        """Kill what is left."""
        for process in [*self.actors, self.gateway]:
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
                process.wait()


def environment() -> dict[str, str]:
    """Of a child: finds the packages as this process does."""
    return dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")


def p99_ms(report: dict[str, Any], since: float = 0.0, until_: float = float("inf")) -> float:
    """p99 of the control period in a span of time.monotonic(); the first ticks (start-up) are left out."""
    return p99_of(report, [(since, until_)])


def p99_of(report: dict[str, Any], spans: Sequence[tuple[float, float]]) -> float:
    """p99 of the control period over several spans, ms; the first ticks (start-up) are left out."""
    ticks = report["periods"][3:]
    periods = [seconds for at, seconds in ticks if any(since <= at - seconds and at <= end for since, end in spans)]
    return float(np.percentile(periods, 99)) * 1e3


class Windows:
    """Alternating spans with and without a fault, so that whatever else the machine does falls on both alike."""

    def __init__(self) -> None:
        self.spans: dict[str, list[tuple[float, float]]] = {"calm": [], "fault": []}

    @contextlib.contextmanager
    def during(self, what: str) -> Iterator[None]:
        """What happens inside is one span."""
        began = time.monotonic()
        yield
        self.spans[what].append((began, time.monotonic()))

    def p99_ratio(self, report: dict[str, Any]) -> float:
        """p99 of the control period under the fault against without it."""
        return p99_of(report, self.spans["fault"]) / p99_of(report, self.spans["calm"])


def is_listening(port: int) -> bool:
    """Whether a process listens on that loopback port; looked up, so that it is not disturbed."""
    with open("/proc/net/tcp") as table:
        rows = [line.split() for line in table.readlines()[1:]]
    return any(row[1].endswith(f":{port:04X}") and row[3] == "0A" for row in rows)


def cpu_s(pid: int) -> float:
    """CPU time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
