"""Parameters from publish to applied: over the wire, and on one host through the published file.

    publish_network(tensors) ─▶ announce ─▶ chunks ─▶ checked ─▶ callback           against one bare pyzmq message
    params/v*.safetensors ─▶ gateway announces ─▶ client reads it into its own memory   against one memcpy

10, 100 and 500 MB. Publisher and receiver are two processes; the clock is CLOCK_MONOTONIC, which they share.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zmq
from floors import HEAD, Peer, memcpy_seconds, receive_into
from rows import Row, alternate
from suites.transport import GatewayProcess, make_spec

from serl_transport import TrainerClient, TrainerConfig, TrainerServer

TENSOR_BYTES = 4 << 20
ANNOUNCED_S = 0.15  # between a file's last byte and its announcement's arrival here, about
REST_S = 0.05  # before each measurement over the wire: a learner publishes every few seconds, to an idle receiver


def rows(quick: bool) -> Iterator[Row]:
    """Every figure of the suite."""
    for megabytes in (10, 50) if quick else (10, 100, 500):
        rounds = 2 if quick else max(5, 250 // megabytes)  # what takes milliseconds is the noisier
        yield from over_the_wire(megabytes << 20, f"{megabytes}MB", rounds)
    for megabytes in (10, 50) if quick else (10, 100, 500):
        yield from on_one_host(megabytes << 20, f"{megabytes}MB", 2 if quick else max(5, 150 // megabytes))


def over_the_wire(nbytes: int, name: str, rounds: int) -> Iterator[Row]:
    """Seconds from the call of publish_network to the client's callback."""
    with Peer(bare_publisher, nbytes) as bare, Peer(tcp_publisher, nbytes) as tcp, Peer(publisher, nbytes) as ours:
        config = TrainerConfig(port_number=ours.port[0], broadcast_port=ours.port[1])
        client = TrainerClient("a", "127.0.0.1", config, wait_for_server=False)
        applied: list[float] = []
        arrived = threading.Event()

        def callback(params: dict[str, Any]) -> None:
            assert sum(tensor.nbytes for tensor in params.values()) == nbytes
            applied.append(time.monotonic())
            arrived.set()

        client.recv_network_callback(callback)
        context = zmq.Context()
        pull = context.socket(zmq.PULL)
        pull.connect(f"tcp://127.0.0.1:{bare.port}")
        import socket

        raw = socket.create_connection(("127.0.0.1", tcp.port))
        buffer = bytearray(nbytes)

        def push() -> float:
            time.sleep(REST_S)
            arrived.clear()
            ours.pipe.send("go")
            began = ours.pipe.recv()
            assert arrived.wait(120), "the parameters did not arrive"
            return applied[-1] - began

        def bare_push() -> float:
            time.sleep(REST_S)
            bare.pipe.send("go")
            began = bare.pipe.recv()
            message = pull.recv(copy=False)
            assert len(message.buffer) == nbytes
            return time.monotonic() - began

        def tcp_push() -> float:
            time.sleep(REST_S)
            tcp.pipe.send("go")
            began = tcp.pipe.recv()
            receive_into(raw, memoryview(buffer))
            raw.sendall(HEAD.pack(nbytes))
            return time.monotonic() - began

        found = alternate({"bare": bare_push, "ours": push, "tcp": tcp_push}, rounds)
        client.stop()
        raw.close()
        context.destroy(linger=0)
    yield Row.of(f"params/floor/raw_tcp/{name}", found["tcp"], "s")
    yield Row.of(f"params/wire/{name}", found["ours"], "s", found["bare"], "<= 1.3")


