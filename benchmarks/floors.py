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
