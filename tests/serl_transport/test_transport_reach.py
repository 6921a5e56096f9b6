"""What cannot be reached is told within seconds, with the reason; IPv6 addresses work."""

import socket
import time

import pytest

from serl_transport.client import TrainerClient
from serl_transport.config import TrainerConfig
from serl_transport.connection import reach
from serl_transport.contract.errors import ServerSilent
from serl_transport.server import TrainerServer


@pytest.fixture
def free_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


class EnoughError(Exception):
    """The test has heard what it wanted."""


def waits(host, port):
    """The first line with a reason that a client says while it waits for `host`."""

    def hear(line):
        if ": " in line or time.monotonic() - began > 10:
            raise EnoughError(line)

    began = time.monotonic()
    with pytest.raises(EnoughError) as told:
        TrainerClient("a", host, TrainerConfig(port, port + 1), role="operator", on_wait=hear)
    return str(told.value)


def test_a_learner_that_is_not_there_is_told_with_the_reason_and_the_keys(free_port):
    told = waits("127.0.0.1", free_port)
    assert f": nothing listens on port {free_port} of 127.0.0.1, or on its loopback alone (check ip= and port=)" in told


def test_a_name_that_does_not_resolve_is_told():
    assert ": the name 'nowhere.invalid' does not resolve" in waits("nowhere.invalid", 5588)


def test_a_name_server_that_is_silent_holds_nobody_up(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(3))
    began = time.monotonic()
    with pytest.raises(OSError, match=r"the name 'arm' was not resolved within 0.2 s: is the name server there\?"):
        reach.resolved("arm", 1, timeout_s=0.2)
    assert time.monotonic() - began < 1.5


def test_a_name_of_ipv6_addresses_alone_is_told(monkeypatch):
    entry = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fd00::7", 1, 0, 0))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [entry])
    told = reach.obstacle("arm", 1, ipv4_names=True)
    assert told == "the name 'arm' has IPv6 addresses alone: give one of them, such as fd00::7"


def test_what_listens_is_no_obstacle():
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert reach.obstacle("127.0.0.1", server.getsockname()[1]) is None


@pytest.mark.parametrize("address", ["::1", "[::1]"])
def test_a_learner_on_an_ipv6_address_is_asked(address):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    config = TrainerConfig(0, 0, request_types=["sum"], bind_host="::1")
    server = TrainerServer(config, request_callback=lambda kind, body: {"sum": body["a"] + body["b"]})
    server.start(threaded=True)
    try:
        client = TrainerClient("a", address, server.config, role="operator", wait_for_server=False)
        assert client.request("sum", {"a": 1, "b": 2}) == {"sum": 3}
        client.stop()
    finally:
        server.stop()


def test_a_client_that_does_not_wait_says_why(free_port):
    config = TrainerConfig(free_port, free_port + 1)
    with pytest.raises(ServerSilent, match=r"no learner at 127.0.0.1:\d+ in .*nothing listens on port"):
        TrainerClient("a", "127.0.0.1", config, role="operator", wait_for_server=False, timeout_ms=300)
