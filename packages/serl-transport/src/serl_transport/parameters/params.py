"""The newest parameters as one blob, handed out in chunks: announce, then pull.

    server: offer = Offer.of_frames(version, frames) | read_chunk(offer, payload)      client: pull(ask) ─▶ Published

A server answers `params` requests from it; a late joiner pulls the newest, and nothing depends on having heard the
announcement. The client asks for the first WINDOW chunks at once and keeps as many on their way. Each chunk carries the
message's checksum; the whole has a SHA-256 where its publisher knows one. On the learner's own host the client maps the
published file instead. Memory of a version that nobody holds any more takes the next one (`SpareMemory`).
"""

import hashlib
import itertools
import mmap
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from serl_transport.contract.errors import BadFrame, NotReady, Refused
from serl_transport.params_file import from_file, room_in
from serl_transport.pieces import split_pieces
from serl_transport.wire.blob import join_parts, split
from serl_transport.wire.codec import Frames

CHUNK_BYTES = 8 << 20  # each costs both sides a message's work: 10 MB are two
SMALL_BYTES = 64 << 10  # smaller neighbours are copied together
WINDOW = 4
SCATTERED_BYTES = 32 << 20  # a larger version would take its memory anew from the system each time
REPLY_S = 30.0
TRIES = 3  # a newer version may replace the newest while it is being pulled


class Reply(Protocol):
    """A reply on its way."""

    def result(self, timeout_s: float) -> dict[str, Any]:
        """Wait for it; raises its typed error, or ServerSilent."""
        ...


Ask = Callable[[dict[str, Any]], Reply]


@dataclass(frozen=True, slots=True)
class Published:
    """One version of the parameters, as a client gets it."""

    version: int  # 1, 2, 3 ...
    blob: bytes | memoryview  # `blob.join(codec.pack({"params": ...}))`, or a safetensors file
    sha256: str | None  # of the blob; None: its publisher gave none
    chunks: int = field(default=0, compare=False)  # in which it came over the wire; 0: it did not

    @classmethod
    def of(cls, version: int, blob: bytes) -> "Published":
        """Hash and hold a blob."""
        return cls(version, blob, hashlib.sha256(blob).hexdigest())


@dataclass(frozen=True, slots=True)
class Pieces:
    """One version as frames, which a client that unpacks it anyway gets without putting a blob together."""

    version: int  # 1, 2, 3 ...
    frames: Frames  # of `codec.pack({"params": ...})`
    chunks: int  # in which it came over the wire; 0: it did not


@dataclass(frozen=True, slots=True)
class Offer:
    """One version as a server holds it: chunks that are sent as they lie, without a copy."""

    version: int
    chunks: Sequence[Sequence[Any]]  # of flat buffers, together the blob
    offsets: Sequence[int]  # of each chunk in the blob, and of its end
    total_bytes: int
    sha256: str | None  # of the blob

    @classmethod
    def of_frames(cls, version: int, frames: Sequence[Any]) -> "Offer":
        """The blob `join(frames)`, in the frames' own memory: they must not change any more."""
        return cls.of_chunks(version, _chunks(join_parts(frames)), None)

    @classmethod
    def of(cls, published: Published) -> "Offer":
        """A blob in one piece."""
        return cls.of_chunks(published.version, _chunks([published.blob]), published.sha256)

    @classmethod
    def of_chunks(cls, version: int, chunks: Sequence[Sequence[Any]], sha256: str | None) -> "Offer":
        """Chunks of flat buffers, as they are to be sent."""
        offsets, total = [], 0
        for chunk in chunks:
            offsets.append(total)
            total += sum(map(len, chunk))
        return cls(version, chunks, [*offsets, total], total, sha256)


def read_chunk(offer: Offer | None, payload: dict[str, Any]) -> dict[str, Any]:
    """Answer one `params` request `{version | null, number}`: that chunk; behind the last one a reply without data.

    With `where` the reply describes the version and carries no data.
    """
    if offer is None:
        raise NotReady("no parameters have been published yet")
    version, number = payload.get("version"), payload.get("number", 0)
    if version is not None and version != offer.version:
        raise Refused(f"version {version!r} is not held, the newest is {offer.version}")
    told = {
        "version": offer.version,
        "total_bytes": offer.total_bytes,
        "sha256": offer.sha256,
        "chunks": len(offer.chunks),
    }
    if payload.get("where"):
        return told
    if type(number) is not int or not 0 <= number < 1 << 32:
        raise BadFrame(f"number: expected that of a chunk, from 0, got {number!r}")
    number = min(number, len(offer.chunks))
    data = offer.chunks[number] if number < len(offer.chunks) else ()
    return told | {
        "offset": offer.offsets[number],
        "data": [np.frombuffer(part, np.uint8) for part in data],
    }


