"""The barest ways to do the same: bare pyzmq without copies, write + fdatasync. `Peer` is a process of its own."""

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq


class Peer:
    """A process that runs `target(connection, *args)`; it sends its port first, and ends with this object."""

    def __init__(self, target: Callable[..., None], *args: Any):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=target, args=(theirs, *args), daemon=True)
        self.process.start()
        theirs.close()
        self.port: Any = self.pipe.recv()

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def zmq_sink(pipe: Any, reply: list[bytes] | None = None, host: str = "127.0.0.1") -> None:
    """Take multipart messages, answer each with an ack (or with `reply`)."""
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    pipe.send(router.bind_to_random_port(f"tcp://{host}"))
    while True:
        parts = router.recv_multipart(copy=False)
        router.send_multipart([parts[0], *(reply or [b"ack"])], copy=reply is None)


def zmq_journal(pipe: Any, path: str) -> None:
    """Take messages, append whatever has come to a file, fdatasync it, then answer each with an ack."""
    router = zmq.Context().socket(zmq.ROUTER)
    pipe.send(router.bind_to_random_port("tcp://127.0.0.1"))
    file = os.open(path, os.O_CREAT | os.O_WRONLY, 0o644)
    while True:
        senders = []
        while router.poll(0 if senders else None):
            sender, message = router.recv_multipart(copy=False)
            os.write(file, message.buffer)
            senders.append(sender)
        os.fdatasync(file)
        if os.lseek(file, 0, os.SEEK_CUR) > 1 << 28:  # as long as a segment; the floor keeps none of them
            os.lseek(file, 0, os.SEEK_SET)
        for sender in senders:
            router.send_multipart([sender, b"ack"], copy=False)


def zmq_senders(pipe: Any, port: int, count: int, message_bytes: int, seconds: float) -> None:
    """`count` sockets that keep two messages on their way each; sends the number of messages that were answered."""
    context, poller = zmq.Context(), zmq.Poller()
    message = os.urandom(message_bytes)
    sockets = [context.socket(zmq.DEALER) for _ in range(count)]
    for socket in sockets:
        socket.connect(f"tcp://127.0.0.1:{port}")
        poller.register(socket, zmq.POLLIN)
    pipe.send("ready")
    pipe.recv()
    end, answered = time.monotonic() + seconds, 0
    for socket in sockets:
        socket.send(message, copy=False)
        socket.send(message, copy=False)
    while time.monotonic() < end:
        for socket, _ in poller.poll(100):
            socket.recv()
            answered += 1
            socket.send(message, copy=False)
    pipe.send(answered)


def fdatasync_rate(folder: Path, message_bytes: int, seconds: float, group: int) -> float:
    """Messages/s that a log can take when `group` messages are written and synced at a time."""
    path = folder / "fdatasync.floor"
    block = os.urandom(message_bytes * group)
    file = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
    try:
        groups, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds or not groups:
            os.write(file, block)
            os.fdatasync(file)
            groups += 1
        return groups * group / (time.perf_counter() - start)
    finally:
        os.close(file)
        path.unlink()
