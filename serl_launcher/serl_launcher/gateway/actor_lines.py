"""The gateway's end of the lines to actors on its own host: their questions come as datagrams, images in shared memory.

    hello of an asker ─▶ offer(peer) ─▶ {name, token}                      one token, one connection, TOKEN_S to use it
    connect, same user ─▶ [token] ─▶ [slots, bytes of a slot] + memory     nothing is reserved before the token
    [request id, slot, note] ─▶ rights of the hello's connection ─▶ InferForwarder ─▶ [request id, error, answer]

A line stands for the TCP connection whose hello got its token: what that may not do, and an actor that another process
has replaced, is refused here too. Garbage costs the sender its line. All of it belongs to the loop's thread, and the
memory of a line goes when it does. The actor's end and the forms of the messages: serl_transport/same_host.py.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import secrets
import socket
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgpack

from serl_transport.connection.router import Peer, Reply, Router
from serl_transport.contract.errors import BadFrame, Internal, TooLarge, WireError
from serl_transport.contract.specs import TaskSpec
from serl_transport.same_host import (
    LABEL_BYTES,
    MOST_BYTES,
    SLOTS,
    TOKEN_BYTES,
    answer_message,
    check_note,
    machine_id,
    peer_of,
)
from serl_transport.wire.codec import Frames, buffer_of, nbytes
from serl_transport.wire.envelope import Envelope
from serl_transport.wire.loop import EventLoop
from serl_transport.wire.packer import packb

log = logging.getLogger("gateway")
TOKEN_S = 30.0
WAITING_S = 2.0  # a connection that has not shown its token by then is closed
MOST_WAITING = 64
MOST_TOKENS = 1024
MOST_LINES = 128
MOST_MEMORY = 512 << 20
LEAST_SLOT_BYTES = 1 << 20
_BURST = 16  # datagrams of one line before the others get their turn
Forward = Callable[[str, str, bytes, Callable[[bytes, Reply], None]], None]


@dataclass(slots=True)
class _Line:
    """One actor's line."""

    connection: socket.socket
    peer: Peer  # the TCP connection whose hello got the token
    memory: int  # file descriptor of its slots
    where: str  # names that memory to the policy server
    open: dict[int, int]  # slot -> request id of the question in it
    closed: bool = False