class SpareMemory:
    """Holds the memory of one version that nobody looks at any more, for the next version of the same size.

    Fresh memory costs a page fault per page, which for parameters takes as long as receiving them.
    """

    def __init__(self) -> None:
        self._free: deque[mmap.mmap] = deque(maxlen=1)  # at most one: its methods are atomic, the finalizer's too

    def take(self, total: int) -> np.ndarray:
        """uint8[total]; it comes back by itself once neither it nor a view of it is referenced."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = None
        if memory is None or len(memory) != total:
            memory = mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                memory.madvise(mmap.MADV_HUGEPAGE)
        lent = np.frombuffer(memory, np.uint8)  # views of it refer to it, not to the mmap: numpy keeps the first array
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return lent


class _SupersededError(Exception):
    """The newest version was replaced between two chunks."""


def pull(
    ask: Ask,
    version: int | None = None,
    *,
    same_host: bool = False,
    announced: dict[str, Any] | None = None,
    into: Any = None,
    spare: SpareMemory | None = None,
    ahead: Sequence[Reply] = (),
) -> Published:
    """Fetch a whole blob; BadFrame when the pieces do not add up to what was announced.

    `ask(payload)` gives the reply on its way. `same_host`: a file that the reply (or the announcement, which is the
    same without asking) names may be mapped instead, or be read `into` a buffer of the caller's. Without `into` memory
    comes from `spare`. `ahead`: replies of the first chunks, in order, which were asked for before.
    """
    place = _Whole(into, spare or SpareMemory())
    found = _pull(ask, version, place, same_host, announced, into, ahead)
    return (
        found
        if isinstance(found, Published)
        else Published(found["version"], place.buffer.data, found["sha256"], found["chunks"])
    )


def pull_pieces(
    ask: Ask,
    *,
    same_host: bool = False,
    announced: dict[str, Any] | None = None,
    spare: SpareMemory | None = None,
    ahead: Sequence[Reply] = (),
) -> Pieces:
    """Fetch the newest version for somebody who unpacks it; the same checks as `pull`."""
    place = _Parts(spare or SpareMemory())
    found = _pull(ask, None, place, same_host, announced, None, ahead)
    if isinstance(found, Published):
        return Pieces(found.version, list(split(found.blob)), 0)
    return Pieces(found["version"], split_pieces(place.parts), found["chunks"])


def _pull(
    ask: Ask,
    version: int | None,
    place: "_Whole",
    same_host: bool,
    announced: dict[str, Any] | None,
    into: Any,
    ahead: Sequence[Reply],
) -> Published | dict[str, Any]:
    """The published file, or what the first chunk's reply said of the version that lies in `place` now."""
    expected = (announced or {}).get("chunks")
    if same_host and not ahead and not (announced and announced.get("file") is None):
        for told in ([announced] if announced else []) + [None]:
            told = told or ask({"version": version, "where": True}).result(REPLY_S)
            blob = from_file(told, into)
            if blob is not None:
                return Published(told["version"], blob, told["sha256"])
            expected = told.get("chunks")
    for _ in range(TRIES):
        try:
            return _receive(ask, version, place, expected, ahead)
        except _SupersededError:
            ahead = ()
    raise Refused(f"newer parameters replaced those that were being pulled, {TRIES} times in a row; ask again")


class _Whole:
    """Puts chunks into one buffer: the caller's, or memory of our own."""

    def __init__(self, into: Any, spare: SpareMemory):
        self._into, self._spare = into, spare
        self.buffer = np.empty(0, np.uint8)

    def begin(self, total: int) -> None:
        """A version of so many bytes comes; ValueError when the caller's buffer has not got the size."""
        if self._into is not None:
            self.buffer = room_in(self._into, total)
        else:
            self.buffer = self._spare.take(total) if total else np.empty(0, np.uint8)

    def put(self, end: int, data: np.ndarray) -> np.ndarray:
        """The chunk behind the `end` of those before it, where it lies from now on."""
        room = self.buffer[end : end + len(data)]
        room[:] = data
        return room


