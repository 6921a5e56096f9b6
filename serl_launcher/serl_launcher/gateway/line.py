"""A direct line between gateway and policy server, for messages that fit into one datagram.

    policy server ── connect ─▶ LineDesk (gateway, by the peer's pid)        questions ─▶ ◀─ answers, one datagram each

A datagram is one msgpack list, the envelope's fields and the frames: both ends are of one release and one user, so
that the envelope's own form, made to cross networks and versions, would only cost time.

One system call sends, one receives, and only the receiver wakes up; over ZeroMQ each hop wakes two I/O threads more. A
line may be missing, full or too small for a message at any time: then it goes over the ipc socket as ever.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path

import msgpack

from serl_launcher.run.paths import internal_endpoint
from serl_transport.contract.errors import BadFrame, WireError
from serl_transport.same_host import LABEL_BYTES, MOST_BYTES, peer_of, receive_datagram
from serl_transport.wire import codec
from serl_transport.wire.envelope import Envelope
from serl_transport.wire.loop import EventLoop
from serl_transport.wire.packer import packb

log = logging.getLogger("gateway")
OnMessage = Callable[[Envelope, codec.Frames], None]


class Line:
    """One connected end; nothing here waits."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._buffer = memoryview(bytearray(MOST_BYTES + 1))

    @classmethod
    def connect(cls, run_dir: str | Path) -> Line | None:
        """To the gateway of this run folder; None when none listens."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect(_path(run_dir))
        except OSError:
            connection.close()
            return None
        return cls(connection)

    @property
    def fileno(self) -> int:
        """To poll."""
        return self._socket.fileno()

    def send(self, envelope: Envelope, frames: codec.Frames) -> bool:
        """False when the message does not fit, or nobody takes it now."""
        if sum(map(codec.nbytes, frames)) > MOST_BYTES - LABEL_BYTES:
            return False
        plain = [frame if type(frame) is bytes else bytes(codec.buffer_of(frame)) for frame in frames]
        e = envelope
        message = packb((e.kind, e.actor_id, e.seq, e.request_id, e.target, e.error, plain))
        if len(message) > MOST_BYTES:
            return False
        try:
            self._socket.send(message)
        except OSError:  # full, or the other end has gone
            return False
        return True

    def receive(self) -> tuple[Envelope, codec.Frames] | None:
        """The next message, None when there is none. EOFError when the other end has gone, WireError for nonsense."""
        message = receive_datagram(self._socket, self._buffer)
        if message is None:
            return None
        try:
            kind, actor, seq, request_id, target, error, frames = msgpack.unpackb(message)
            error = None if error is None else (str(error[0]), str(error[1]))
        except Exception as problem:  # msgpack raises a zoo of types
            raise BadFrame(f"a message of the line is a list of seven: {type(problem).__name__}") from None
        if type(frames) is not list or type(kind) is not str or type(seq) is not int:
            raise BadFrame("a message of the line is [kind, actor, seq, request id, target, error, frames]")
        return Envelope(kind, actor, "", seq, request_id, target, error), frames

    def close(self) -> None:
        """Hang up."""
        self._socket.close()


class LineDesk:
    """The gateway's end: takes connections and knows whose they are. Belongs to the loop's thread."""

    def __init__(self, run_dir: str | Path, loop: EventLoop, on_message: OnMessage) -> None:
        self._loop, self._on_message = loop, on_message
        self._lines: dict[int, Line] = {}  # by the pid of the other end
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path = _path(run_dir)
        with contextlib.suppress(FileNotFoundError):  # one gateway per run folder: what is there is a dead one's
            os.unlink(path)
        self._listener.bind(path)
        self._listener.listen()
        self._listener.setblocking(False)
        loop.add_socket(self._listener.fileno(), self._accept)

    def send(self, pid: int | None, envelope: Envelope, frames: codec.Frames) -> bool:
        """Over the line of that process; False when it has none, or it does not take the message."""
        line = self._lines.get(pid or 0)
        return line is not None and line.send(envelope, frames)

    def close(self) -> None:
        """Hang up, after the loop has ended."""
        for line in self._lines.values():
            line.close()
        self._listener.close()

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        pid, uid = peer_of(connection)
        if uid != os.getuid():
            connection.close()
            return
        if pid in self._lines:
            self._drop(pid)
        line = self._lines[pid] = Line(connection)
        self._loop.add_socket(line.fileno, lambda: self._read(pid, line))

    def _read(self, pid: int, line: Line) -> None:
        try:
            while (message := line.receive()) is not None:
                self._on_message(*message)
        except EOFError:
            self._drop(pid)
        except WireError as error:
            log.error("a bad message from process %d: %s", pid, error.message)

    def _drop(self, pid: int) -> None:
        line = self._lines.pop(pid)
        self._loop.remove_socket(line.fileno)
        line.close()


def _path(run_dir: str | Path) -> str:
    return internal_endpoint(run_dir).removeprefix("ipc://").removesuffix(".sock") + ".line"
