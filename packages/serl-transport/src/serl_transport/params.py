"""The newest parameters as one blob, handed out in chunks: announce, then pull.

    server: offer = Offer.of_frames(version, frames) | read_chunk(offer, payload)      client: pull(ask) ─▶ Published

A server answers `params` requests from it; a late joiner pulls the newest, and nothing depends on having heard the
announcement. The client keeps WINDOW chunks on their way. Each chunk carries the message's checksum; the whole has a
SHA-256 where its publisher knows one. On the learner's own host the client maps the published file instead.
"""

import hashlib
import mmap
import os
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from serl_transport.codec import join_parts
from serl_transport.errors import BadFrame, NotReady, Refused

CHUNK_BYTES = 4 << 20
WINDOW = 6
REPLY_S = 30.0


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
    blob: bytes | memoryview  # `codec.join(codec.pack({"params": ...}))`, or a safetensors file
    sha256: str | None  # of the blob; None: its publisher gave none

    @classmethod
    def of(cls, version: int, blob: bytes) -> "Published":
        """Hash and hold a blob."""
        return cls(version, blob, hashlib.sha256(blob).hexdigest())


@dataclass(frozen=True, slots=True)
class Offer:
    """One version as a server holds it: chunks that are sent as they lie, without a copy."""

    version: int
    chunks: Sequence[Any]  # flat buffers, together the blob
    offsets: Sequence[int]  # of each chunk in the blob
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
    def of_chunks(cls, version: int, chunks: Sequence[Any], sha256: str | None) -> "Offer":
        """Flat buffers as they are to be sent."""
        offsets, total = [], 0
        for chunk in chunks:
            offsets.append(total)
            total += len(chunk)
        return cls(version, chunks, offsets, total, sha256)


def read_chunk(offer: Offer | None, payload: dict[str, Any]) -> dict[str, Any]:
    """Answer one `params` request `{version | null, offset}`; the first reply lists where the chunks begin.

    With `where` the reply describes the version and carries no data.
    """
    if offer is None:
        raise NotReady("no parameters have been published yet")
    version, offset = payload.get("version"), payload.get("offset", 0)
    if version is not None and version != offer.version:
        raise Refused(f"version {version!r} is not held, the newest is {offer.version}")
    if payload.get("where"):
        return {"version": offer.version, "total_bytes": offer.total_bytes, "sha256": offer.sha256}
    if type(offset) is not int or not 0 <= offset <= offer.total_bytes:
        raise BadFrame(f"offset: expected 0..{offer.total_bytes}, got {offset!r}")
    number = int(np.searchsorted(offer.offsets, offset, side="right")) - 1
    data = memoryview(offer.chunks[number])[offset - offer.offsets[number] :] if offer.chunks else b""
    reply = {
        "version": offer.version,
        "total_bytes": offer.total_bytes,
        "sha256": offer.sha256,
        "offset": offset,
        "data": np.frombuffer(data, np.uint8) if len(data) else np.empty(0, np.uint8),
    }
    return reply if offset else reply | {"offsets": np.array(offer.offsets, np.int64)}


def pull(
    ask: Ask,
    version: int | None = None,
    *,
    same_host: bool = False,
    announced: dict[str, Any] | None = None,
    into: Any = None,
) -> Published:
    """Fetch a whole blob; BadFrame when the pieces do not add up to what was announced.

    `ask(payload)` gives the reply on its way. `same_host`: a file that the reply (or the announcement, which is the
    same without asking) names may be mapped instead, or be read `into` a buffer of the caller's.
    """
    if same_host:
        for told in ([announced] if announced else []) + [None]:
            told = told or ask({"version": version, "where": True}).result(REPLY_S)
            blob = _from_file(told, into)
            if blob is not None:
                return Published(told["version"], blob, told["sha256"])
    first = ask({"version": version, "offset": 0}).result(REPLY_S)
    buffer = np.empty(first["total_bytes"], np.uint8) if into is None else _room(into, first["total_bytes"])
    with _Hasher(first["sha256"]) as hasher:
        _fill(buffer, first, ask, hasher)
    if not hasher.matches:
        raise BadFrame(f"parameters: version {first['version']} does not match its sha256")
    return Published(first["version"], buffer.data, first["sha256"])


