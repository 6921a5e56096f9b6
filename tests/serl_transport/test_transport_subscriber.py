"""Connections that may be silent for long come back after cuts, also those after which libzmq never connects again."""

import contextlib
import socket
import struct
import threading
import time

import pytest

from serl_transport import TrainerConfig
from serl_transport.connection import subscriber

WAIT = 30.0


class Relay:
    """Forwards 127.0.0.1:`port` to `target` and can put bytes of its own among those for the clients."""

    def __init__(self, target: int, port: int = 0):
        self._target = target
        self._ends: list[socket.socket] = []  # those towards the clients
        self._all: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port: int = self._listener.getsockname()[1]
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def stop(self) -> None:
        self._listener.close()
        self.cut()

    def say(self, data: bytes) -> None:
        for end in self._ends:
            with contextlib.suppress(OSError):  # that connection has ended
                end.sendall(data)

    def cut(self) -> None:
        for end in self._all:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._ends, self._all = [], []

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._target))
            self.connections += 1
            self._ends.append(client)
            self._all += [client, server]
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=_pump, args=(source, sink), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_RDWR)


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(subscriber, "REOPEN_S", 1.0)


@pytest.fixture
def relayed(serve, connect, started):
    """(server, relay on the notify port, what the client heard)."""
    server = serve()
    relay = started(Relay(server.config.broadcast_port))
    client = connect(TrainerConfig(server.config.port_number, relay.port))
    heard: list[dict] = []
    client.on_notify(heard.append)
    assert hears(server, heard)
    return server, relay, heard


def hears(server, heard: list[dict]) -> bool:
    """Whether a notification that is sent from now on arrives."""
    heard.clear()
    deadline = time.monotonic() + WAIT
    while not heard and time.monotonic() < deadline:
        server.notify({"topic": "x"})
        time.sleep(0.02)
    return bool(heard)


@pytest.mark.parametrize("times", [1, 2])
def test_a_broken_length_ends_notifications_for_seconds_only(relayed, times):
    server, relay, heard = relayed
    for _ in range(times):
        before = relay.connections
        relay.say(b"\x02" + struct.pack(">Q", 1 << 62))
        deadline = time.monotonic() + WAIT
        while relay.connections == before and time.monotonic() < deadline:
            time.sleep(0.05)
        assert relay.connections == before + 1
        assert hears(server, heard)


def test_a_greeting_that_is_none_is_no_end_either(serve, connect, started):
    """The first connection reaches something that does not speak ZMTP; the next one the learner."""
    server = serve()
    stranger = socket.create_server(("127.0.0.1", 0))
    port = stranger.getsockname()[1]
    client = connect(TrainerConfig(server.config.port_number, port))
    heard: list[dict] = []
    client.on_notify(heard.append)
    connection, _ = stranger.accept()
    connection.sendall(b"\xff" + bytes(8) + b"\x7f" + b"\x00" * 54 + b"nonsense" * 20)
    connection.recv(1)
    stranger.close()
    started(Relay(server.config.broadcast_port, port))
    assert hears(server, heard)


def test_an_ordinary_cut_is_libzmqs_business_and_quick(relayed):
    server, relay, heard = relayed
    relay.cut()
    assert hears(server, heard)


def test_a_broken_length_ends_questions_for_seconds_only(serve, connect, started, monkeypatch):
    monkeypatch.setattr("serl_transport.connection.link.REOPEN_S", 1.0)
    server = serve(handlers={"infer": lambda peer, envelope, body: {"echo": body["n"]}})
    relay = started(Relay(server.config.port_number))
    client = connect(TrainerConfig(relay.port, server.config.broadcast_port))
    for n in range(3):
        assert client.infer({"n": n}, timeout_ms=WAIT * 1e3) == {"echo": n}
        relay.say(b"\x02" + struct.pack(">Q", 1 << 62))
