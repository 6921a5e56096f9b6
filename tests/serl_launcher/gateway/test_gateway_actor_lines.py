"""Lines between actors and gateway on one host: the contract of `infer` over TCP, refusals, restarts, memory."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import keygen
import numpy as np
import pytest
from gateway_samples import connected, serving
from line_samples import IMAGE, memories, over_line, policy
from replay_samples import SPEC, wait_for
from test_gateway_process import start, write_config

from serl_launcher.gateway import actor_lines
from serl_launcher.gateway.app import Gateway
from serl_launcher.gateway.shelf import settle
from serl_transport.client import TrainerClient
from serl_transport.config import TrainerConfig
from serl_transport.contract.errors import DeadlineMissed, NotReady, Refused, ServerSilent, Unauthorized
from serl_transport.same_host import SLOTS


@pytest.fixture
def lined(tmp_path: Path) -> Iterator[tuple[Gateway, TrainerClient, list[dict[str, Any]]]]:
    with serving(tmp_path) as gateway, policy(tmp_path) as seen, connected(gateway) as client:
        yield gateway, over_line(client), seen


def test_answers_are_those_of_tcp_and_are_counted(lined) -> None:
    gateway, client, seen = lined
    before, shelf = gateway.server.router.counters["infer"], gateway.forwarder._shelf.put
    gateway.forwarder._shelf.put = None  # a question over TCP would need it
    for i in range(3 * SLOTS):
        image = IMAGE + np.uint8(i)
        assert client.infer({"image": image, "prompt": "p", "min_version": 0})["sum"] == int(image.sum(dtype=np.int64))
    assert seen[-1]["prompt"] == "p"
    assert gateway.server.router.counters["infer"] == before + 3 * SLOTS
    gateway.forwarder._shelf.put = shelf
    with connected(gateway, "b", use_line=False) as other:
        assert other.infer({"image": IMAGE})["sum"] == client.infer({"image": IMAGE})["sum"]
        assert not other.asks_over_line


def test_answers_of_any_size(tmp_path: Path) -> None:
    asked = []

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        asked.append(body["n"])
        return {"x": np.arange(body["n"], dtype=np.uint8)}

    with serving(tmp_path) as gateway, policy(tmp_path, answer), connected(gateway) as client:
        over_line(client, {"n": 1})
        asked.clear()
        for n in (10, 70_000, gateway.lines.slot_bytes - 100, 2 * gateway.lines.slot_bytes):
            assert np.array_equal(client.infer({"n": n})["x"], np.arange(n, dtype=np.uint8))
        assert asked[:3] == [10, 70_000, gateway.lines.slot_bytes - 100]
        assert len(asked) == 5, "only the last did not fit, and was asked again over TCP"
        assert client.asks_over_line


def test_errors_of_policy_and_gateway_are_typed(tmp_path: Path) -> None:
    def answer(body: dict[str, Any]) -> Any:
        return DeadlineMissed("too late") if body.get("late") else {}

    with serving(tmp_path) as gateway, connected(gateway) as client:
        with policy(tmp_path, answer):
            over_line(client)
            with pytest.raises(DeadlineMissed, match="too late"):
                client.infer({"late": True})
            with pytest.raises(TypeError):
                client.infer({"x": object()})
        gateway.server.call_soon(lambda: setattr(gateway.forwarder, "_server", None))
        for _ in range(2 * SLOTS):
            with pytest.raises(NotReady, match="no policy server is running"):
                client.infer({"image": IMAGE})
        assert client.asks_over_line
        with policy(tmp_path, answer):
            over_line(client)


def test_a_dead_policy_servers_questions_are_given_back(tmp_path: Path) -> None:
    with serving(tmp_path) as gateway, connected(gateway) as client:
        with policy(tmp_path, lambda body: None if body.get("silent") else {}):
            over_line(client)
            for _ in range(SLOTS):
                with pytest.raises(ServerSilent):
                    client.infer({"silent": True}, timeout_ms=50)
            assert client.infer({}) == {}  # over TCP: both slots are taken
            assert len(client._asker._line._taken) == SLOTS
        gateway.server.call_soon(lambda: gateway.forwarder._give_up("gone"))
        with policy(tmp_path, lambda body: {"n": 1}):
            wait_for(lambda: _quiet(client) or not client._asker._line._taken)
            assert client.infer({}) == {"n": 1}
            assert client.asks_over_line


def _quiet(client: TrainerClient) -> None:
    with suppress(NotReady):
        client.infer({}, timeout_ms=1000)


def test_a_connection_that_was_forgotten_says_hello_and_gets_its_line_back(lined) -> None:
    gateway, client, _ = lined
    first = client._asker._line
    gateway.server.call_soon(gateway.server.router.peers.clear)
    assert client.infer({"image": IMAGE})["sum"]
    over_line(client)
    assert client._asker._line is not first


def test_a_replaced_actor_stays_refused(lined) -> None:
    gateway, client, _ = lined
    gateway.server.call_soon(lambda: gateway.server._sessions._boots.enter("a", "another-boot"))
    gateway.server.call_soon(gateway.server.router.peers.clear)
    with pytest.raises(Refused, match="has taken over"):
        client.infer({"image": IMAGE})
    assert not client.asks_over_line


def test_a_client_that_goes_leaves_no_memory(tmp_path: Path) -> None:
    with serving(tmp_path) as gateway, policy(tmp_path):
        for _ in range(3):
            with connected(gateway) as client:
                over_line(client)
                assert memories() >= 3  # the gateway's descriptor, both mappings
        wait_for(lambda: not gateway.lines._lines)
        wait_for(lambda: memories() == 0)


def test_only_this_machine_this_user_and_actors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path) as gateway, policy(tmp_path):
        told = []
        offer = gateway.lines.offer
        monkeypatch.setattr(gateway.lines, "offer", lambda peer, machine: told.append(offer(peer, machine)) or told[-1])
        with connected(gateway, "far") as client:
            client._asker._machine = "another kernel"
            wait_for(lambda: _asked(client))
            assert told == [None]
        with connected(gateway, "operator", role="operator") as client:
            with pytest.raises(Unauthorized):
                client.infer({})
            assert told == [None]
        monkeypatch.setattr(actor_lines, "peer_of", lambda connection: (1, os.getuid() + 1))
        with connected(gateway, "stranger") as client:
            wait_for(lambda: _asked(client))
            for _ in range(3):
                assert client.infer({"image": IMAGE})["sum"]
            assert told[-1] is not None
            assert not client.asks_over_line


def _asked(client: TrainerClient) -> bool:
    try:
        return bool(client.infer({"image": IMAGE}))
    except NotReady:
        return False


def test_a_key_that_is_struck_off_ends_the_line_too(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    assert keygen.main([str(keys), "--actor", "a"]) == 0
    security = {"keys_dir": str(keys), "allow_list": None}
    with serving(tmp_path, security=security) as gateway, policy(tmp_path):
        config = TrainerConfig(gateway.port, gateway.broadcast_port, keys_dir=str(keys))
        client = TrainerClient("a", "127.0.0.1", config, spec=SPEC)
        try:
            over_line(client)
            (keys / "allow_list").write_text("# nobody\n")

            def refused() -> bool:
                try:
                    client.infer({"image": IMAGE}, timeout_ms=2000)
                except Unauthorized:
                    return True
                return False

            wait_for(refused)
            assert client.asks_over_line
        finally:
            client.stop()


def test_kill_9_of_the_gateway_costs_a_hello(tmp_path: Path) -> None:
    port, broadcast = write_config(tmp_path)
    process = start(tmp_path)
    client = TrainerClient("a", "127.0.0.1", TrainerConfig(port_number=port, broadcast_port=broadcast), spec=SPEC)
    try:
        with policy(tmp_path):
            for _ in range(2):
                over_line(client)
                process.send_signal(signal.SIGKILL)
                process.communicate()
                process = start(tmp_path)
                answered = False
                while not answered:
                    try:
                        answered = bool(client.infer({"image": IMAGE}, timeout_ms=20_000)["sum"])
                    except NotReady:  # the policy server has not registered again yet
                        time.sleep(0.05)
            over_line(client)
    finally:
        client.stop()
        process.kill()
        process.communicate()


def test_a_full_house_is_told_to_use_tcp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor_lines, "MOST_LINES", 1)
    with serving(tmp_path) as gateway, policy(tmp_path), connected(gateway) as first:
        over_line(first)
        with connected(gateway, "b") as second:
            wait_for(lambda: _asked(second))
            for _ in range(3):
                assert second.infer({"image": IMAGE})["sum"]
            assert not second.asks_over_line
        assert first.asks_over_line


def test_the_memory_of_a_line_cannot_be_cut_short_by_its_actor(lined) -> None:
    gateway, _, _ = lined
    (line,) = gateway.lines._lines.values()
    for size in (0, 4096, 1 << 30):
        with pytest.raises(PermissionError):
            os.ftruncate(line.memory, size)


def test_what_was_checked_does_not_change_any_more() -> None:
    memory = bytearray(4096)
    flags = np.frombuffer(memory, bool)
    values = np.frombuffer(memory, np.float32)
    image = np.frombuffer(memory, np.uint8)
    memory[5] = 255  # after it was checked
    body = {"a": {"flags": flags, "list": [values, {"image": image}]}, "n": 1}
    settle(body)
    assert np.count_nonzero(body["a"]["flags"]) == 1
    assert set(body["a"]["flags"].view(np.uint8)) == {0, 1}
    memory[:] = b"\xff" * 4096
    assert np.count_nonzero(body["a"]["flags"]) == 1
    assert not np.isnan(body["a"]["list"][0]).any()
    assert body["a"]["list"][1]["image"].all()
