"""Seeded hostile messages for a gateway: each generator makes the frames of one attack on the wire.

An intruder that has said hello (or not) sends them; every one must cost it a typed error or be dropped and counted.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
from fault_actor import make_spec

from serl_transport.contract.schema import EpisodeInfo, Observation, StepBatch, TimeStep
from serl_transport.wire.codec import pack
from serl_transport.wire.envelope import PROTOCOL, Envelope

Frames = list[bytes]
NAMES = (
    "../../etc/passwd",
    "/home/robot/.ssh/id",
    "..\\..\\x",
    "a/../../b",
    "\0",
    "x" * 256,
    "%2e%2e%2f",
    "~root",
    "$(reboot)",
    "é" * 80,
)
DTYPES = ("object", "O", "|V8", "datetime64[ns]", "complex128", "float128", "<U10", "bool8", "", "uint8\0", "S4096")


def batch_body(rng: random.Random, pixels: int = 24) -> dict[str, Any]:
    """A valid step batch, to be spoilt."""
    spec = make_spec(pixels)
    image = np.zeros((pixels, pixels, 3), np.uint8)
    steps = [
        TimeStep(Observation({"front": image}, np.zeros(2, np.float32)), np.zeros(2, np.float32), 0.0, False, False,
                 False, False, 1, i) for i in range(3)
    ]  # fmt: skip
    info = EpisodeInfo(f"h{rng.random()}", "intruder", "b", spec.name, spec.prompt, "online", "online", 1, 1e9)
    return StepBatch.from_steps(info, 0, steps).to_body()


class Hostile:
    """One attacker's stock; `make()` gives the next message. `name`: the unique_identifier it said hello with."""

    def __init__(self, seed: int, name: str = "intruder", boot: str = "b"):
        self.rng = random.Random(seed)
        self.name, self.boot = name, boot
        self._seq = 0
        self._id = 10
        self.kinds: list[Callable[[], Frames]] = [
            self.junk, self.no_frame, self.bomb, self.truncated, self.wrong_dtype, self.wrong_shape, self.giant_header,
            self.path, self.not_finite, self.old_seq, self.wrong_role, self.flipped, self.deep, self.other_name,
            self.wrong_protocol, self.bad_request, self.bad_hello, self.many_frames, self.bad_outcome, self.bad_reply,
        ]  # fmt: skip

    def make(self) -> tuple[str, Frames]:
        """(kind of attack, frames)."""
        attack = self.rng.choice(self.kinds)
        return attack.__name__, attack()

    def junk(self) -> Frames:
        return [self.rng.randbytes(self.rng.randrange(1, 400)) for _ in range(self.rng.randrange(1, 5))]

    def no_frame(self) -> Frames:
        return [b""] * self.rng.randrange(1, 4)

    def bomb(self) -> Frames:
        """Small messages that claim to be huge: arrays, maps and strings of billions, nested thousands deep."""
        return self._data(self.rng.choice([
            [b"\xdd\xff\xff\xff\xff"], [b"\xdf\xff\xff\xff\xff"], [b"\xdb\xff\xff\xff\xffx"], [b"\xc6\xff\xff\xff\xff"],
            [b"\x91" * 100_000], [b"\x81\xa1a" * 50_000], [self._descriptor("uint8", [1 << 39]), b""],
            [self._descriptor("float64", [1 << 20, 1 << 20]), b"x" * 8], [self._descriptor("uint8", [0] * 9), b""],
            [b"\xc9\xff\xff\xff\xff\x01"],
        ]))  # fmt: skip

    def truncated(self) -> Frames:
        frames = self._valid()
        cut = self.rng.randrange(1, len(frames))
        frames[cut] = frames[cut][: self.rng.randrange(len(frames[cut]))] if frames[cut] else b"x"
        return frames[: self.rng.randrange(1, len(frames))] if self.rng.random() < 0.5 else frames

    def wrong_dtype(self) -> Frames:
        if self.rng.random() < 0.5:
            return self._data([self._descriptor(self.rng.choice(DTYPES), [8]), bytes(64)])
        body = batch_body(self.rng)
        key = self.rng.choice(sorted(body["arrays"]))
        body["arrays"][key] = body["arrays"][key].astype(self.rng.choice(["float64", "int8", "uint32", "float16"]))
        return self._data(pack(body))

    def wrong_shape(self) -> Frames:
        body = batch_body(self.rng)
        key = self.rng.choice(sorted(body["arrays"]))
        array = body["arrays"][key]
        twice = np.concatenate([array, array])
        body["arrays"][key] = self.rng.choice([array[:-1], array[None], array.reshape(-1), twice])
        if body["arrays"][key].shape == array.shape:
            body["arrays"][key] = array[:0]
        return self._data(pack(body))

    def giant_header(self) -> Frames:
        return self._data([msgpack.packb({"x": bytes((1 << 20) + self.rng.randrange(1000))})])

    def path(self) -> Frames:
        """Names that would leave a folder if anybody made a path of them."""
        name = self.rng.choice(NAMES)
        body = batch_body(self.rng)
        body["episode"][self.rng.choice(["task", "mode"])] = name
        choice = self.rng.randrange(4)
        if choice == 0:
            return self._data(pack(body))
        if choice == 1:
            return [self._envelope("request", target=name), *pack({"version": name})]
        if choice == 2:
            return [self._envelope("hello", actor=name[:250]), *pack({"version": "0.1.0"})]
        return [self._envelope("request", target="params"), *pack({"version": name, "number": name})]

    def not_finite(self) -> Frames:
        body = batch_body(self.rng)
        key = self.rng.choice(["observation.state", "action", "next.reward"])
        array = body["arrays"][key].copy()
        array.reshape(-1)[self.rng.randrange(array.size)] = self.rng.choice([np.nan, np.inf, -np.inf])
        body["arrays"][key] = array
        return self._data(pack(body))

    def old_seq(self) -> Frames:
        """A data item with a seq from before the first, or a request that was sent before."""
        if self.rng.random() < 0.5:
            return [self._envelope("data", seq=0), *pack(batch_body(self.rng))]
        return [Envelope("request", self.name, self.boot, 0, 1, "status").to_frame(), *pack({})]

    def wrong_role(self) -> Frames:
        return [self._envelope("request", target=self.rng.choice(["pause", "resume", "publish", "stop"])), *pack({})]

    def flipped(self) -> Frames:
        """A whole message with its checksum, in which a byte was changed afterwards."""
        body = pack(batch_body(self.rng))
        frames = [self._envelope("data", seq=self._next(), body=body), *map(bytes, body)]
        place = self.rng.randrange(1, len(frames))
        changed = bytearray(frames[place])
        changed[self.rng.randrange(len(changed))] ^= 1 << self.rng.randrange(8)
        frames[place] = bytes(changed)
        return frames

    def deep(self) -> Frames:
        body: Any = 1
        for _ in range(self.rng.randrange(17, 400)):
            body = [body] if self.rng.random() < 0.5 else {"a": body}
        return self._data([msgpack.packb({"x": body})])

    def other_name(self) -> Frames:
        """Speaks for the honest actor over the intruder's connection."""
        return [self._envelope("data", actor="robot-1", seq=self._next()), *pack(batch_body(self.rng))]

    def wrong_protocol(self) -> Frames:
        return [Envelope("data", self.name, self.boot, 1, self._request(), version=self.rng.choice(
            [0, 2, 99, -1, 1 << 60]) if PROTOCOL == 1 else 1).to_frame(), b"x"]  # fmt: skip

    def bad_request(self) -> Frames:
        payload = self.rng.choice(
            [{"want": "everything"}, {"want": 7}, {"want": "online", "episodes": -1}, {"want": ["x"]}]
        )
        kind = self.rng.choice(["next_episode", "no_such_request"])
        return [self._envelope("request", target=kind), *pack(payload)]

    def bad_hello(self) -> Frames:
        body = self.rng.choice([
            {}, {"version": 1}, {"version": "9.9"}, {"version": "0.1.0", "limits": 5}, {"role": "god"},
            {"version": "0.1.0", "limits": {"frame_bytes": 1 << 50}},
        ])  # fmt: skip
        return [self._envelope("hello", actor=f"x{self.rng.random()}"), *pack(body)]

    def many_frames(self) -> Frames:
        return self._data([*pack({"x": 1}), *[b"y"] * self.rng.randrange(1024, 3000)])

    def bad_outcome(self) -> Frames:
        body = batch_body(self.rng)
        body |= self.rng.choice([
            {"final": True}, {"final": 1}, {"first_tick": -5}, {"first_tick": 10**9}, {"outcome": {"success": True}},
            {"episode": None}, {"arrays": []}, {"more": 1},
            {"final": True, "outcome": {"success": True, "success_source": "me", "truncated_by": None}},
        ])  # fmt: skip
        return self._data(pack(body))

    def bad_reply(self) -> Frames:
        """What only a server or a role may send."""
        kind = self.rng.choice(["reply", "infer_reply", "serving", "progress", "role_hello", "notify"])
        return [self._envelope(kind), *pack({"version": 1, "pid": 1})]

    def _valid(self) -> Frames:
        return [bytes(frame) for frame in self._data(pack(batch_body(self.rng)))]

    def _data(self, body: list[Any]) -> Frames:
        return [self._envelope("data", seq=self._next()), *map(bytes, body)]

    def _descriptor(self, dtype: str, shape: list[int]) -> bytes:
        return msgpack.packb({"x": msgpack.ExtType(1, msgpack.packb([dtype, shape, 1]))})

    def _next(self) -> int:
        self._seq += 1
        return self._seq

    def _request(self) -> int:
        self._id += 1
        return self._id

    def _envelope(
        self, kind: str, *, actor: str | None = None, seq: int = 0, target: str = "", body: Any = None
    ) -> bytes:
        envelope = Envelope(kind, self.name if actor is None else actor, self.boot, seq, self._request(), target)
        return envelope.to_frame(body)


def tcp_garbage(rng: random.Random) -> bytes:
    """What is no ZMTP at all, or the beginning of it and then nonsense."""
    greeting = b"\xff" + bytes(8) + b"\x7f" + bytes([3, rng.randrange(2)]) + b"NULL".ljust(20, b"\0") + bytes(32)
    return rng.choice([
        rng.randbytes(rng.randrange(1, 5000)),
        greeting[: rng.randrange(1, 64)],
        greeting + rng.randbytes(200),
        greeting + b"\x06" + struct.pack(">Q", 1 << 62) + b"x",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(100),
    ])  # fmt: skip
