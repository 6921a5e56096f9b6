"""An actor's line to a gateway on its own host: questions as datagrams of a Unix socket, their images in shared memory.

    hello over TCP (with this machine's id) ─▶ offer {name, token}
    AskLine: [token] ─▶ gateway ─▶ [slots, bytes of a slot] and the memory's file descriptor
             [request id, slot, note] ─▶ gateway ─▶ [request id, error, answer]

The memory is the gateway's: of fixed size, sealed, so that neither end can make the other's access to it fail. The note
of a message says where its frames are: `[header, [start, size], …]`; the header, which says how arrays are shaped,
never lies in shared memory. The asker asks here while it can, else over TCP; the gateway's end is its `ActorLines`.
"""

import contextlib
import logging
import math
import mmap
import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack

from serl_transport.contract.errors import BadFrame
from serl_transport.wire.codec import Frames, buffer_of, nbytes
from serl_transport.wire.packer import packb

log = logging.getLogger(__name__)

MOST_BYTES = 64 << 10  # of a datagram
LABEL_BYTES = 4 << 10  # for what an answer has beside its frames
TOKEN_BYTES = 16
SLOTS = 2  # the second is for the question after one whose asker could not wait for its answer
MOST_SLOT_BYTES = 1 << 30
_ALIGNED = 64
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


def machine_id() -> str:
    """The same for all processes of one running kernel, and for no others; empty where that cannot be known."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """(pid, uid) of the process that made the other end of a Unix socket."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return _CREDENTIALS.unpack(raw)[:2]


def receive_datagram(connection: socket.socket, buffer: memoryview, flags: int = 0) -> memoryview | None:
    """The next datagram, a part of `buffer`; None when none is there. EOFError when the other end has gone."""
    try:
        size = connection.recv_into(buffer, 0, flags)
    except BlockingIOError:
        return None
    except OSError:
        size = 0
    if not size:
        raise EOFError
    return buffer[:size]


def place(frames: Frames, memory: memoryview, start: int, room: int) -> list[Any] | None:
    """Copy all frames but the header into `memory`; the note that says where, None when they do not fit into `room`."""
    sizes = list(map(nbytes, frames))
    if sum(sizes[1:]) + _ALIGNED * len(sizes) > room:
        return None
    note: list[Any] = [bytes(frames[0])]
    for frame, size in zip(frames[1:], sizes[1:], strict=True):
        memory[start : start + size] = buffer_of(frame)
        note.append((start, size))
        start += size + -size % _ALIGNED
    return note


def check_note(note: Any, start: int, room: int) -> list[int]:
    """Sizes of the frames that a note names. BadFrame unless all lie in the `room` bytes from `start`."""
    if type(note) is not list or not note or type(note[0]) is not bytes:
        raise BadFrame("a note is [header, [start, size], …]")
    sizes = [len(note[0])]
    for entry in note[1:]:
        if type(entry) is not list or len(entry) != 2 or type(entry[0]) is not int or type(entry[1]) is not int:
            raise BadFrame("a note names each frame as [start, size]")
        at, size = entry
        if size < 0 or at < start or at + size > start + room:
            raise BadFrame(f"a note names bytes {at} to {at + size}; its slot has {start} to {start + room}")
        sizes.append(size)
    return sizes


@dataclass(frozen=True, slots=True)
class LineReply:
    """What came over a line for one question."""

    request_id: int  # of the question
    error: tuple[str, str] | None  # (code, message)
    frames: Frames | None  # the answer's; None with an error, and for an answer too large for the line