class _Parts(_Whole):
    """Leaves the chunks of a small version where they arrived; a large one goes into memory that is used again."""

    def __init__(self, spare: SpareMemory):
        super().__init__(None, spare)
        self.parts: list[np.ndarray] = []
        self._scattered = False

    def begin(self, total: int) -> None:
        """A version of so many bytes comes."""
        self._scattered = total <= SCATTERED_BYTES
        self.parts = []
        if not self._scattered:
            super().begin(total)
            self.parts = [self.buffer]

    def put(self, end: int, data: np.ndarray) -> np.ndarray:
        """The chunk behind the `end` of those before it, where it lies from now on."""
        if not self._scattered:
            return super().put(end, data)
        self.parts.append(data)
        return data


def _receive(ask: Ask, version: int | None, place: _Whole, expected: Any, ahead: Sequence[Reply]) -> dict[str, Any]:
    """Ask for WINDOW chunks, or as many as are `expected`, before anything is heard, then keep WINDOW on their way."""
    asked = len(ahead) or (max(1, min(WINDOW, expected)) if type(expected) is int else WINDOW)
    flying = deque(ahead or (ask({"version": version, "number": number}) for number in range(asked)))
    first = flying.popleft().result(REPLY_S)
    total, reply, end = first["total_bytes"], first, 0
    place.begin(total)
    with _Hasher(first["sha256"]) as hasher:
        for number in range(first["chunks"]):
            if number:
                reply = _reply_of(flying.popleft(), version, first)
            while asked < first["chunks"] and len(flying) < WINDOW:
                flying.append(ask({"version": first["version"], "number": asked}))
                asked += 1
            after = end + sum(map(len, reply["data"]))
            if reply["version"] != first["version"] or reply["offset"] != end or after > total:
                raise BadFrame(f"parameters: expected version {first['version']} at {end}, got {reply['version']}")
            for data in reply["data"]:
                hasher.feed(place.put(end, data))
                end += len(data)
    if end != total:
        raise BadFrame(f"parameters: version {first['version']} ends at {end} of {total} bytes")
    if not hasher.matches:
        raise BadFrame(f"parameters: version {first['version']} does not match its sha256")
    return first


def _reply_of(answer: Reply, wanted: int | None, first: dict[str, Any]) -> dict[str, Any]:
    """The next chunk. _SupersededError when the newest was wanted and is another one by now."""
    try:
        reply = answer.result(REPLY_S)
    except Refused:
        if wanted is None:
            raise _SupersededError from None
        raise
    if wanted is None and reply["version"] != first["version"]:
        raise _SupersededError
    return reply


class _Hasher:
    """SHA-256 on a thread of its own, so that hashing and receiving use two cores; does nothing without a goal."""

    def __init__(self, goal: str | None):
        self._goal = goal
        if goal is not None:
            self._digest = hashlib.sha256()
            self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
            self._thread = threading.Thread(target=self._run, name="trainer-client-sha256", daemon=True)

    def __enter__(self) -> "_Hasher":
        if self._goal is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._goal is not None:
            self._queue.put(None)
            self._thread.join()

    def feed(self, part: Any) -> None:
        """The next bytes of the blob."""
        if self._goal is not None:
            self._queue.put(part)

    @property
    def matches(self) -> bool:
        """After the last part: is it the blob that was announced?"""
        return self._goal is None or self._digest.hexdigest() == self._goal

    def _run(self) -> None:
        while (part := self._queue.get()) is not None:
            self._digest.update(part)


def _chunks(parts: Sequence[Any]) -> list[list[Any]]:
    """The buffers' bytes in chunks of at most CHUNK_BYTES, cut within buffers that are larger only."""
    result: list[list[Any]] = []
    room = 0
    for part in parts:
        rest = memoryview(part)
        while len(rest):
            if not room or room < len(rest) <= CHUNK_BYTES:
                result.append([])
                room = CHUNK_BYTES
            result[-1].append(rest[:room])
            rest, room = rest[room:], room - min(room, len(rest))
    return [_without_small(chunk) for chunk in result]


def _without_small(chunk: list[Any]) -> list[Any]:
    """The same bytes, small neighbours copied together."""
    runs = itertools.groupby(chunk, lambda view: len(view) < SMALL_BYTES)
    return list(itertools.chain.from_iterable([b"".join(views)] if small else list(views) for small, views in runs))