class ActorLines:
    """router: of the actors; forward(actor, where, note, answer): asks the policy server; forget(where): the
    policy server may let that memory go."""

    def __init__(
        self, router: Router, forward: Forward, forget: Callable[[str], None], spec: TaskSpec, loop: EventLoop
    ):
        self._router, self._forward, self._forget, self._loop = router, forward, forget, loop
        images = sum(3 * height * width for height, width in spec.cameras.values())
        self.slot_bytes = max(LEAST_SLOT_BYTES, images + (images >> 2)) + 0xFFFF & ~0xFFFF
        self._machine = ""
        self._tokens: OrderedDict[bytes, tuple[Peer, float]] = OrderedDict()  # -> whose, until when
        self._waiting: OrderedDict[int, tuple[socket.socket, float]] = OrderedDict()  # by fd: have not shown a token
        self._lines: dict[bytes, _Line] = {}  # by the peer's address
        self._name = b"flowserl-" + secrets.token_hex(12).encode()
        self._listener: socket.socket | None = None
        try:
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            # An abstract name: no file that a kill could leave behind.
            listener.bind(b"\0" + self._name)
        except (OSError, AttributeError) as error:
            log.warning("no lines for actors of this host (%s): they ask over TCP, which is slower", error)
            return
        self._machine, self._listener = machine_id(), listener
        listener.listen(128)
        listener.setblocking(False)
        loop.add_socket(listener.fileno(), lambda: self._accept(listener))
        loop.every(1.0, self.check)

    def offer(self, peer: Peer, machine: Any) -> dict[str, Any] | None:
        """What a hello's reply tells an asker that runs on `machine`; None when that is not this one."""
        if not self._machine or machine != self._machine:
            return None
        token = secrets.token_bytes(TOKEN_BYTES)
        self._tokens[token] = (peer, time.monotonic() + TOKEN_S)
        while len(self._tokens) > MOST_TOKENS:
            self._tokens.popitem(last=False)
        return {"name": self._name, "token": token}

    def check(self) -> None:
        """Close what waits for too long, and the lines of connections that are gone; once a second."""
        now = time.monotonic()
        for fd in [fd for fd, (_, until) in self._waiting.items() if until < now]:
            self._turn_away(fd)
        for token in [token for token, (_, until) in self._tokens.items() if until < now]:
            del self._tokens[token]
        for line in list(self._lines.values()):
            if self._router.peers.get(line.peer.address) is not line.peer:
                self._drop(line)

    def close(self) -> None:
        """Hang up, after the loop has ended."""
        for line in self._lines.values():
            line.connection.close()
            os.close(line.memory)
        for connection, _ in self._waiting.values():
            connection.close()
        self._lines.clear()
        self._waiting.clear()
        if self._listener is not None:
            self._listener.close()

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # whoever knocks keeps the loop awake until there is room
                self._loop.remove_socket(listener.fileno())
                again = partial(self._loop.add_socket, listener.fileno(), lambda: self._accept(listener))
                self._loop.call_later(1.0, again)
            return
        connection.setblocking(False)
        if peer_of(connection)[1] != os.getuid():
            connection.close()
            return
        while len(self._waiting) >= MOST_WAITING:
            self._turn_away(next(iter(self._waiting)))
        fd = connection.fileno()
        self._waiting[fd] = (connection, time.monotonic() + WAITING_S)
        self._loop.add_socket(fd, lambda: self._read_token(connection))

    def _read_token(self, connection: socket.socket) -> None:
        fd = connection.fileno()
        try:
            found = self._tokens.pop(connection.recv(TOKEN_BYTES + 1), None)
        except BlockingIOError:
            return
        except OSError:
            found = None
        peer = None if found is None else found[0]
        if peer is None or self._router.peers.get(peer.address) is not peer or not self._welcome(connection, peer):
            self._turn_away(fd)

    def _turn_away(self, fd: int) -> None:
        connection, _ = self._waiting.pop(fd)
        self._loop.remove_socket(fd)
        connection.close()

    def _welcome(self, connection: socket.socket, peer: Peer) -> bool:
        earlier = self._lines.get(peer.address)
        if earlier is not None:
            self._drop(earlier)
        total = SLOTS * self.slot_bytes
        if len(self._lines) >= min(MOST_LINES, MOST_MEMORY // total):
            return False
        try:
            memory = _reserve(total)
        except (OSError, AttributeError) as error:
            log.warning("no shared memory for %r (%s): it asks over TCP", peer.actor_id, error)
            return False
        try:
            socket.send_fds(connection, [packb((SLOTS, self.slot_bytes))], [memory])
        except OSError:
            os.close(memory)
            return False
        fd = connection.fileno()
        del self._waiting[fd]
        self._loop.remove_socket(fd)
        where = f"/proc/{os.getpid()}/fd/{memory}#{secrets.token_hex(6)}"
        line = self._lines[peer.address] = _Line(connection, peer, memory, where, {})
        log.info("%r asks on this host: over a line, its images in shared memory", peer.actor_id)
        buffer = memoryview(bytearray(MOST_BYTES + 1))
        self._loop.add_socket(fd, lambda: self._read(line, buffer))
        return True

    def _read(self, line: _Line, buffer: memoryview) -> None:
        for _ in range(_BURST):
            try:
                size = line.connection.recv_into(buffer)
                self._take(line, buffer[:size])
            except BlockingIOError:
                return
            except BadFrame as problem:
                log.error("a bad message on the line of %r: %s", line.peer.actor_id, problem.message)
                self._drop(line)
            except (OSError, EOFError):
                self._drop(line)
            if line.closed:
                return

    def _take(self, line: _Line, message: memoryview) -> None:
        """Hand one question on, or answer it with its typed error. BadFrame or EOFError cost the line."""
        if not message:
            raise EOFError
        try:
            request_id, slot, note = msgpack.unpackb(message)
        except Exception as problem:  # msgpack raises a zoo of types
            raise BadFrame(f"a question is [request id, slot, note]: {type(problem).__name__}") from None
        if type(request_id) is not int or type(slot) is not int or type(note) is not bytes:
            raise BadFrame("a question is [request id, slot, note]")
        if not 0 <= slot < SLOTS or slot in line.open:
            raise BadFrame(f"slot {slot} does not exist, or its question is not answered yet")
        line.open[slot] = request_id

        def answer(token: bytes, result: Reply) -> None:
            self._answer(line, slot, result)

        try:
            self._router.admit(line.peer, Envelope("infer", line.peer.actor_id, line.peer.boot_id, 0, request_id))
            self._check(note, slot)
            self._forward(line.peer.actor_id, line.where, note, answer)
        except WireError as error:
            self._answer(line, slot, error)
        except Exception as error:
            log.exception("a question over a line failed")
            failed = f"the learner failed on this message, see its log: {type(error).__name__}"
            self._answer(line, slot, Internal(failed))

    def _check(self, packed: bytes, slot: int) -> None:
        """The same limits as over TCP; nothing of the message reaches beyond its slot."""
        try:
            note = msgpack.unpackb(packed)
        except Exception as problem:  # the same zoo
            raise BadFrame(f"a note is not msgpack: {type(problem).__name__}") from None
        sizes = check_note(note, slot * self.slot_bytes, self.slot_bytes)
        limits = self._router.limits
        if len(sizes) > limits.frames:
            raise TooLarge(f"{len(sizes)} frames, the limit is {limits.frames}")
        if max(sizes) > limits.frame_bytes or sum(sizes) > limits.total_bytes:
            raise TooLarge(f"a message of {sum(sizes)} bytes, the limit is {limits.total_bytes}")

    def _answer(self, line: _Line, slot: int, result: Reply) -> None:
        request_id = line.open.pop(slot, None)
        if request_id is None or line.closed:
            return
        if isinstance(result, WireError):
            self._router.counters[result.code] += 1
            message = answer_message(request_id, (result.code, result.message[:1000]), None, None)
        else:
            message = self._answer_of(line, slot, request_id, result)
        try:
            line.connection.send(message)
        except OSError:  # it has gone, or does not read what it asked for
            self._drop(line)

    def _answer_of(self, line: _Line, slot: int, request_id: int, frames: Frames) -> bytes:
        sizes = list(map(nbytes, frames))
        if sum(sizes) <= MOST_BYTES - LABEL_BYTES:
            plain = [frame if type(frame) is bytes else bytes(buffer_of(frame)) for frame in frames]
            return answer_message(request_id, None, None, plain)
        if sizes[0] > MOST_BYTES - LABEL_BYTES - 16 * len(sizes) or sum(sizes[1:]) > self.slot_bytes:
            return answer_message(request_id, None, None, None)
        note: list[Any] = [bytes(buffer_of(frames[0]))]
        start = slot * self.slot_bytes
        for frame, size in zip(frames[1:], sizes[1:], strict=True):
            # The question in this slot has been answered, so nobody reads it any more.
            os.pwrite(line.memory, buffer_of(frame), start)
            note.append((start, size))
            start += size
        return answer_message(request_id, None, note, None)

    def _drop(self, line: _Line) -> None:
        if line.closed:
            return
        line.closed = True
        del self._lines[line.peer.address]
        self._loop.remove_socket(line.connection.fileno())
        line.connection.close()
        os.close(line.memory)
        self._forget(line.where)


def _reserve(size: int) -> int:
    """Shared memory of exactly `size` bytes, all of them there: nobody can shrink it under somebody who reads it."""
    memory = os.memfd_create("flowserl-line", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(memory, 0, size)
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(memory)
        raise
    return memory
