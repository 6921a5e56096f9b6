"""Parameters from publish to applied, over the wire: publish_network ─▶ announce ─▶ chunks ─▶ checked ─▶ callback.

100 and 500 MB, against one bare pyzmq message without copies. Publisher and receiver are two processes; the clock is
CLOCK_MONOTONIC, which they share.
"""

import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import zmq
from floors import Peer
from rows import Row, alternate

from serl_transport import TrainerClient, TrainerConfig, TrainerServer

TENSOR_BYTES = 4 << 20
REST_S = 0.05  # before each measurement: a learner publishes every few seconds, to an idle receiver


def rows(quick: bool) -> Iterator[Row]:
    """Every figure of the suite."""
    for megabytes in (10,) if quick else (100, 500):
        yield from over_the_wire(megabytes << 20, f"{megabytes}MB", 2 if quick else 5)


def over_the_wire(nbytes: int, name: str, rounds: int) -> Iterator[Row]:
    """Seconds from the call of publish_network to the client's callback."""
    with Peer(bare_publisher, nbytes) as bare, Peer(publisher, nbytes) as ours:
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

        found = alternate({"bare": bare_push, "ours": push}, rounds)
        client.stop()
        context.destroy(linger=0)
    yield Row.of(f"params/wire/{name}", found["ours"], "s", found["bare"], "<= 2")


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
        server.publish_network(params)
