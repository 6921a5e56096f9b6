"""What an actor feels of the wire, in its own units: the wait for an answer, and how many robots one learner takes.

    infer ─▶ gateway process ─▶ policy process that answers at once ─▶ back     ms added to the policy's own time
    n robots, 50 Hz ─▶ gateway process: journal, fdatasync, ring ─▶ ack         does the backlog grow over a minute?

Beside them the machine's floors of the same run: one bare pyzmq hop; write + fdatasync alone; and the same bytes from
as many bare pyzmq sockets into a file with fdatasync, as fast as they go. The robots' spools are in memory: a robot's
disk is another machine's.
"""

import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml
import zmq
from floors import Peer, fdatasync_rate, zmq_journal, zmq_senders, zmq_sink
from rows import Row, alternate

from serl_launcher.run.internal import PolicyLink
from serl_transport import TrainerClient, TrainerConfig
from serl_transport.contract.errors import SpoolFull
from serl_transport.contract.schema import EpisodeInfo, Observation, Outcome, StepBatch, TimeStep
from serl_transport.contract.specs import TaskSpec
from serl_transport.wire import codec
from serl_transport.wire.envelope import Envelope

MAX_TICKS = 100
CAMERAS = ("front", "side", "wrist")
HZ, BATCH, PIXELS = 50, 10, 128
PROCESSES = 4
SETTLE_S = 5.0


def rows(quick: bool) -> Iterator[Row]:
    """Every figure of the suite."""
    yield from question(50 if quick else 400, 1 if quick else 5)
    if quick:
        yield from robots(8, 5.0, "/tmp", "disk")
        return
    for n in (25, 50, 100):
        yield from robots(n, 60.0, "/tmp", "disk")
    yield from robots(100, 15.0, "/dev/shm", "memory")


def question(n: int, rounds: int) -> Iterator[Row]:
    """p50 of a question with three 224 px images and an answer float32[50, 32], whose policy takes no time."""
    spec = make_spec(224)
    images = {camera: np.random.default_rng(0).integers(0, 256, (*hw, 3), np.uint8) for camera, hw in
              spec.cameras.items()}  # fmt: skip
    body = {"observation": {"images": images, "state": np.zeros(14, np.float32)}, "prompt": "p"}
    message = [Envelope("infer", "a", "b", 0, 1).to_frame(), *codec.pack(body)]
    answer = [b"e" * 60, *(bytes(frame) for frame in codec.pack(echo_answer()))]
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp"))
        sink = stack.enter_context(Peer(zmq_sink, answer))
        ports = stack.enter_context(gateway_process(Path(folder), spec))
        stack.enter_context(Peer(echo_policy, folder))
        context = zmq.Context()
        stack.callback(context.destroy, linger=0)
        dealer = context.socket(zmq.DEALER)
        dealer.connect(f"tcp://127.0.0.1:{sink.port}")
        config = TrainerConfig(port_number=ports[0], broadcast_port=ports[1])
        client = TrainerClient("a", "127.0.0.1", config, spec=spec)
        stack.callback(client.stop)

        def bare() -> None:
            dealer.send_multipart(message, copy=False)
            dealer.recv_multipart(copy=False)

        found = alternate(
            {"bare": lambda: p50_ms(bare, n), "ours": lambda: p50_ms(lambda: client.infer(body), n)}, rounds
        )
    yield Row.of("transport/floor/one_bare_hop/3x224px", found["bare"], "ms")
    yield Row.of("transport/question/3x224px/p50", found["ours"], "ms", goal="<= 2")


