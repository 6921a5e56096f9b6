"""A scripted actor as a process: step batches of a small camera at a control rate, spool and ledger in the run folder.

    python fault_actor.py <json options>        tag: names its files; default: its name

It never asks for tickets: it makes episodes of its own, as long as it lives. Each second it writes what it measured
(control periods, backlog, memory) to `<run>/<name>.report.json`. SIGTERM: end the episode, flush, leave.
"""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from serl_transport import TrainerClient, TrainerConfig
from serl_transport.contract.errors import Refused, SpoolFull, WireError
from serl_transport.contract.schema import EpisodeInfo, Observation, Outcome, StepBatch, TimeStep
from serl_transport.contract.specs import TaskSpec


def make_spec(pixels: int = 24, hz: float = 20.0) -> TaskSpec:
    """One square camera, two state dims, two action dims."""
    return TaskSpec.from_dict(
        {
            "name": "fault", "prompt": "touch the wall", "cameras": {"front": [pixels, pixels]},
            "state_names": ["x", "y"], "state_low": [-1, -1], "state_high": [1, 1],
            "action_names": ["dx", "dy"], "action_low": [-1, -1], "action_high": [1, 1],
            "control_hz": hz, "max_ticks": 60,
        }
    )  # fmt: skip


class Tripled(TrainerClient):
    """Sends every message three times."""

    def _link(self, *args: Any, **kwargs: Any) -> Any:
        link = super()._link(*args, **kwargs)
        send = link._transmit
        link._transmit = lambda parts: send(parts) and send(parts) and send(parts)
        return link


def main(options: dict[str, Any]) -> None:
    """Run until SIGTERM."""
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopping.append(number))
    spec = make_spec(options.get("pixels", 24), options.get("hz", 20.0))
    run, name = Path(options["run"]), options["name"]
    tag = options.get("tag", name)
    kind = Tripled if options.get("tripled") else TrainerClient
    client = kind(
        name, options.get("ip", "127.0.0.1"),
        TrainerConfig(options["port"], options["broadcast_port"], keys_dir=options.get("keys_dir")),
        spec=spec,
        spool_dir=run / "spool" / tag,
        spool_bytes=options.get("spool_mb", 256) << 20,
        ledger_path=run / "spool" / f"{tag}.acknowledged.jsonl",
        on_wait=lambda message: None,
    )  # fmt: skip
    report = Report(run / f"{tag}.report.json", client)
    try:
        episode = 0
        while not stopping:
            run_episode(client, spec, f"{client.boot_id}-{episode}", options, report, stopping)
            episode += 1
        report.flushed = client.flush(options.get("flush_s", 30))
        report.write()
    finally:
        client.stop()
    if report.replaced:
        sys.exit(refuse(report.replaced))


def refuse(message: str) -> int:
    """One line; the exit code of a mistake of the user."""
    print(f"fault actor: {message}", file=sys.stderr)
    return 2


def run_episode(
    client: TrainerClient, spec: TaskSpec, episode_id: str, options: dict[str, Any], report: "Report", stopping: list
) -> None:
    """`ticks` control ticks in batches of `batch`; the batch is sent within the tick that completes it."""
    info = EpisodeInfo(
        episode_id, client.name, client.boot_id, spec.name, spec.prompt, "online", "online", 1, time.time()
    )
    rng = np.random.default_rng(abs(hash(episode_id)) % 2**32)
    size = (*spec.cameras["front"], 3)
    period, ticks, batch = 1 / spec.control_hz, options.get("ticks", 20), options.get("batch", 5)
    steps, first = [], 0
    due = time.monotonic()
    for tick in range(ticks):
        due += period
        image = rng.integers(0, 256, size, np.uint8)
        observation = Observation({"front": image}, np.array([tick / 100, 0], np.float32))
        last = tick == ticks - 1 or bool(stopping)
        action = np.array([tick / 100, 0], np.float32)
        steps.append(TimeStep(observation, action, 0.0, False, last, False, False, 1, time.monotonic_ns()))
        if options.get("infer_ms") and tick % batch == 0:
            ask(client, observation, options["infer_ms"], report)
            if report.replaced:
                stopping.append(0)
        if last:
            send(client, StepBatch.from_steps(info, first, steps, observation, Outcome(False, "environment",
                 "time_limit")), report)  # fmt: skip
        elif len(steps) == batch:
            send(client, StepBatch.from_steps(info, first, steps), report)
            steps, first = [], tick + 1
        time.sleep(max(0.0, due - time.monotonic()))
        report.tick()
        if last:
            return


def send(client: TrainerClient, batch: StepBatch, report: "Report") -> None:
    """Into the spool; a full one is counted and the batch is gone (a robot would hold)."""
    try:
        client.send_item(batch.to_body())
        report.sent += 1
    except SpoolFull:
        report.spool_full += 1


def ask(client: TrainerClient, observation: Observation, timeout_ms: float, report: "Report") -> None:
    """One question to the policy; what went wrong is noted with the moment and how long it took."""
    body = {"observation": {"images": dict(observation.images), "state": observation.state}, "prompt": "p",
            "min_version": 0, "seed": None}  # fmt: skip
    start = time.monotonic()
    try:
        client.infer(body, timeout_ms=timeout_ms)
        report.answers += 1
    except Refused as error:
        report.replaced = error.message
    except WireError as error:
        report.silences.append((start, time.monotonic() - start, error.code))


class Report:
    """What the actor measured, as a file that is replaced each second."""

    def __init__(self, path: Path, client: TrainerClient):
        self.sent = self.spool_full = self.answers = 0
        self.flushed = False
        self.replaced = ""  # what the learner said when another process took this name
        self.periods: list[tuple[float, float]] = []  # (time.monotonic(), seconds since the tick before)
        self.backlog: list[tuple[float, int]] = []
        self.rss_mb: list[float] = []
        self.silences: list[tuple[float, float, str]] = []
        self._path, self._client = path, client
        self._last = self._written = time.monotonic()

    def tick(self) -> None:
        """A control tick ended."""
        now = time.monotonic()
        self.periods.append((now, now - self._last))
        self.backlog.append((now, self._client.backlog))
        self._last = now
        if now - self._written > 0.5:
            self._written = now
            self.write()

    def write(self) -> None:
        """Replace the file."""
        with open("/proc/self/statm") as file:
            self.rss_mb.append(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6)
        body = {
            "boot": self._client.boot_id, "sent": self.sent, "spool_full": self.spool_full, "flushed": self.flushed,
            "refused": self._client.refused_items, "answers": self.answers, "silences": self.silences,
            "periods": self.periods, "backlog": self.backlog, "rss_mb": self.rss_mb,
        }  # fmt: skip
        part = self._path.with_suffix(".part")
        with contextlib.suppress(OSError):  # the measuring must not end the actor: the run folder's disk may be full
            part.write_text(json.dumps(body))
            os.replace(part, self._path)


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]))
    except Refused as refusal:
        sys.exit(refuse(refusal.message))