def _room(into: Any, total: int) -> np.ndarray:
    """The first `total` bytes of the caller's buffer."""
    buffer = np.frombuffer(into, np.uint8)
    if len(buffer) < total or not buffer.flags.writeable:
        raise ValueError(f"into: expected a writable buffer of {total} bytes, got {len(buffer)}")
    return buffer[:total]


def _fill(buffer: np.ndarray, first: dict[str, Any], ask: Ask, hasher: "_Hasher") -> None:
    """Copy every chunk to its place, in order, with WINDOW requests on their way."""
    version, total = first["version"], len(buffer)
    waiting = _starts(first, total)[:0:-1]  # last first, without the one that is here
    flying: list[Reply] = []
    reply, end = first, 0
    while True:
        data = reply["data"]
        if reply["version"] != version or reply["offset"] != end or end + len(data) > total:
            raise BadFrame(f"parameters: expected version {version} at {end}, got {reply['version']}")
        buffer[end : end + len(data)] = data
        hasher.feed(buffer[end : end + len(data)])
        end += len(data)
        while waiting and len(flying) < WINDOW:
            flying.append(ask({"version": version, "offset": waiting.pop()}))
        if not flying:
            break
        reply = flying.pop(0).result(REPLY_S)
    if end != total:
        raise BadFrame(f"parameters: version {version} ends at {end} of {total} bytes")


def _starts(first: dict[str, Any], total: int) -> list[int]:
    listed = first.get("offsets")
    if listed is not None:
        return [int(offset) for offset in listed] or [0]
    return list(range(0, max(total, 1), max(len(first["data"]), 1)))


class _Hasher:
    """SHA-256 on a thread of its own, so that hashing and receiving use two cores; does nothing without a goal."""

    def __init__(self, goal: str | None):
        self._goal, self._digest = goal, hashlib.sha256()
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


def _from_file(told: dict[str, Any], into: Any) -> memoryview | None:
    """The published file itself, when it is reachable from here and the very one that the learner means.

    Mapped without a copy, or copied once by the kernel `into` a buffer: memory that was touched before takes a copy in
    half the time that the page faults of a fresh mapping cost.
    """
    where, total = told.get("file"), told.get("total_bytes")
    try:
        file = os.open(where["path"], os.O_RDONLY | os.O_CLOEXEC)  # type: ignore[index]
    except (TypeError, KeyError, ValueError, OSError):
        return None
    try:
        stat = os.fstat(file)
        if (stat.st_dev, stat.st_ino, stat.st_size) != (where.get("dev"), where.get("ino"), total) or not total:
            return None
        if into is None:
            return memoryview(mmap.mmap(file, total, prot=mmap.PROT_READ))
        room = _room(into, total).data
        end = 0
        while end < total and (got := os.preadv(file, [room[end:]], end)):
            end += got
        return room if end == total else None
    finally:
        os.close(file)


def _chunks(parts: Sequence[Any]) -> list[Any]:
    """Large buffers cut into views of CHUNK_BYTES, small neighbours joined into one."""
    result: list[Any] = []
    small: list[Any] = []
    size = 0
    for part in parts:
        view = memoryview(part)
        if len(view) < CHUNK_BYTES // 4 and size + len(view) <= CHUNK_BYTES:
            small.append(view)
            size += len(view)
            continue
        if small:
            result.append(b"".join(small))
        small, size = [], 0
        result += [view[at : at + CHUNK_BYTES] for at in range(0, len(view), CHUNK_BYTES)]
    return [*result, b"".join(small)] if small else result
