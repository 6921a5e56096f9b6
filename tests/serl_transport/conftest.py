"""Servers and clients of the transport's tests: ephemeral ports, everything stopped at the end of a test."""

import pytest

from serl_transport import TrainerClient, TrainerConfig, TrainerServer


@pytest.fixture
def started():
    """Start things that have `stop`; they are stopped in reverse order."""
    running: list = []

    def keep(thing):
        running.append(thing)
        return thing

    yield keep
    for thing in reversed(running):
        thing.stop()


@pytest.fixture
def serve(started):
    """serve(config changes, handlers={kind: fn}, **server arguments) -> a running server on free ports."""

    def make(*, handlers=None, raw_handlers=None, config=None, **arguments) -> TrainerServer:
        server = TrainerServer(TrainerConfig(**{"port_number": 0, "broadcast_port": 0, **(config or {})}), **arguments)
        for kind, fn in (handlers or {}).items():
            server.handle(kind, fn)
        for kind, fn in (raw_handlers or {}).items():
            server.handle(kind, fn, raw=True)
        server.start(threaded=True)
        return started(server)

    return make


@pytest.fixture
def connect(started):
    """connect(server or config, name=..., **client arguments) -> a connected client."""

    def make(server, name: str = "robot-1", **arguments) -> TrainerClient:
        config = server if isinstance(server, TrainerConfig) else server.config
        return started(TrainerClient(name, "127.0.0.1", config, **{"timeout_ms": 20_000, **arguments}))

    return make
