"""The newest parameters as one blob, handed out in chunks: announce, then pull.

    server: offer = Offer.of(version, blob) | read_chunk(offer, payload)      client: pull(ask) ─▶ ParametersBlob

A server answers `params` requests from its offer; a late joiner pulls the newest, and nothing depends on having heard
the announcement. The client keeps WINDOW chunks on their way. Each chunk carries the message's checksum; the whole has
a SHA-256 where its publisher knows one.
"""

import hashlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from serl_transport.contract.errors import BadFrame, NotReady, Refused
from serl_transport.wire.codec import Buffer

CHUNK_BYTES = 8 << 20
WINDOW = 4
REPLY_S = 30.0
TRIES = 3  # a newer version may replace the newest while it is being pulled


class Reply(Protocol):
    """A reply on its way."""

    def result(self, timeout_s: float) -> dict[str, Any]:
        """Wait for it; raises its typed error, or ServerSilent."""
        ...


Ask = Callable[[dict[str, Any]], Reply]


@dataclass(frozen=True, slots=True)
class ParametersBlob:
    """One version of the parameters, as a client gets it."""

    version: int  # 1, 2, 3 ...
    blob: bytes | memoryview  # `blob.join(codec.pack({"params": ...}))`, or a safetensors file
    sha256: str | None  # of the blob; None: its publisher gave none


@dataclass(frozen=True, slots=True)
class Offer:
    """One version as a server holds it; its memory must not change while it is held."""

    version: int
    blob: memoryview  # uint8[total_bytes]
    sha256: str | None  # of the blob

    @classmethod
    def of(cls, version: int, blob: Buffer, sha256: str | None = None) -> "Offer":
        """Hold a blob."""
        return cls(version, memoryview(blob).cast("B"), sha256)

    @property
    def chunks(self) -> int:
        """Number of chunks; an empty blob has none."""
        return -(-len(self.blob) // CHUNK_BYTES)


def read_chunk(offer: Offer | None, payload: dict[str, Any]) -> dict[str, Any]:
    """Answer one `params` request `{version | null, number}`: that chunk; behind the last one, no data.

    Raises NotReady before the first version, Refused for a version that is not held, BadFrame for a bad number.
    """
    if offer is None:
        raise NotReady("no parameters have been published yet")
    version, number = payload.get("version"), payload.get("number", 0)
    if version is not None and version != offer.version:
        raise Refused(f"version {version!r} is not held, the newest is {offer.version}")
    if type(number) is not int or not 0 <= number < 1 << 32:
        raise BadFrame(f"number: expected that of a chunk, from 0, got {number!r}")
    start = number * CHUNK_BYTES
    return {
        "version": offer.version,
        "total_bytes": len(offer.blob),
        "sha256": offer.sha256,
        "chunks": offer.chunks,
        "data": np.frombuffer(offer.blob[start : start + CHUNK_BYTES], np.uint8),
    }


class _SupersededError(Exception):
    """The newest version was replaced between two chunks."""


def pull(ask: Ask, version: int | None = None) -> ParametersBlob:
    """Fetch one version whole, the newest without `version`. `ask(payload)` gives the reply on its way.

    Raises BadFrame when the chunks do not add up to what was announced, Refused when newer versions kept replacing
    the newest, and what the server answers.
    """
    for _ in range(TRIES):
        try:
            return _pull(ask, version)
        except _SupersededError:
            continue
    raise Refused(f"newer parameters replaced those that were being pulled, {TRIES} times in a row; ask again")


def _pull(ask: Ask, version: int | None) -> ParametersBlob:
    first = ask({"version": version, "number": 0}).result(REPLY_S)
    held, total, chunks, sha256 = (first.get(key) for key in ("version", "total_bytes", "chunks", "sha256"))
    if not (type(held) is type(total) is type(chunks) is int and isinstance(first.get("data"), np.ndarray)):
        raise BadFrame("a reply to params is {version, total_bytes, sha256, chunks, data}")
    buffer, digest = np.empty(total, np.uint8), hashlib.sha256()
    waiting = deque(ask({"version": held, "number": number}) for number in range(1, min(chunks, WINDOW)))
    asked, end, data = min(chunks, WINDOW), 0, first["data"]
    while True:
        if end + len(data) > total:
            raise BadFrame(f"parameters: version {held} has {total} bytes, and more came")
        buffer[end : end + len(data)] = data
        if sha256 is not None:
            digest.update(buffer[end : end + len(data)].data)
        end += len(data)
        if not waiting:
            break
        if asked < chunks:
            waiting.append(ask({"version": held, "number": asked}))
            asked += 1
        data = _next_chunk(waiting.popleft(), version)
    if end != total:
        raise BadFrame(f"parameters: version {held} ends at {end} of {total} bytes")
    if sha256 is not None and digest.hexdigest() != sha256:
        raise BadFrame(f"parameters: version {held} does not match its sha256")
    return ParametersBlob(held, buffer.data, sha256)


def _next_chunk(reply: Reply, wanted: int | None) -> np.ndarray:
    """uint8[k] of the next chunk. _SupersededError when the newest was wanted and is another one by now."""
    try:
        return reply.result(REPLY_S)["data"]
    except Refused:
        if wanted is None:
            raise _SupersededError from None
        raise
