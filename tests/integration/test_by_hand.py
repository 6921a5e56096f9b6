"""The quick start in small with a person at its keys: start.sh's tmux panes at a pseudo-terminal, every process real.

Demonstrations, a discard, take-overs and verdicts are typed; the journal must hold what was executed and said.
"""

import json
import os
import pty
import shutil
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from serl_launcher.replay.episodes import journal_episodes
from serl_launcher.run.config import read_config, task_spec

ROOT = Path(__file__).parents[2]
PATIENCE_S = 240.0


class Panes:
    """`bash start.sh` at a terminal, in a run folder of its own."""

    def __init__(self, folder: Path, ports: tuple[int, int]) -> None:
        self.folder, self.text = folder / "hands", ""
        words = [
            "run=hands", f"runs_dir={folder}", f"port={ports[0]}", f"broadcast_port={ports[1]}", "operator=keyboard",
            "reward=operator", "reward.evaluate_with=environment", "schedule.stages.0.episodes=1",
            "schedule.stages.1.steps=10", "schedule.stages.2.episodes=1", "schedule.stages.3.steps=10",
            "schedule.stages.4.episodes=1", "replay.capacity_frames=4000", "trainer.publish_period=10",
            "rollout.video_every=0",
        ]  # fmt: skip
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            ["bash", "start.sh", *words], cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            env={**os.environ, "TERM": "xterm", "TMUX_TMPDIR": str(folder)},
        )  # fmt: skip
        os.close(slave)
        threading.Thread(target=self._read, daemon=True).start()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(120)
        os.close(self._master)

    def type(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def hold(self, key: bytes, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.type(key)
            time.sleep(1 / 30)

    def status(self) -> dict:
        """Of the gateway; {} before the first."""
        try:
            return json.loads((self.folder / "status.json").read_text())
        except FileNotFoundError:
            return {}

    def rows(self) -> list[dict]:
        """Closed episodes."""
        try:
            return [json.loads(line) for line in (self.folder / "episodes.jsonl").read_text().splitlines()]
        except FileNotFoundError:
            return []

    def driving(self) -> bool:
        """Does the actor say that it runs an episode of this stage? Looked up on the screen's live line."""
        return "operator drives" in self.text

    def wait(self, condition, what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, f"never: {what}; {self.text[-3000:]}"
            assert self.process.poll() is None, f"it ended; {self.text[-3000:]}"
            time.sleep(0.05)

    def _read(self) -> None:
        while True:
            try:
                self.text += os.read(self._master, 65536).decode(errors="replace")
            except OSError:
                return


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
def test_the_quick_start_by_hand(tmp_path, free_ports):
    panes = Panes(tmp_path, free_ports)
    try:
        panes.wait(panes.driving, "the first demonstration runs")
        panes.hold(b"d", 0.5)
        panes.type(b"x")
        panes.wait(lambda: len(panes.rows()) == 1, "the discarded demonstration is in the ledger")
        panes.hold(b"w", 1.0)
        panes.type(b"g")
        panes.hold(b"r", 1.0)
        panes.type(b"y")
        panes.wait(lambda: len(panes.rows()) == 2, "the demonstration is in the ledger")
        panes.wait(lambda: panes.status().get("stage", {}).get("name") == "online", "the online stage")
        while not panes.status().get("done") and panes.status()["stage"]["name"] == "online":
            panes.type(b"t")
            panes.hold(b"a", 0.7)
            panes.type(b"t")
            time.sleep(0.5)
            panes.type(b"y")
            time.sleep(1.0)
            assert panes.process.poll() is None
        assert panes.process.wait(PATIENCE_S) == 0, panes.text[-3000:]
    finally:
        panes.stop()
    spec = task_spec(read_config(panes.folder / "config.yaml", "task.spec"))
    episodes = [episode for _, episode in journal_episodes(panes.folder, spec)]
    discarded, demonstration = episodes[:2]
    assert (discarded.info.mode, discarded.outcome.truncated_by) == ("demo", "discard")
    assert (discarded.arrays["action"][:, 1] < 0).any()
    assert demonstration.outcome.success
    action = demonstration.arrays["action"]
    assert demonstration.arrays["intervention"].all()
    assert np.isclose(action[:, [0, 2]].max(axis=0), 0.0125).all()
    assert action[0, 3] == -1
    assert action[-1, 3] == 1
    helped = [episode for episode in episodes if episode.info.mode == "online" and episode.outcome.success]
    assert helped
    for episode in helped:
        assert episode.outcome.success_source == "human"
    by_hand = np.concatenate([episode.arrays["intervention"] for episode in helped])
    assert 0 < by_hand.mean() < 1  # person and policy took turns
    driven = np.concatenate([episode.arrays["action"][episode.arrays["intervention"]] for episode in helped])
    assert np.isclose(driven[:, 1].max(), 0.0125)
    accepted = [json.loads(line) for line in (panes.folder / "acceptance.jsonl").read_text().splitlines()]
    assert 0 not in {row["ordinal"] for row in accepted}  # nobody judged what was thrown away
