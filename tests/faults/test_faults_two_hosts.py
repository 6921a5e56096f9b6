"""Two hosts of one trainer, in two network namespaces: the curve of one host, and a cable that is pulled for 15 s."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_faults_namespace import HERE_IP, namespace, run_ip  # noqa: F401  (a fixture)

from flowserl_cli.compose import load_config
from serl_launcher.replay.entries import DataEntry, SpecEntry
from serl_launcher.replay.journal import JournalReader
from serl_launcher.replay.journal_writer import JournalWriter
from serl_launcher.run.config import task_spec
from serl_transport.contract.schema import EpisodeInfo, Outcome, StepBatch
from serl_transport.wire import codec

ROOT = Path(__file__).parents[2]
STEPS, TICKS, EPISODES = 150, 20, 8
CUT_S = 15.0
WORDS = [
    "learner=true", "run=two", "task=pick_state", "trainer.device=cpu", "insecure=true", "console.port=null",
    f"schedule.stages=[{{name: sft, mode: train, steps: {STEPS}}}]", "trainer.batch_size=16",
    "trainer.publish_period=60", "trainer.checkpoint_period=60", "replay.capacity_frames=2000",
]  # fmt: skip


def write_demonstrations(journal: Path) -> None:
    """A journal of successes by a scripted arm that drifts; made by the writer that the gateway uses."""
    spec, rng = task_spec(load_config(["task=pick_state"])), np.random.default_rng(0)
    journal.mkdir(parents=True)
    writer = JournalWriter(
        journal, JournalReader(journal), lambda callback: callback(), 1 << 20, SpecEntry(spec).payload()
    )
    low, high = np.float32(spec.action_low), np.float32(spec.action_high)
    for k in range(EPISODES):
        info = EpisodeInfo(f"e{k}", "a", "b", spec.name, spec.prompt, "demo", "demos", k, 1000.0)
        last = np.arange(TICKS) == TICKS - 1
        state = np.cumsum(rng.normal(0, 0.005, (TICKS + 1, len(spec.state_names))), 0).astype(np.float32)
        batch = StepBatch(info, 0, {
            "observation.state": np.clip(state, np.float32(spec.state_low), np.float32(spec.state_high)),
            "action": rng.uniform(low, high, (TICKS, len(low))).astype(np.float32),
            "next.reward": last.astype(np.float32), "next.done": last, "next.truncated": ~last & last,
            "next.success": last, "intervention": np.ones(TICKS, bool),
            "policy_version": np.full(TICKS, -1, np.int64), "time_ns": np.arange(TICKS, dtype=np.int64),
        }, True, Outcome(True, "environment", None))  # fmt: skip
        batch.check(spec)
        entry = DataEntry("a", "b", k + 1, batch, codec.pack(batch.to_body()))
        writer.append(entry.payload(), lambda error, time_ns: None)
    writer.close()


class Host:
    """`python examples/train_rlpd.py learner=true …` with a folder of its own for runs."""

    def __init__(self, folder: Path, ports: tuple[int, int], *words: str, inside: str | None = None) -> None:
        self.run, self.log = folder / "two", folder / "screen.log"
        folder.mkdir(exist_ok=True)
        where = ["ip", "netns", "exec", inside] if inside else []
        command = [sys.executable, "examples/train_rlpd.py", *WORDS, f"runs_dir={folder}", *words]
        command += [f"port={ports[0]}", f"broadcast_port={ports[1]}"]
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [*where, *command], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
            )  # fmt: skip

    def curve(self) -> dict[int, float]:
        """Step -> loss, as far as metrics/trainer.jsonl tells."""
        path = self.run / "metrics" / "trainer.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        name = next((key for row in rows for key in row if key.startswith("losses/")), None)
        return {row["step"]: row[name] for row in rows if name in row}

    def wait(self, seconds: float) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.tail()) from None

    def tail(self) -> str:
        logs = [self.log, *sorted((self.run / "logs").glob("*.log"))]
        return "\n".join(f"== {path}\n{path.read_text(errors='replace')[-3000:]}" for path in logs if path.exists())

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(90)


def wait_for(what, seconds: float, *hosts: Host) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        for host in hosts:
            assert host.process.poll() is None, host.tail()
        assert time.monotonic() < deadline, "\n".join(host.tail() for host in hosts)
        time.sleep(0.2)


@pytest.mark.timeout(500)
def test_two_hosts_train_as_one_and_go_on_after_a_cable_was_pulled(namespace, figures, tmp_path):  # noqa: F811
    name, cable = namespace
    ports = 5601 + os.getpid() % 300 * 3, 7601 + os.getpid() % 300
    for folder in ("one", "first"):
        write_demonstrations(tmp_path / folder / "two" / "journal")
    alone = Host(tmp_path / "one", ports, "launch=one")
    try:
        assert alone.wait(240) == 0, alone.tail()
    finally:
        alone.end()
    launch = [
        "launch=nodes", "launch.engine=ddp", "launch.num_processes=1", f"launch.main_host={HERE_IP}",
        f"launch.main_port={ports[0] + 2}", f"bind_host={HERE_IP}",
    ]  # fmt: skip
    first = Host(tmp_path / "first", ports, *launch)
    second = Host(tmp_path / "second", ports, *launch, "launch.machine_rank=1", inside=name)
    try:
        wait_for(lambda: len(first.curve()) >= 40, 180, first, second)
        run_ip("link", "set", cable, "down")
        began, before = time.monotonic(), len(first.curve())
        time.sleep(CUT_S)
        during = len(first.curve()) - before
        said = second.run / "status.json"
        told = json.loads(said.read_text())["troubles"].get("follower", "")
        run_ip("link", "set", cable, "up")
        wait_for(lambda: len(first.curve()) > before + during, 60, first)
        back_s = time.monotonic() - began - CUT_S
        codes = first.wait(240), second.wait(60)
        one, two = alone.curve(), first.curve()
        worst = max(abs(one[step] - two[step]) / abs(one[step]) for step in one)
        same = [path.read_bytes() for path in sorted((first.run / "journal").glob("*.seg"))] == [
            path.read_bytes() for path in sorted((second.run / "journal").glob("*.seg"))
        ]
        figures.row(
            "two_hosts", "the curve of one host within 1e-4, on after a cable was pulled for 15 s",
            worst < 1e-4 and back_s < 30, worst=float(f"{worst:.2g}"), steps=len(two), back_s=round(back_s, 1),
            steps_while_cut=during,
        )  # fmt: skip
        assert codes == (0, 0), first.tail() + second.tail()
        assert one.keys() == two.keys() == set(range(1, STEPS + 1))
        assert worst < 1e-4
        assert same
        assert "the gateway is silent" in told
        assert "this machine's part of the run is over" in second.log.read_text()
        assert not (second.run / "params").exists()
        assert not (second.run / "metrics").exists()
    finally:
        for host in (first, second):
            host.end()