def on_one_host(nbytes: int, name: str, rounds: int) -> Iterator[Row]:
    """Seconds from the announcement's arrival at the client to the bytes in the memory that it keeps for them.

    The file lies in the run folder, as in use: what processes share is the page cache (on tmpfs, whose pages are small,
    the kernel's copy takes twice as long). Two rows: the first version, into memory that was never touched, and the
    later ones. The floor of both is a memcpy whose source and target were touched just before, so that 10 MB come from
    the processor's cache; a third row says what a memcpy costs after the time that an announcement takes.
    """
    spec = make_spec(32)
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, GatewayProcess(Path(folder), spec) as gateway:
        params = Path(folder) / "params"
        params.mkdir()
        config = TrainerConfig(port_number=gateway.ports[0], broadcast_port=gateway.ports[1])
        client = TrainerClient("a", "127.0.0.1", config, spec=spec)
        target = np.zeros(nbytes, np.uint8)
        version = 0
        heard: set[int] = set()
        client.on_notify(lambda body: heard.add(body.get("version", 0)))
        time.sleep(0.5)  # a subscription takes a moment

        def publish() -> None:
            nonlocal version
            version += 1
            blob = os.urandom(1 << 20) * (nbytes >> 20)
            file = params / f"v{version:06d}.safetensors"
            file.write_bytes(blob)
            entry = {"version": version, "step": 0, "file": file.name, "bytes": nbytes, "time": time.time(),
                     "sha256": hashlib.sha256(blob).hexdigest()}  # fmt: skip
            part = params / "latest.json.part"
            part.write_text(json.dumps(entry))
            os.replace(part, params / "latest.json")

        def fetch() -> float:
            publish()
            deadline = time.monotonic() + 60
            while version not in heard:
                assert time.monotonic() < deadline, "the announcement did not come"
                time.sleep(0.01)
            began = time.perf_counter()
            blob = client.fetch_params(into=target).blob
            took = time.perf_counter() - began
            assert len(blob) == nbytes
            for old in sorted(params.glob("v*.safetensors"))[:-1]:
                old.unlink()
            return took

        first = fetch()
        found = alternate(
            {
                "memcpy": lambda: memcpy_seconds(nbytes),
                "rested": lambda: memcpy_seconds(nbytes, ANNOUNCED_S),
                "ours": fetch,
            },
            rounds,
        )
        client.stop()
    yield Row.of(f"params/floor/memcpy_of_rested_memory/{name}", found["rested"], "s", found["memcpy"])
    yield Row.of(f"params/one_host_first/{name}", first, "s", found["memcpy"])
    yield Row.of(f"params/one_host/{name}", found["ours"], "s", found["memcpy"], "<= 2")


def bare_publisher(pipe: Any, nbytes: int) -> None:
    """One message without copies, at each word."""
    context = zmq.Context()
    push = context.socket(zmq.PUSH)
    pipe.send(push.bind_to_random_port("tcp://127.0.0.1"))
    blob = os.urandom(1 << 20) * (nbytes >> 20)
    while True:
        pipe.recv()
        pipe.send(time.monotonic())
        push.send(blob, copy=False)


def tcp_publisher(pipe: Any, nbytes: int) -> None:
    """The same over one raw socket, with an ack."""
    import socket

    listener = socket.create_server(("127.0.0.1", 0))
    pipe.send(listener.getsockname()[1])
    peer, _ = listener.accept()
    blob, head = os.urandom(1 << 20) * (nbytes >> 20), bytearray(HEAD.size)
    while True:
        pipe.recv()
        pipe.send(time.monotonic())
        peer.sendall(blob)
        receive_into(peer, memoryview(head))


def publisher(pipe: Any, nbytes: int) -> None:
    """A TrainerServer that publishes tensors of 4 MB at each word."""
    server = TrainerServer(TrainerConfig(port_number=0, broadcast_port=0))
    server.start(threaded=True)
    pipe.send((server.config.port_number, server.config.broadcast_port))
    rng, params, left = np.random.default_rng(0), {}, nbytes
    while left:
        size = min(left, TENSOR_BYTES)
        params[f"layer{len(params)}"] = rng.integers(0, 2**31, size // 4, np.int32).view(np.float32)
        left -= size
    while True:
        pipe.recv()
        pipe.send(time.monotonic())
        server.publish_network(params, copy=False)
