"""Acknowledged transitions/s of an actor, and the round trip of a request through the gateway.

    TrainerClient ─▶ TrainerServer that validates and acknowledges      against bare pyzmq and raw TCP
    TrainerClient ─▶ gateway process: journal, fdatasync, ring          against write + fdatasync (and bare pyzmq)
    infer ─▶ gateway ─▶ policy process that echoes ─▶ back              against one bare pyzmq hop: on one host (over
                                                                        the line, over TCP) and over a 1 Gbit/s link

Three cameras at 128 and 224 pixels, batches of 1, 10 and 100 ticks, one copy of each frame. The actor's spool is in
memory: an actor's disk is another machine's.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from floors import Peer, fdatasync_rate, tcp_rate, tcp_sink, zmq_rate, zmq_sink
from rows import Row, alternate
from suites._round_trip import NEAR_IP, measure, measure_in, namespace

from serl_launcher.run.internal import PolicyLink
from serl_transport import TrainerClient, TrainerConfig, TrainerServer
from serl_transport.contract.schema import EpisodeInfo, Outcome, StepBatch
from serl_transport.contract.specs import TaskSpec
from serl_transport.delivery.outbox import WINDOW_BYTES, WINDOW_ITEMS
from serl_transport.wire import codec
from serl_transport.wire.envelope import Envelope

MAX_TICKS = 100
CAMERAS = ("front", "side", "wrist")


def rows(quick: bool) -> Iterator[Row]:
    """Every figure of the suite."""
    seconds, rounds = (0.3, 1) if quick else (2.0, 3)
    sizes = ((128, 1), (128, 10), (224, 10)) if quick else [(p, n) for p in (128, 224) for n in (1, 10, 100)]
    for pixels, ticks in sizes:
        yield from throughput(pixels, ticks, seconds, rounds)
    yield from round_trip(50 if quick else 400, rounds)


def throughput(pixels: int, ticks: int, seconds: float, rounds: int) -> Iterator[Row]:
    """Rates of one camera size and batch size, all in transitions/s."""
    spec = make_spec(pixels)
    name = f"{pixels}px/batch{ticks}"
    messages = [[Envelope("data", "a", "b", i, i).to_frame(), *codec.pack(b.to_body())] for i, b in enumerate(
        make_batches(spec, "floor", ticks), 1)]  # fmt: skip
    size = sum(codec.nbytes(frame) for frame in messages[0])
    window = max(1, min(WINDOW_ITEMS, -(-WINDOW_BYTES // size)))
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        with (
            Peer(zmq_sink) as sink,
            Peer(tcp_sink) as tcp,
            Peer(plain_server, spec.to_dict()) as plain,
            GatewayProcess(Path(folder), spec) as gateway,
        ):
            found = alternate(
                {
                    "zmq": lambda: ticks * zmq_rate(sink.port, messages, seconds, window),
                    "server": lambda: client_rate(plain.port, spec, ticks, seconds),
                    "tcp": lambda: ticks * tcp_rate(tcp.port, messages, seconds, window),
                    "fdatasync": lambda: ticks * fdatasync_rate(Path(folder), size, seconds, window),
                    "gateway": lambda: client_rate(gateway.ports, spec, ticks, seconds),
                },
                rounds,
            )
    unit = "transitions/s"
    yield Row.of(f"transport/floor/raw_tcp/{name}", found["tcp"], unit)
    yield Row.of(f"transport/floor/fdatasync/{name}", found["fdatasync"], unit)
    yield Row.of(f"transport/acknowledged/{name}", found["server"], unit, found["zmq"], ">= 0.8")
    allowed = min(found["zmq"], found["fdatasync"])
    yield Row.of(f"transport/journalled/{name}", found["gateway"], unit, allowed, ">= 0.8")


def client_rate(ports: tuple[int, int], spec: TaskSpec, ticks: int, seconds: float) -> float:
    """Acknowledged transitions/s of one TrainerClient that always has more to send."""
    config = TrainerConfig(port_number=ports[0], broadcast_port=ports[1])
    client = TrainerClient("a", "127.0.0.1", config, spec=spec)
    try:
        bodies = [b.to_body() for b in make_batches(spec, "x", ticks, client.boot_id)]
        size = sum(array.nbytes for array in bodies[0]["arrays"].values())
        ahead = max(2, 2 * min(WINDOW_ITEMS, -(-WINDOW_BYTES // size)))
        client.send_item(bodies[0] | {"episode": bodies[0]["episode"] | {"episode_id": f"{client.boot_id}-warm"}})
        assert client.flush(60)
        sent, episode, start = 0, 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            for body in bodies:
                info = body["episode"] | {"episode_id": f"{client.boot_id}-{episode}"}
                client.send_item(body | {"episode": info}, copy=False)
                sent += ticks
                if client.backlog >= ahead:
                    assert client.flush(60, at_most=ahead - max(1, ahead // 4)), "nothing is acknowledged any more"
            episode += 1
        assert client.flush(120), "not everything was acknowledged"
        assert not client.refused_items
        return sent / (time.perf_counter() - start)
    finally:
        client.stop()


def round_trip(n: int, rounds: int) -> Iterator[Row]:
    """p50 of a question with three 224 px images and an answer float32[50, 32], beside one bare pyzmq hop.

    As an actor of this host asks by default, then over TCP, then over a 1 Gbit/s link where one can be made here.
    """
    name, goal, rounds = "transport/infer_round_trip/3x224px", "<= 2", max(2, rounds)
    spec = make_spec(224)
    with answering(spec, "127.0.0.1") as (ports, bare_port):
        found = measure(spec, "127.0.0.1", ports, bare_port, {"line": True, "tcp": False}, n, rounds)
    yield Row.of(f"{name}/p50", found["line"], "ms", found["bare"], goal)
    yield Row.of(f"{name}/tcp/p50", found["tcp"], "ms", found["bare"], goal)
    with namespace() as far:
        if far is not None:
            with answering(spec, NEAR_IP) as (ports, bare_port):
                found = measure_in(far, spec=spec.to_dict(), ip=NEAR_IP, ports=ports, bare_port=bare_port,
                                   ways={"link": False}, n=n, rounds=rounds)  # fmt: skip
            yield Row.of(f"{name}/1gbit/p50", found["link"], "ms", found["bare"], goal)


@contextmanager
def answering(spec: TaskSpec, host: str) -> Iterator[tuple[tuple[int, int], int]]:
    """A gateway and a policy that echoes, and a bare peer, all on `host`: (the gateway's ports, the peer's port)."""
    answer = [b"e" * 60, *(bytes(frame) for frame in codec.pack(echo_answer()))]
    with (
        tempfile.TemporaryDirectory(dir="/tmp") as folder,
        Peer(zmq_sink, answer, host) as sink,
        GatewayProcess(Path(folder), spec, host) as gateway,
        Peer(echo_policy, folder) as policy,
    ):
        assert policy.port == "serving"
        yield gateway.ports, sink.port


class GatewayProcess:
    """A real gateway in `folder`; `ports` are its two."""

    def __init__(self, folder: Path, spec: TaskSpec, host: str = "127.0.0.1"):
        self.ports = free_ports()
        stage = {"name": "online", "mode": "online", "steps": 10**9}
        cfg = {
            "run": "bench", "seed": 0, "port": self.ports[0], "broadcast_port": self.ports[1],
            "task": {"spec": spec.to_dict()}, "schedule": {"stages": [stage]},
            "replay": {"capacity_frames": 4 * (MAX_TICKS + 1)}, "bind_host": host, "insecure": True,
        }  # fmt: skip
        (folder / "config.yaml").write_text(yaml.safe_dump(cfg))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "serl_launcher.gateway", str(folder)], stderr=(folder / "log").open("w")
        )
        deadline = time.monotonic() + 60
        while not (folder / "status.json").exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the gateway did not start: {(folder / 'log').read_text()}")
            time.sleep(0.05)

    def __enter__(self) -> GatewayProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(60)


def free_ports() -> tuple[int, int]:
    """Two ports that were free a moment ago."""
    import socket

    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]


def plain_server(pipe: Any, spec_dict: dict[str, Any]) -> None:
    """A TrainerServer that checks each batch as the gateway does and acknowledges at once."""
    spec = TaskSpec.from_dict(spec_dict)
    server = TrainerServer(TrainerConfig(port_number=0, broadcast_port=0), spec=spec)

    def data(peer: Any, envelope: Envelope, body: dict[str, Any]) -> dict[str, Any]:
        StepBatch.from_body(body, spec)
        return {"duplicate": False}

    server.handle("data", data)
    pipe.send((server.config.port_number, server.config.broadcast_port))
    server.start()


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


def make_batches(spec: TaskSpec, episode_id: str, ticks: int, boot: str = "b") -> list[StepBatch]:
    """One episode of MAX_TICKS ticks in batches of `ticks`; images are noise."""
    info = EpisodeInfo(episode_id, "a", boot, spec.name, spec.prompt, "online", "online", 1, 1e9)
    rng = np.random.default_rng(0)
    result = []
    for first in range(0, MAX_TICKS, ticks):
        final = first + ticks == MAX_TICKS
        m = ticks + final
        arrays: dict[str, np.ndarray] = {
            f"observation.images.{c}": rng.integers(0, 256, (m, *spec.cameras[c], 3), np.uint8) for c in spec.cameras
        }
        arrays |= {
            "observation.state": np.zeros((m, 14), np.float32),
            "action": np.zeros((ticks, 7), np.float32),
            "next.reward": np.zeros(ticks, np.float32),
            "policy_version": np.full(ticks, 1, np.int64),
            "time_ns": np.arange(ticks, dtype=np.int64),
        }
        for key in ("next.done", "next.truncated", "next.success", "intervention"):
            arrays[key] = np.zeros(ticks, bool)
        arrays["next.done"][-1] = final
        outcome = Outcome(False, "environment", None) if final else None
        result.append(StepBatch(info, first, arrays, final, outcome))
    return result
