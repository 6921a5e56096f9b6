"""The first frame of every message: who sends what to whom, without the body.

A message is `[envelope, *body frames]`, so that a gateway can route a body unread. Router and link make and read them.
Over TCP it carries a checksum of itself and the frames: TCP's own 16 bits let a flipped bit through now and then, and a
flipped seq, request id or action would be worse than a lost message.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import msgpack

from serl_transport.contract.bounds import INT64
from serl_transport.contract.errors import BadFrame, Corrupt, WireError
from serl_transport.wire.blob import checksum64
from serl_transport.wire.codec import buffer_of

PROTOCOL = 8
MAX_ENVELOPE_BYTES = 64 << 10
REPLY = "reply"
_NO_SUM = bytes(8)


@dataclass(slots=True)
class Envelope:
    """One message's address label. Not frozen, because that makes it three times as slow; nobody changes one."""

    kind: str  # hello | data | infer | request | heartbeat | reply | ...
    actor_id: str = ""  # the sender's unique_identifier
    boot_id: str = ""  # actor: the boot that made the item; in a reply: the server's boot
    seq: int = 0  # of a data item, from 1; else 0
    request_id: int | bytes = 0  # echoed by the reply; bytes when it is a return token
    target: str = ""  # name of the data store, type of the request
    error: tuple[str, str] | None = None  # (code, message), in a reply only
    version: int = PROTOCOL  # of the sender
    stem: bytes = field(default=b"", compare=False)  # as received, up to the checksum; empty: it had none
    sum: bytes = field(default=b"", compare=False)  # checksum of stem and frames, as received
    token: bytes = field(default=b"", compare=False)  # receiver side: the return address for `reply`; not on the wire

    def to_frame(self, frames: Iterable[Any] | None = None) -> bytes:
        """The envelope as msgpack; with the body's `frames` it ends with the checksum of both."""
        wire: dict[str, Any] = {
            "v": self.version,
            "k": self.kind,
            "a": self.actor_id,
            "b": self.boot_id,
            "s": self.seq,
            "r": self.request_id,
            "t": self.target,
        }
        if self.error is not None:
            wire["error"] = {"code": self.error[0], "message": self.error[1]}
        if frames is None:
            return msgpack.packb(wire)
        wire["c"] = _NO_SUM
        stem = msgpack.packb(wire)[: -len(_NO_SUM)]
        return stem + self._sum(stem, frames)

    @classmethod
    def from_frame(cls, frame: Any) -> "Envelope":
        """Read an envelope; BadFrame when it is none. Of another protocol version only `v` and `r` are read."""
        wire = _read_map(frame)
        version, request_id = wire.get("v"), wire.get("r", 0)
        if type(version) is not int or type(request_id) not in (int, bytes):
            raise BadFrame("an envelope has v: int and r: int or bytes")
        if version != PROTOCOL:
            return cls("", request_id=request_id, version=version)
        get = wire.get
        kind, actor_id, boot_id, target, seq = get("k"), get("a"), get("b"), get("t"), get("s")
        if not (type(kind) is type(actor_id) is type(boot_id) is type(target) is str and type(seq) is int):
            raise BadFrame("an envelope has k, a, b, t: texts and s: a whole number")
        if max(len(kind), len(actor_id), len(boot_id), len(target)) > 256 or not 0 <= seq <= INT64:
            raise BadFrame(f"an envelope has k, a, b, t of at most 256 characters and s from 0 to {INT64}")
        if not (kind + actor_id + boot_id + target).isprintable():
            raise BadFrame("an envelope has k, a, b, t without control characters")
        error = None if "error" not in wire else _read_error(wire["error"])
        stem = b""
        if "c" in wire:
            raw = bytes(buffer_of(frame))
            stem = raw[: -len(_NO_SUM)]
            if wire["c"] != raw[len(stem) :]:
                raise BadFrame(f"an envelope ends with c: {len(_NO_SUM)} bytes")
        return cls(kind, actor_id, boot_id, seq, request_id, target, error, version, stem, wire.get("c", b""))  # type: ignore[arg-type]

    def check(self, frames: Sequence[Any]) -> None:
        """Raise Corrupt when envelope or frames are not what the sender summed up."""
        if self.stem and self.sum != self._sum(self.stem, frames):
            raise Corrupt("the message was changed on its way (checksum): send it again")

    def _sum(self, stem: bytes, frames: Iterable[Any]) -> bytes:
        return checksum64(chain((stem,), frames)).to_bytes(len(_NO_SUM), "little")

    def raise_error(self) -> None:
        """Raise the typed error that a reply carries, if it carries one."""
        if self.error is not None:
            raise WireError.from_code(*self.error)


def _read_map(frame: Any) -> dict[str, Any]:
    view = buffer_of(frame)
    if len(view) > MAX_ENVELOPE_BYTES:
        raise BadFrame(f"an envelope of {len(view)} bytes, the limit is {MAX_ENVELOPE_BYTES}")
    try:
        wire = msgpack.unpackb(view, raw=False, strict_map_key=True)
    except Exception as error:  # msgpack raises a zoo of types
        raise BadFrame(f"the envelope is not msgpack: {type(error).__name__}") from None
    if not isinstance(wire, dict):
        raise BadFrame(f"an envelope is a map, got {type(wire).__name__}")
    return wire


def _read_error(value: Any) -> tuple[str, str]:
    if not isinstance(value, dict) or type(value.get("code")) is not str or type(value.get("message")) is not str:
        raise BadFrame("an error is {code, message}")
    return value["code"], value["message"]
