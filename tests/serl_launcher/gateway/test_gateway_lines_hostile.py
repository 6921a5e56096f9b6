"""What hostile ends of a line cost: a typed error or their line, never the gateway, and nothing to others."""

from __future__ import annotations

import os
import random
import resource
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgpack
import pytest
from gateway_samples import connected, serving
from hostile_lines import datagram
from line_samples import IMAGE, memories, over_line, policy
from replay_samples import wait_for

from serl_launcher.gateway.app import Gateway
from serl_transport.client import TrainerClient
from serl_transport.same_host import AskLine, machine_id
from serl_transport.wire.codec import pack


@pytest.fixture
def lined(tmp_path: Path) -> Iterator[tuple[Gateway, TrainerClient, list[dict[str, Any]]]]:
    with serving(tmp_path) as gateway, policy(tmp_path) as seen, connected(gateway) as client:
        yield gateway, over_line(client), seen


class Raw:
    """A hostile end: a real hello and token, and then whatever it likes."""

    def __init__(self, gateway: Gateway, client: TrainerClient):
        over_line(client)
        (held,) = [line for line in gateway.lines._lines.values() if line.peer.actor_id == client.name]
        offers: list[dict[str, Any]] = []
        gateway.server.call_soon(lambda: offers.append(gateway.lines.offer(held.peer, machine_id())))
        wait_for(lambda: offers)
        self.line = AskLine.connect(offers[0])
        wait_for(lambda: self.line.ready)
        self.socket, self.slot = self.line._socket, gateway.lines.slot_bytes
        self.socket.settimeout(10)
        self.peer = held.peer

    def ask(self, message: bytes) -> str:
        """'gone', 'ok' or the error's code."""
        try:
            self.socket.send(message)
            answer = self.socket.recv(1 << 17)
        except OSError:
            return "gone"
        return "gone" if not answer else (msgpack.unpackb(answer)[1] or ["ok"])[0]


def test_hostile_datagrams_cost_a_typed_error_or_the_line(lined) -> None:
    gateway, honest, _ = lined
    rng = random.Random(20261121)
    before = memories()
    outcomes: dict[str, int] = {}
    with connected(gateway, "hostile") as client:
        raw = Raw(gateway, client)
        for i in range(2000):
            outcome = raw.ask(datagram(rng, raw.slot, next(client._asker._ids)))
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            if outcome == "gone":
                raw.line.close()
                raw = Raw(gateway, client)
            if i % 100 == 0:
                assert honest.infer({"image": IMAGE})["sum"]
        raw.line.close()
    assert honest.asks_over_line
    assert set(outcomes) == {"gone", "bad_frame", "too_large"}, outcomes
    assert outcomes["bad_frame"] > 1000
    wait_for(lambda: memories() <= before)


def test_old_request_ids_and_taken_slots_are_refused(tmp_path: Path) -> None:
    with serving(tmp_path) as gateway, policy(tmp_path, lambda body: {} if "image" in body else None):
        with connected(gateway) as client:
            raw = Raw(gateway, client)
            note = msgpack.packb([bytes(pack({})[0])])
            image = msgpack.packb([bytes(pack({"image": IMAGE})[0]), [0, IMAGE.nbytes]])
            assert raw.ask(msgpack.packb([500, 0, image])) == "ok"
            assert raw.ask(msgpack.packb([500, 0, image])) == "refused"
            raw.socket.send(msgpack.packb([501, 1, note]))  # never answered
            assert raw.ask(msgpack.packb([502, 1, note])) == "gone"
            raw.line.close()


def test_thousands_of_connections(lined) -> None:
    gateway, honest, _ = lined
    name, files = gateway.lines._name, len(os.listdir("/proc/self/fd"))
    rng = random.Random(1)
    idle = []
    for i in range(3000):
        end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        end.connect(b"\0" + name)
        end.settimeout(5)
        if i % 3 == 0:
            end.close()
        else:
            if i % 3 == 1:
                with suppress(OSError):  # pushed out by those after it
                    end.send(secrets.token_bytes(rng.choice([1, 15, 16, 17, 4000])))
            idle.append(end)
        if len(idle) > 200:
            idle.pop(0).close()
        if i % 300 == 0:
            assert honest.infer({"image": IMAGE})["sum"]
    with connected(gateway, "newcomer") as client:
        over_line(client)
    for end in idle:
        end.settimeout(20)
        with suppress(ConnectionResetError):
            assert end.recv(10) == b"", "the gateway closes it, by itself"
        end.close()
    assert honest.asks_over_line
    wait_for(lambda: len(os.listdir("/proc/self/fd")) <= files + 2)


def test_no_more_open_files_is_no_busy_loop(lined, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway, honest, _ = lined
    tried: list[float] = []
    accept = gateway.lines._accept
    monkeypatch.setattr(gateway.lines, "_accept", lambda listener: tried.append(time.monotonic()) or accept(listener))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as end:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        taken = []
        try:
            with suppress(OSError):
                while True:
                    taken.append(os.open("/dev/null", os.O_RDONLY))
            end.connect(b"\0" + gateway.lines._name)
            assert honest.infer({"image": IMAGE})["sum"]
            time.sleep(0.5)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in taken:
                os.close(fd)
        assert 1 <= len(tried) <= 2
        end.settimeout(20)
        assert end.recv(10) == b"", "it was let in once there was room, and closed because it showed no token"
    assert len(tried) >= 2
