"""The quick start in small, as a user starts it: real actor, gateway, policy server, trainer, exporter, in one run."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
STEPS = {"sft": 40, "online": 60}
QUICKSTART = [
    "schedule.stages.0.episodes=4",
    f"schedule.stages.1.steps={STEPS['sft']}",
    "schedule.stages.2.episodes=4",
    f"schedule.stages.3.steps={STEPS['online']}",
    "schedule.stages.4.episodes=4",
]


class Run:
    """`bash start.sh --no-tmux` in a folder of its own; killed with its children when the test ends."""

    def __init__(
        self,
        folder: Path,
        ports: tuple[int, int],
        *overrides: str,
        stages_of_its_own: bool = False,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder / "small"
        self.log = folder / "start.log"
        words = [
            "run=small",
            f"runs_dir={folder}",
            f"port={ports[0]}",
            f"broadcast_port={ports[1]}",
            *([] if stages_of_its_own else QUICKSTART),
            "replay.capacity_frames=4000",
            "trainer.checkpoint_period=10",
            "trainer.publish_period=10",
            "exporter.period_s=5",
            *overrides,
        ]
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                ["bash", "start.sh", "--no-tmux", *words], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True, env={**os.environ, **(env or {})},
            )  # fmt: skip

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(60)

    def text(self) -> str:
        """Both screens so far: lines prefixed [actor] and [learner]."""
        return self.log.read_text(errors="replace")

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
        pid = self.pid(module)
        os.kill(pid, signal.SIGKILL)
        return pid

    def pid(self, module: str) -> int:
        """The process of this run whose command line holds `module`."""
        found = self.pids(module)
        assert found, f"no process of this run holds {module}"
        return found[0]

    def pids(self, module: str) -> list[int]:
        """All of them, but for what starts several ranks."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "cmdline").read_bytes().decode().split("\0")
                except OSError:
                    continue
                mine = str(self.folder) in words or f"runs_dir={self.folder.parent}" in words
                if mine and module in words and "serl_launcher.supervisor.several" not in words:
                    found.append(int(entry.name))
        return found

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