def robots(n: int, seconds: float, where: str, name: str) -> Iterator[Row]:
    """Unacknowledged batches at the end beside those at the beginning, in batches per robot."""
    spec = make_spec(PIXELS)
    tick_bytes = len(CAMERAS) * PIXELS * PIXELS * 3
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=where)))
        syncs = fdatasync_rate(folder, BATCH * tick_bytes, 2.0, 8) * BATCH
        share = [n // PROCESSES + (i < n % PROCESSES) for i in range(PROCESSES)]
        bare = bare_rate(folder / "bare.floor", share, BATCH * tick_bytes, min(seconds, 10.0)) * BATCH
        ports = stack.enter_context(gateway_process(folder, spec))
        drivers = [
            stack.enter_context(Peer(drive, ports, spec.to_dict(), first, count, seconds))
            for first, count in zip(range(0, 10**6, 1000), share, strict=False)
            if count
        ]
        for driver in drivers:
            driver.pipe.send("go")
        told = [driver.pipe.recv() for driver in drivers]
    acknowledged, before, after, full = (sum(column) for column in zip(*told, strict=True))
    growth = float("inf") if full else (after - before) / n
    label = f"transport/robots/{name}/{n}x{HZ}Hz/{len(CAMERAS)}x{PIXELS}px"
    yield Row.of(f"transport/floor/fdatasync/{name}", syncs, "transitions/s")
    yield Row.of(f"transport/floor/bare_sockets_and_fdatasync/{name}/{n}", bare, "transitions/s")
    yield Row.of(f"{label}/acknowledged", acknowledged / seconds, "transitions/s", n * HZ)
    yield Row.of(f"{label}/backlog_growth", growth, "batches per robot", goal="<= 1")


def bare_rate(path: Path, share: list[int], message_bytes: int, seconds: float) -> float:
    """Messages/s that bare sockets, shared out over processes, bring through a process that writes and syncs them."""
    with ExitStack() as stack:
        sink = stack.enter_context(Peer(zmq_journal, str(path)))
        peers = [stack.enter_context(Peer(zmq_senders, sink.port, n, message_bytes, seconds)) for n in share if n]
        for peer in peers:
            peer.pipe.send("go")
        answered = sum(peer.pipe.recv() for peer in peers)
    path.unlink()
    return answered / seconds


def drive(pipe: Any, ports: tuple[int, int], spec_dict: dict[str, Any], first: int, count: int, seconds: float) -> None:
    """`count` robots in this process, each sending a batch every BATCH / HZ seconds.

    Sends (acknowledged ticks, backlog after SETTLE_S, backlog at the end, spools that were full).
    """
    spec = TaskSpec.from_dict(spec_dict)
    config = TrainerConfig(port_number=ports[0], broadcast_port=ports[1])
    clients = [TrainerClient(f"robot-{first + i}", "127.0.0.1", config, spec=spec, spool_bytes=128 << 20)
               for i in range(count)]  # fmt: skip
    bodies = {client.name: [b.to_body() for b in make_batches(spec, "x", client.boot_id)] for client in clients}
    pipe.send("ready")
    pipe.recv()
    sent, full, samples = 0, 0, []
    began = time.monotonic()
    for turn in range(int(seconds * HZ / BATCH)):
        due = began + turn * BATCH / HZ
        for i, client in enumerate(clients):
            time.sleep(max(0.0, due + i / count * BATCH / HZ - time.monotonic()))  # robots do not tick in step
            episode, place = divmod(turn, MAX_TICKS // BATCH)
            body = bodies[client.name][place]
            info = body["episode"] | {"episode_id": f"{client.boot_id}-{episode}"}
            info |= {"actor_id": client.name, "boot_id": client.boot_id}
            try:
                client.send_item(body | {"episode": info})
            except SpoolFull:
                full += 1
                break
            sent += BATCH
        samples.append((time.monotonic() - began, sum(client.backlog for client in clients)))
        if full:
            break
    before = statistics.fmean(b for t, b in samples if t < 2 * SETTLE_S) if samples else 0
    after = statistics.fmean(b for t, b in samples if t > samples[-1][0] - SETTLE_S) if samples else 0
    pipe.send((sent - BATCH * samples[-1][1], before, after, full))


def p50_ms(call: Callable[[], Any], n: int) -> float:
    """Median duration of `call` in milliseconds, after a warm-up."""
    for _ in range(10):
        call()
    times = []
    for _ in range(n):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


@contextmanager
def gateway_process(folder: Path, spec: TaskSpec) -> Iterator[tuple[int, int]]:
    """A real gateway in `folder`; its two ports."""
    ports = free_ports()
    stage = {"name": "online", "mode": "online", "steps": 10**9}
    cfg = {
        "run": "bench", "seed": 0, "port": ports[0], "broadcast_port": ports[1],
        "task": {"spec": spec.to_dict()}, "schedule": {"stages": [stage]},
        "replay": {"capacity_frames": 4 * (MAX_TICKS + 1)}, "bind_host": "127.0.0.1", "insecure": True,
        "journal": {"segment_mb": 256}, "gateway": {"dead_actor_s": 30.0, "unticketed": "auto"},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(cfg))
    command = [sys.executable, "-m", "serl_launcher.gateway", str(folder)]
    process = subprocess.Popen(command, stderr=(folder / "log").open("w"))
    (folder / "pid").write_text(str(process.pid))
    try:
        deadline = time.monotonic() + 60
        while not (folder / "status.json").exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the gateway did not start: {(folder / 'log').read_text()}")
            time.sleep(0.05)
        yield ports
    finally:
        process.terminate()
        process.wait(60)


def free_ports() -> tuple[int, int]:
    """Two ports that were free a moment ago."""
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]


def echo_policy(pipe: Any, run_dir: str) -> None:
    """A policy server that answers at once."""
    link = PolicyLink(run_dir)
    served, told = 0, 0.0
    while True:
        if time.monotonic() - told > 0.5:
            link.serving(version=1, requests=served, batch_mean=1.0, p50_ms=0.0)
            if not told:
                time.sleep(0.3)
                pipe.send("serving")
            told = time.monotonic()
        request = link.receive(0.2)
        if request is not None:
            link.reply(request.token, echo_answer())
            served += 1


def echo_answer() -> dict[str, Any]:
    """An answer of the usual size."""
    return {"actions": np.zeros((50, 32), np.float32), "policy_version": 1, "server_ms": 0.0}


def make_spec(pixels: int) -> TaskSpec:
    """Three square cameras, 14 state dims, 7 action dims."""
    return TaskSpec.from_dict(
        {
            "name": "bench", "prompt": "p", "cameras": {camera: [pixels, pixels] for camera in CAMERAS},
            "state_names": [f"s{i}" for i in range(14)], "state_low": [-1] * 14, "state_high": [1] * 14,
            "action_names": [f"a{i}" for i in range(7)], "action_low": [-1] * 7, "action_high": [1] * 7,
            "control_hz": 30, "max_ticks": MAX_TICKS,
        }
    )  # fmt: skip


def make_batches(spec: TaskSpec, episode_id: str, boot: str) -> list[StepBatch]:
    """One episode of MAX_TICKS ticks in batches of BATCH; images are noise."""
    info = EpisodeInfo(episode_id, "a", boot, spec.name, spec.prompt, "online", "online", 1, 1e9)
    rng = np.random.default_rng(0)

    def seen() -> Observation:
        images = {camera: rng.integers(0, 256, (*hw, 3), np.uint8) for camera, hw in spec.cameras.items()}
        return Observation(images, np.zeros(14, np.float32))

    def step(tick: int) -> TimeStep:
        done = tick + 1 == MAX_TICKS
        return TimeStep(seen(), np.zeros(7, np.float32), 0.0, done, False, False, False, policy_version=1, time_ns=tick)

    steps, end = [step(tick) for tick in range(MAX_TICKS)], (seen(), Outcome(False, "environment", None))
    firsts = range(0, MAX_TICKS, BATCH)
    return [StepBatch.from_steps(info, n, steps[n : n + BATCH], *end * (n == firsts[-1])) for n in firsts]