class AskLine:
    """The asker's end. Not thread-safe: the asker's lock guards it."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._buffer = memoryview(bytearray(MOST_BYTES + 1))
        self._memory: memoryview | None = None  # None: the gateway has not sent it yet
        self._slot_bytes = 0
        self._free: list[int] = []
        self._taken: dict[int, int] = {}  # request id -> slot
        self._wait_ms = 0  # the socket's SO_RCVTIMEO, as it was last set
        self.answered = False  # whether it ever served

    @classmethod
    def connect(cls, offer: Any) -> "AskLine | None":
        """By what the gateway's reply to a hello offers, without waiting; None where that is not to be had."""
        try:
            name, token = offer["name"], offer["token"]
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except (TypeError, KeyError, OSError, AttributeError):  # nothing offered, or no such sockets here
            return None
        try:
            connection.setblocking(False)
            connection.connect(b"\0" + name)
            # Whoever took that name after the gateway's end must not see a picture.
            if peer_of(connection)[1] != os.getuid():
                raise PermissionError
            connection.send(token)
        except (OSError, TypeError):
            connection.close()
            return None
        return cls(connection)

    @property
    def ready(self) -> bool:
        """Whether questions can be sent. EOFError when the gateway has hung up."""
        return self._memory is not None or self._welcomed()

    def send(self, request_id: int, frames: Frames) -> bool:
        """Ask; False when it does not fit, or earlier questions wait still. EOFError when the gateway has hung up."""
        while not self._free and self._receive(socket.MSG_DONTWAIT):
            pass
        if not self._free or self._memory is None:
            return False
        slot = self._free[-1]
        note = place(frames, self._memory, slot * self._slot_bytes, self._slot_bytes)
        if note is None:
            return False
        message = packb((request_id, slot, packb(note)))
        if len(message) > MOST_BYTES:
            return False
        try:
            self._socket.send(message, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            raise EOFError from None
        self._taken[request_id] = self._free.pop()
        return True

    def receive(self, seconds: float) -> LineReply | None:
        """The next answer, or None after `seconds`. EOFError when the gateway has hung up, or talks nonsense."""
        self._wait_at_most(seconds)
        return self._receive(0)

    def close(self) -> None:
        """Hang up."""
        self._socket.close()
        self._memory = None

    def _welcomed(self) -> bool:
        try:
            data, fds, _, _ = socket.recv_fds(self._socket, 256, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return False
        except OSError:
            raise EOFError from None
        try:
            slots, slot_bytes = msgpack.unpackb(data)
            if not (0 < slots <= SLOTS and 0 < slot_bytes <= MOST_SLOT_BYTES):
                raise ValueError
            # Present at once: the first questions are not to pay for page faults.
            populated = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
            self._memory = memoryview(mmap.mmap(fds[0], slots * slot_bytes, populated))
        except Exception:  # msgpack raises a zoo of types; whatever it is, there is no line
            raise EOFError from None
        finally:
            for fd in fds:
                os.close(fd)
        self._slot_bytes, self._free = slot_bytes, list(range(slots))
        self._socket.setblocking(True)
        return True

    def _receive(self, flags: int) -> LineReply | None:
        message = receive_datagram(self._socket, self._buffer, flags)
        if message is None:
            return None
        try:
            return self._read(message)
        except Exception as problem:  # msgpack raises a zoo of types
            log.error("an answer on this host's line is [request id, error, note, frames]: %r", problem)
            raise EOFError from None

    def _read(self, message: memoryview) -> LineReply:
        request_id, error, note, frames = msgpack.unpackb(message)
        slot = self._taken.pop(request_id)
        self._free.append(slot)
        self.answered = True
        if note is not None and self._memory is not None:
            check_note(note, slot * self._slot_bytes, self._slot_bytes)
            # The slot's next question would overwrite the answer.
            frames = [note[0], *(bytes(self._memory[at : at + size]) for at, size in note[1:])]
        return LineReply(request_id, None if error is None else (str(error[0]), str(error[1])), frames)

    def _wait_at_most(self, seconds: float) -> None:
        wait_ms = max(1, math.ceil(seconds * 1e3))
        if wait_ms != self._wait_ms:
            timeout = struct.pack("@ll", wait_ms // 1000, wait_ms % 1000 * 1000)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
            self._wait_ms = wait_ms


def answer_message(request_id: int, error: Sequence[str] | None, note: Any, frames: Frames | None) -> bytes:
    """An answer's datagram: an error, the frames themselves, a note of where they lie, or none of it (too large)."""
    return packb((request_id, error, note, frames))
