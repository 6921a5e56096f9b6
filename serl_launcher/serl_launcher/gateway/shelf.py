"""Questions' images on their way from the gateway to the policy server: through shared memory, beside the ipc socket.

    gateway: shelf.put(frames) ─▶ [32 MiB of memory in 16 slots] ─▶ policy server: ShelfReader.frames(where, note)
             shelf.free(slot) when the question is answered or given up

A Unix socket holds 200 kB: half a megabyte of images costs both processes several rounds of waking each other, this one
copy. What does not fit, or finds no free slot, goes over the socket as ever. Callers: InferForwarder, PolicyLink.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
from collections.abc import Sequence
from typing import Any

import msgpack
import numpy as np

from serl_transport.contract.errors import BadFrame, Internal
from serl_transport.wire.codec import Frames, buffer_of, nbytes

log = logging.getLogger("gateway")
SLOTS = 16
SLOT_BYTES = 2 << 20
WORTHWHILE_BYTES = 64 << 10  # less than that a socket takes in one go
MOST_MAPPED = 160  # memories that a policy server keeps mapped: the shelf's, and one for each line (ActorLines)
_ALIGNED = 64


class Shelf:
    """The gateway's end. `where` names the memory to other processes of this user; it ends with this process."""

    def __init__(self) -> None:
        self.where = ""  # empty: there is none, everything goes over the socket
        self._free = list(range(SLOTS))
        try:
            self._fd = os.memfd_create("flowserl-questions")
            # Every byte reserved: a later SIGBUS for want of memory is then impossible.
            os.posix_fallocate(self._fd, 0, SLOTS * SLOT_BYTES)
            self._memory = memoryview(mmap.mmap(self._fd, SLOTS * SLOT_BYTES))
        except (AttributeError, OSError) as error:
            log.warning("no shared memory for questions (%s): they go over the socket, which is slower", error)
            return
        self.where = f"/proc/{os.getpid()}/fd/{self._fd}#{os.urandom(6).hex()}"

    def put(self, frames: Frames) -> tuple[int, bytes] | None:
        """Copy the frames into a free slot; (slot, note for the reader), or None where that is not worth it."""
        sizes = list(map(nbytes, frames))
        if not self.where or not self._free or not WORTHWHILE_BYTES < sum(sizes) <= SLOT_BYTES - _ALIGNED * len(sizes):
            return None
        slot = self._free.pop()  # the one used last: its memory is still in the cache
        start, places = slot * SLOT_BYTES, []
        for frame, size in zip(frames, sizes, strict=True):
            self._memory[start : start + size] = buffer_of(frame)
            places.append((start, size))
            start += size + -size % _ALIGNED
        return slot, msgpack.packb(places)  # type: ignore[return-value]  (None only with autoreset off)

    def free(self, slot: int) -> None:
        """The question was answered, or its answer will be dropped: the slot may be written again."""
        self._free.append(slot)


class ShelfReader:
    """The policy server's end, of this shelf and of the slots of actors on this host (`gateway/actor_lines.py`).

    Frames are views: they hold until the question is answered.
    """

    def __init__(self) -> None:
        self._memories: dict[str, memoryview] = {}  # by where; the one used last is last

    def frames(self, where: str, notes: Sequence[Any]) -> Frames:
        """The frames of a question. BadFrame for a malformed note, Internal when the memory cannot be reached."""
        memory = self._memories.pop(where, None)
        if memory is None:
            memory = _map(where)
            if len(self._memories) >= MOST_MAPPED:
                del self._memories[next(iter(self._memories))]
        self._memories[where] = memory
        try:
            (note,) = notes
            places = msgpack.unpackb(buffer_of(note))
            frames = [place if type(place) is bytes else memory[place[0] : place[0] + place[1]] for place in places]
            whole = all(type(p) is bytes or len(f) == p[1] for f, p in zip(frames, places, strict=True))
        except Exception as error:  # msgpack raises a zoo of types
            raise BadFrame(f"a question's note is [[start, size], …]: {type(error).__name__}") from None
        if not whole:
            raise BadFrame(f"a question's note leaves the shared memory: {places!r:.200}")
        return frames

    def forget(self, where: str) -> None:
        """Let that memory go (once nobody holds a view of it)."""
        self._memories.pop(where, None)

    def clear(self) -> None:
        """Let all memory go."""
        self._memories.clear()


def settle(body: Any) -> None:
    """Copy every array but images of a body (dict or list), in place: an actor could still change what was checked.

    Another pixel does no harm; a bool that is neither 0 nor 1 makes numpy write past the end of its result.
    """
    for key, value in body.items() if type(body) is dict else enumerate(body):
        if isinstance(value, np.ndarray):
            if value.dtype == bool:
                body[key] = value.view(np.uint8) != 0
            elif value.dtype != np.uint8:
                body[key] = value.copy()
        elif type(value) is dict or type(value) is list:
            settle(value)


def _map(where: str) -> memoryview:
    with contextlib.suppress(OSError, ValueError):
        fd = os.open(where.partition("#")[0], os.O_RDONLY | os.O_CLOEXEC)
        try:
            return memoryview(mmap.mmap(fd, 0, prot=mmap.PROT_READ))
        finally:
            os.close(fd)
    raise Internal(f"the policy server cannot reach the gateway's shared memory at {where}")
