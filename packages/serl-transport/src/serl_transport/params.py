"""The newest parameters as one blob, handed out in chunks: announce, then pull.

A server answers `params` requests from it; a late joiner pulls the newest, and nothing depends on having heard the
announcement.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from serl_transport.errors import BadFrame, NotReady, Refused

CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Published:
    """One version of the parameters."""

    version: int  # 1, 2, 3 ...
    blob: bytes  # `codec.join(codec.pack({"params": ...}))`, or a safetensors file
    sha256: str  # of the blob

    @classmethod
    def of(cls, version: int, blob: bytes) -> "Published":
        """Hash and hold a blob."""
        return cls(version, blob, hashlib.sha256(blob).hexdigest())


def read_chunk(published: Published | None, payload: dict[str, Any]) -> dict[str, Any]:
    """Answer one `params` request `{version | null, offset}`."""
    if published is None:
        raise NotReady("no parameters have been published yet")
    version, offset = payload.get("version"), payload.get("offset", 0)
    if version is not None and version != published.version:
        raise Refused(f"version {version!r} is not held, the newest is {published.version}")
    if type(offset) is not int or not 0 <= offset <= len(published.blob):
        raise BadFrame(f"offset: expected 0..{len(published.blob)}, got {offset!r}")
    chunk = published.blob[offset : offset + CHUNK_BYTES]
    return {
        "version": published.version,
        "total_bytes": len(published.blob),
        "sha256": published.sha256,
        "offset": offset,
        "data": np.frombuffer(chunk, np.uint8),
    }


def pull(request: Any, version: int | None = None) -> Published:
    """Fetch a whole blob with `request(payload) -> reply`; BadFrame when the pieces do not add up to its hash."""
    reply = request({"version": version, "offset": 0})
    first, parts, offset = reply, [], 0
    while True:
        data = reply["data"].tobytes()
        if reply["version"] != first["version"] or reply["offset"] != offset:
            raise BadFrame(f"parameters: expected version {first['version']} at {offset}, got {reply['version']}")
        parts.append(data)
        offset += len(data)
        if offset >= first["total_bytes"]:
            break
        if not data:
            raise BadFrame(f"parameters: version {first['version']} ends at {offset} of {first['total_bytes']} bytes")
        reply = request({"version": first["version"], "offset": offset})
    published = Published.of(first["version"], b"".join(parts))
    if published.sha256 != first["sha256"]:
        raise BadFrame(f"parameters: version {first['version']} does not match its sha256")
    return published
