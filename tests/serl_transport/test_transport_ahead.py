"""Parameters that were asked for before they were published: sent once, and without an announcement."""

import threading
import time
from collections import Counter

import numpy as np
import pytest

from serl_transport import TrainerConfig
from serl_transport.ahead import MOST_KEPT, Standing
from serl_transport.contract.errors import NotReady, Refused

WAIT = 20.0


def params(version: int, megabytes: int = 9) -> dict[str, np.ndarray]:
    """9 MB: two chunks."""
    return {"w": np.full(megabytes << 18, version, np.float32), "b": np.arange(5)}


class Receiver:
    """What a client's callback got."""

    def __init__(self, client) -> None:
        self.got: list[dict] = []
        self._came = threading.Condition()
        client.recv_network_callback(self)

    def __call__(self, received: dict) -> None:
        with self._came:
            self.got.append(received)
            self._came.notify()

    def wait(self, count: int) -> None:
        with self._came:
            assert self._came.wait_for(lambda: len(self.got) >= count, WAIT), len(self.got)


def kept(server, count: int) -> bool:
    deadline = time.monotonic() + WAIT
    while len(server.standing._kept) != count and time.monotonic() < deadline:
        time.sleep(0.01)
    return len(server.standing._kept) == count


@pytest.mark.parametrize("announced", [True, False])
def test_the_next_version_comes_once_and_by_itself(serve, connect, announced, monkeypatch):
    server = serve()
    config = TrainerConfig(server.config.port_number, server.config.broadcast_port if announced else 1)
    receiver = Receiver(connect(config))
    server.publish_network(params(1))
    receiver.wait(1)
    sent: Counter[int] = Counter()
    monkeypatch.setattr(
        server, "_params", lambda body, read=server._params: sent.update([body["number"]]) or read(body)
    )
    for version in range(2, 6):
        assert kept(server, 2)
        server.publish_network(params(version))
        receiver.wait(version)
    assert sent == Counter({0: 4, 1: 4})
    for version, received in enumerate(receiver.got, 1):
        np.testing.assert_array_equal(received["w"], params(version)["w"])
        np.testing.assert_array_equal(received["b"], np.arange(5))


def test_versions_of_other_sizes_come_whole(serve, connect):
    server = serve()
    receiver = Receiver(connect(server))
    for version, megabytes in enumerate((9, 1, 45, 2, 60, 9), 1):
        server.publish_network(params(version, megabytes))
        receiver.wait(version)
        np.testing.assert_array_equal(receiver.got[-1]["w"], params(version, megabytes)["w"])


def test_a_server_that_starts_anew_is_asked_anew(serve, connect):
    first = serve()
    ports = {"port_number": first.config.port_number, "broadcast_port": first.config.broadcast_port}
    receiver = Receiver(connect(TrainerConfig(**ports)))
    first.publish_network(params(1))
    receiver.wait(1)
    assert kept(first, 2)
    first.stop()
    second = serve(config=ports)
    for version in (1, 2, 3):
        second.publish_network(params(10 * version))
        receiver.wait(1 + version)
        assert receiver.got[-1]["w"][0] == 10 * version


def test_a_callback_that_fails_gets_the_next_version_all_the_same(serve, connect, caplog):
    server = serve()
    seen = []

    def callback(received):
        seen.append(int(received["w"][0]))
        raise RuntimeError("wrong shape")

    connect(server).recv_network_callback(callback)
    for version in (1, 2, 3):
        server.publish_network(params(version))
        deadline = time.monotonic() + WAIT
        # The report comes after the callback has run, on the client's thread.
        while f"the network callback failed on version {version}" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
    assert seen == [1, 2, 3]
    assert "the network callback failed on version 3" in caplog.text


def test_questions_the_server_lost_do_not_keep_a_client_from_its_parameters(serve, connect, monkeypatch):
    monkeypatch.setattr("serl_transport.parameters.listener.REPLY_S", 1.0)
    monkeypatch.setattr("serl_transport.parameters.params.REPLY_S", 0.5)
    server = serve()
    receiver = Receiver(connect(server))
    server.publish_network(params(1))
    receiver.wait(1)
    assert kept(server, 2)
    server.call_soon(server.standing._kept.clear)
    assert kept(server, 0)
    server.publish_network(params(2))
    receiver.wait(2)
    assert receiver.got[1]["w"][0] == 2


def test_what_a_server_keeps_is_bounded_and_every_question_is_answered():
    answered = []
    standing = Standing(lambda token, result: answered.append((token, result)))
    assert not standing.keep(b"x", {"after": 1}, 2)  # it has not got the newest
    assert not standing.keep(b"x", {"number": 0}, 2)
    assert not standing.keep(b"x", {"after": None}, None)
    for i in range(MOST_KEPT + 1):
        assert standing.keep(str(i).encode(), {"after": 2, "number": i % 8}, 2)
    ((token, refusal),) = answered
    assert token == b"0"
    assert isinstance(refusal, NotReady)
    answered.clear()

    def read(payload):
        assert payload["version"] is None
        if payload["number"] == 3:
            raise Refused("gone")
        return payload["number"]

    standing.answer(read)
    assert len(answered) == MOST_KEPT
    assert isinstance(dict(answered)[b"3"], Refused)
    assert dict(answered)[b"12"] == 4
    standing.answer(read)
    assert len(answered) == MOST_KEPT
