"""The barest ways to move bytes: bare pyzmq multipart without copies, raw TCP with an ack, memcpy, write + fdatasync.

Each peer is a process of its own, as in use. `Peer` starts one; the senders keep the same window of unacknowledged
bytes as the transport under test.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import zmq

HEAD = struct.Struct("<Q")


class Peer:
    """A process that runs `target(connection, *args)`; it sends its port first, and ends with this object."""

    def __init__(self, target: Callable[..., None], *args: Any):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=target, args=(theirs, *args), daemon=True)
        self.process.start()
        theirs.close()
        self.port: Any = self.pipe.recv()

    def __enter__(self) -> Peer:
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


def zmq_rate(port: int, messages: Sequence[Sequence[Any]], seconds: float, window: int) -> float:
    """Acknowledged messages/s; `messages` are sent round and round, at most `window` unacknowledged."""
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.connect(f"tcp://127.0.0.1:{port}")
    sent = acknowledged = 0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        while sent - acknowledged < window:
            dealer.send_multipart(messages[sent % len(messages)], copy=False)
            sent += 1
        dealer.recv_multipart()
        acknowledged += 1
    while acknowledged < sent:
        dealer.recv_multipart()
        acknowledged += 1
    rate = acknowledged / (time.perf_counter() - start)
    context.destroy(linger=0)
    return rate


def tcp_sink(pipe: Any) -> None:
    """Take length-prefixed messages into one buffer, answer each with a byte."""
    listener = socket.create_server(("127.0.0.1", 0))
    buffer = bytearray(256 << 20)
    pipe.send(listener.getsockname()[1])
    while True:
        peer, _ = listener.accept()
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        head = bytearray(HEAD.size)
        while receive_into(peer, memoryview(head)):
            (size,) = HEAD.unpack(head)
            receive_into(peer, memoryview(buffer)[:size])
            peer.sendall(b"k")
        peer.close()


def receive_into(peer: socket.socket, view: memoryview) -> bool:
    """Fill `view`; False at the end of the stream."""
    while view:
        got = peer.recv_into(view)
        if not got:
            return False
        view = view[got:]
    return True


def tcp_rate(port: int, messages: Sequence[Sequence[Any]], seconds: float, window: int) -> float:
    """Acknowledged messages/s over one raw socket."""
    peer = socket.create_connection(("127.0.0.1", port))
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sizes = [sum(memoryview(frame).nbytes for frame in message) for message in messages]
    sent = acknowledged = 0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        while sent - acknowledged < window:
            i = sent % len(messages)
            peer.sendall(HEAD.pack(sizes[i]))
            for frame in messages[i]:
                peer.sendall(frame)
            sent += 1
        acknowledged += len(peer.recv(4096))
    while acknowledged < sent:
        acknowledged += len(peer.recv(4096))
    rate = acknowledged / (time.perf_counter() - start)
    peer.close()
    return rate


def memcpy_seconds(nbytes: int, rest_s: float = 0.0) -> float:
    """One copy of `nbytes` within memory that has been touched before; `rest_s` ago, so that caches have moved on."""
    source = os.urandom(1 << 20) * (nbytes >> 20)  # zeros would all lie in one page
    target = bytearray(nbytes)
    memoryview(target)[:] = source
    time.sleep(rest_s)
    start = time.perf_counter()
    memoryview(target)[:] = source
    return time.perf_counter() - start


def fdatasync_rate(folder: Path, message_bytes: int, seconds: float, group: int) -> float:
    """Messages/s that a log can take when `group` messages are written and synced at a time."""
    path = folder / "fdatasync.floor"
    block = os.urandom(min(message_bytes * group, 1 << 20)) * (message_bytes * group // (1 << 20) + 1)
    block = block[: message_bytes * group]
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
