"""Questions to the policy: answered, refused and repeated, whatever happens to server and connection meanwhile."""

import threading

import pytest

from serl_transport import TrainerConfig
from serl_transport.contract.errors import NotReady, ServerSilent, UnknownKind

WAIT = 20.0


@pytest.fixture
def asks(serve, connect):
    """(server, client, bodies that the server saw); the server answers {n: how many}."""
    seen = []

    def infer(peer, envelope, body):
        seen.append(body)
        return {"n": len(seen)}

    server = serve(handlers={"infer": infer})
    client = connect(server)
    return server, client, seen


def test_answers_come_in_order(asks):
    _, client, seen = asks
    assert [client.infer({"i": i})["n"] for i in range(3)] == [1, 2, 3]
    assert seen == [{"i": 0}, {"i": 1}, {"i": 2}]


def test_a_server_that_forgot_us_gets_hello_and_the_question_again(asks):
    server, client, seen = asks
    server.call_soon(server.router.peers.clear)
    assert client.infer({"again": True})["n"] == len(seen)
    assert seen[-1] == {"again": True}


def test_typed_refusals_and_silence(serve, connect):
    def infer(peer, envelope, body):
        if body.get("silent"):
            return None
        raise NotReady("later")

    client = connect(serve(handlers={"infer": infer}))
    for _ in range(2):
        with pytest.raises(NotReady, match="later"):
            client.infer({})
    with pytest.raises(ServerSilent, match=r"no reply to 'infer' from tcp://\S+ in 150 ms; last heard"):
        client.infer({"silent": True}, timeout_ms=150)
    with pytest.raises(NotReady):
        client.infer({})
    with pytest.raises(UnknownKind):
        connect(serve()).infer({})


def test_two_at_once_are_both_answered(serve, connect):
    both = threading.Barrier(2)
    tokens = []

    def infer(peer, envelope, body):
        tokens.append(envelope.token)
        if len(tokens) == 2:
            for token in tokens:
                server.reply(token, {"ok": True})

    server = serve(handlers={"infer": infer})
    client = connect(server)
    answers = []

    def ask():
        both.wait()
        answers.append(client.infer({}, timeout_ms=WAIT * 1e3))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [{"ok": True}] * 2


def test_a_question_whose_connection_was_cut_is_asked_again(serve, connect):
    """The first question dies with its server; the next server on that port answers it."""
    arrived = threading.Event()
    first = serve(handlers={"infer": lambda peer, envelope, body: arrived.set() if body else {}})
    client = connect(TrainerConfig(first.config.port_number, first.config.broadcast_port))
    answers = []
    thread = threading.Thread(target=lambda: answers.append(client.infer({"x": 1}, timeout_ms=WAIT * 1e3)))
    thread.start()
    assert arrived.wait(WAIT)
    first.stop()
    config = {"port_number": first.config.port_number, "broadcast_port": first.config.broadcast_port}
    serve(config=config, handlers={"infer": lambda peer, envelope, body: {"echo": body}})
    thread.join()
    assert answers == [{"echo": {"x": 1}}]


def test_stop_ends_a_waiting_question(serve, connect):
    arrived = threading.Event()
    client = connect(serve(handlers={"infer": lambda peer, envelope, body: arrived.set()}))
    silent = []

    def ask():
        with pytest.raises(ServerSilent):
            client.infer({"x": 1}, timeout_ms=600_000)
        silent.append(True)

    thread = threading.Thread(target=ask)
    thread.start()
    assert arrived.wait(WAIT)
    client.stop()
    thread.join(WAIT)
    assert silent == [True]


def test_damaged_answers_are_not_believed(asks, monkeypatch, caplog):
    server, client, _ = asks
    send = server.router._send
    damaged = []

    def spoil(parts, copy):
        if len(parts) > 2 and not damaged and b"reply" in bytes(parts[1]):
            damaged.append(True)
            # once damaged, then (after it was thrown away) as it was
            send([*parts[:-1], bytes(len(parts[-1]))], copy)
        send(parts, copy)

    monkeypatch.setattr(server.router, "_send", spoil)
    assert "n" in client.infer({"x": 1})
    assert damaged
    assert "changed on its way" in caplog.text
