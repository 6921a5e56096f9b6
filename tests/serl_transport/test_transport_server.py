"""Server and client over real sockets: agentlace-style use, typed errors, hostile bytes, inference, notifications."""

import re
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict

import msgpack
import numpy as np
import pytest
import zmq
from transport_samples import spec

from serl_transport import QueuedDataStore, TrainerClient, TrainerConfig, TrainerServer
from serl_transport.contract.errors import (
    CannotListen,
    Internal,
    NotReady,
    ProtocolMismatch,
    SchemaMismatch,
    ServerSilent,
    SpoolBusy,
    UnknownKind,
    WireError,
)
from serl_transport.wire.codec import Limits, pack, unpack
from serl_transport.wire.envelope import PROTOCOL, Envelope

WAIT = 20.0


def eventually(condition, what: str) -> None:
    """Wait until `condition()`; fail naming `what` after a generous while."""
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.01)


class Script:
    """A bare DEALER that speaks the protocol by hand, rightly or wrongly."""

    def __init__(self, port: int):
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.connect(f"tcp://127.0.0.1:{port}")

    def ask(self, *frames: bytes) -> Envelope:
        self.socket.send_multipart(frames)
        assert self.socket.poll(WAIT * 1e3), "no reply"
        return Envelope.from_frame(self.socket.recv_multipart()[0])

    def stop(self) -> None:
        self.context.destroy(linger=0)


# agentlace's shape


def test_an_agentlace_style_script_runs(serve, connect):
    calls = []
    learner_store = QueuedDataStore(100)
    server = serve(
        config={"request_types": ["get-stats"]},
        data_callback=lambda name, payload: calls.append((name, len(payload["data"]))),
        request_callback=lambda kind, payload: {"kind": kind, "twice": 2 * payload["x"]},
    )
    server.register_data_store("actor", learner_store)
    assert server.store_names() == {"actor"}
    actor_store = QueuedDataStore(100)
    client = connect(server, "actor", data_store=actor_store)
    actor_store.insert({"observation": np.arange(3), "reward": 1.0})
    actor_store.insert(np.array([4, 5, 6]))
    assert client.update() is True
    assert client.update() is True  # nothing new, nothing twice
    first, second = learner_store.get_latest_data(-1)
    np.testing.assert_array_equal(first["observation"], [0, 1, 2])
    np.testing.assert_array_equal(second, [4, 5, 6])
    assert calls == [("actor", 1), ("actor", 1)]
    assert client.request("get-stats", {"x": 21}) == {"kind": "get-stats", "twice": 42}

    received = []
    client.recv_network_callback(received.append)
    assert server.publish_network({"params": {"w": np.ones(3, np.float32)}}) == 1
    eventually(lambda: received, "the published network")
    np.testing.assert_array_equal(received[0]["params"]["w"], np.ones(3))

    client.start_async_update(interval_ms=20)
    actor_store.insert(7)
    eventually(lambda: len(learner_store) == 3, "the asynchronous update")


def test_several_data_stores_of_one_client(serve, connect):
    server = serve()
    stores = {name: QueuedDataStore(10) for name in ("demos", "online")}
    for name in stores:
        server.register_data_store(name, QueuedDataStore(10))
    client = connect(server, data_stores=stores)
    stores["demos"].batch_insert([1, 2])
    stores["online"].insert(3)
    assert client.update()
    assert server.data_store("demos").get_latest_data(-1) == [1, 2]
    assert server.data_store("online").get_latest_data(-1) == [3]


def test_update_says_no_when_the_store_does_not_exist(serve, connect, caplog):
    actor_store = QueuedDataStore(10)
    client = connect(serve(), "actor", data_store=actor_store)
    actor_store.insert(1)
    assert client.update() is False
    assert client.refused_items == 1
    assert "no data store 'actor' is registered; the stores are []" in caplog.text


def test_an_overflowing_store_is_reported(serve, connect, caplog):
    server = serve()
    server.register_data_store("actor", QueuedDataStore(10))
    small = QueuedDataStore(2)
    client = connect(server, "actor", data_store=small)
    small.batch_insert([1, 2, 3])
    assert client.update()
    assert server.data_store("actor").get_latest_data(-1) == [2, 3]
    assert "overflowed: 1 items were dropped before they were sent" in caplog.text


def test_a_data_callback_that_fails_once_loses_and_doubles_nothing(serve, connect, monkeypatch):
    monkeypatch.setattr("serl_transport.delivery.outbox.RETRY_S", 0.05)
    failures = iter([RuntimeError("first call")])

    def fail_once(name, payload):
        for failure in failures:
            raise failure

    server = serve(data_callback=fail_once)
    server.register_data_store("actor", QueuedDataStore(10))
    store = QueuedDataStore(10)
    client = connect(server, "actor", data_store=store)
    store.batch_insert([1, 2, 3])
    assert client.update()
    assert server.data_store("actor").get_latest_data(-1) == [1, 2, 3]


# Parameters and notifications


def test_a_late_joiner_gets_the_newest_parameters(serve, connect):
    server = serve()
    big = {"w": np.arange(3_000_000, dtype=np.float32)}  # 12 MB: three chunks
    server.publish_network({"old": 1})
    server.publish_network(big)
    received = []
    connect(server).recv_network_callback(received.append)
    eventually(lambda: received, "the newest parameters")
    np.testing.assert_array_equal(received[0]["w"], big["w"])


def test_parameters_arrive_without_any_notification(serve, connect):
    server = serve()
    client = connect(TrainerConfig(port_number=server.config.port_number, broadcast_port=1))  # nothing on that port
    received = []
    client.recv_network_callback(received.append)
    server.publish_network({"v": 1})
    eventually(lambda: received == [{"v": 1}], "parameters learned of by heartbeat")


def test_a_restarted_server_that_counts_anew_is_listened_to(serve, connect):
    first = serve()
    received = []
    connect(first).recv_network_callback(received.append)
    first.publish_network({"life": 1})
    eventually(lambda: received == [{"life": 1}], "version 1")
    ports = {"port_number": first.config.port_number, "broadcast_port": first.config.broadcast_port}
    first.stop()
    second = serve(config=ports)
    assert second.publish_network({"life": 2}) == 1
    eventually(lambda: received == [{"life": 1}, {"life": 2}], "version 1 of the second life")


def test_a_network_callback_that_raises_is_reported_and_the_next_version_tried(serve, connect, caplog):
    server = serve()
    seen = []

    def callback(params):
        seen.append(params["v"])
        if params["v"] == 1:
            raise RuntimeError("wrong shape")

    connect(server).recv_network_callback(callback)
    server.publish_network({"v": 1})
    eventually(lambda: seen == [1], "version 1")
    server.publish_network({"v": 2})
    eventually(lambda: seen == [1, 2], "version 2")
    assert "the network callback failed on version 1" in caplog.text


def test_notifications_reach_listening_clients(serve, connect):
    server = serve()
    heard = []
    client = connect(server)
    client.on_notify(heard.append)

    def told() -> bool:  # a subscription takes a moment to arrive: nothing may depend on one notification
        server.notify({"topic": "stage", "name": "online"})
        return bool(heard)

    eventually(told, "a notification")
    assert heard[0] == {"topic": "stage", "name": "online"}


def test_params_before_the_first_version_are_not_ready(serve, connect):
    with pytest.raises(NotReady, match="no parameters have been published yet"):
        connect(serve()).fetch_params()


# Requests and errors


def test_errors_are_typed_and_the_server_lives_on(serve, connect, caplog):
    def answer(peer, envelope, body):
        if envelope.target == "early":
            raise NotReady("no version is served yet")
        if envelope.target == "bug":
            return {}["missing"]
        if envelope.target == "unpackable":
            return {"x": object()}
        return {"from": peer.actor_id, "boot": envelope.boot_id, "body": body}

    client = connect(serve(handlers={"request": answer}))
    with pytest.raises(NotReady, match="no version is served yet"):
        client.request("early")
    with pytest.raises(Internal, match="the learner failed on this message, see its log: KeyError"):
        client.request("bug")
    assert "Traceback" in caplog.text
    with pytest.raises(Internal, match="TypeError"):
        client.request("unpackable")
    assert client.request("fine", {"x": 1}) == {"from": "robot-1", "boot": client.boot_id, "body": {"x": 1}}
    with pytest.raises(UnknownKind, match="no handler for 'infer'; the kinds are"):
        client.infer({"x": 1})


def test_unknown_request_types_are_named(serve, connect):
    with pytest.raises(UnknownKind, match=r"no request 'sttus' here; the types are \['status'\]"):
        connect(serve(config={"request_types": ["status"]}, request_callback=lambda k, p: {})).request("sttus")


def test_a_reply_can_come_later_and_from_another_thread(serve, connect):
    server = None

    def later(peer, envelope, body):
        threading.Timer(0.05, lambda: server.reply(envelope.token, {"late": body["x"]})).start()

    server = serve(handlers={"request": later})
    assert connect(server).request("any", {"x": 3}) == {"late": 3}


def test_a_silent_handler_is_server_silent_and_a_late_reply_harmless(serve, connect):
    tokens = []

    def maybe(peer, envelope, body):
        if envelope.target == "mute":
            tokens.append(envelope.token)
            return None
        return {"ok": True}

    server = serve(handlers={"request": maybe})
    client = connect(server)
    with pytest.raises(ServerSilent, match=r"no reply to 'request' from tcp://127.0.0.1:\d+ in 100 ms; last heard"):
        client.request("mute", timeout_ms=100)
    server.reply(tokens[0], {"too": "late"})
    assert client.request("fine") == {"ok": True}


def test_infer_frames_pass_through_a_gateway_unread(serve, connect):
    """The gateway hands raw frames and a return token to a policy server and its raw answer back."""
    server = None
    forwarded = []

    def policy_server(token: bytes, frames: list) -> None:
        image = unpack(frames)["observation"]["image"]
        server.reply(token, pack({"actions": image.astype(np.float32) * 2}))

    def forward(peer, envelope, frames):
        forwarded.append([type(frame).__name__ for frame in frames])
        threading.Thread(target=policy_server, args=(envelope.token, frames)).start()

    server = serve(raw_handlers={"infer": forward})
    image = np.arange(1200, dtype=np.int32).astype(np.uint8).reshape(20, 20, 3)
    reply = connect(server).infer({"observation": {"image": image}})
    np.testing.assert_array_equal(reply["actions"], image.astype(np.float32) * 2)
    assert forwarded == [["Frame", "Frame"]]


def test_bulk_data_does_not_delay_an_inference(serve, connect):
    """64 MB of unacknowledged data wait on the data link while inferences are answered."""
    server = serve(
        handlers={"infer": lambda peer, envelope, body: {"ok": True}}, raw_handlers={"data": lambda *_: None}
    )
    client = connect(server)
    for _ in range(16):
        client.send_item({"blob": np.zeros(4 << 20, np.uint8)})
    for _ in range(20):
        assert client.infer({"x": 1}, timeout_ms=5000) == {"ok": True}
    assert client.backlog == 16


def test_heartbeats_carry_the_actors_status(serve, connect):
    beats = []

    def beat(peer, envelope, body):
        beats.append((envelope.actor_id, body))
        return {}

    client = connect(serve(handlers={"heartbeat": beat}))
    client.set_status(policy_version=4, mode="online")
    eventually(lambda: any(body.get("policy_version") == 4 for _, body in beats), "a heartbeat with the status")
    actor, body = next((a, b) for a, b in beats if b.get("policy_version") == 4)
    assert (actor, body["mode"], body["backlog"]) == ("robot-1", "online", 0)
    assert client.silent_s < WAIT


# The handshake


def test_a_spec_mismatch_names_every_field_with_both_values(serve, connect):
    server = serve(spec=spec())
    connect(server, "good", spec=spec())
    with pytest.raises(SchemaMismatch) as caught:
        connect(server, "bad", spec=spec(max_ticks=50, cameras={"front": [6, 8]}))
    assert str(caught.value) == (
        "the task differs; start both with the same task=: cameras.wrist: absent on the actor, (4, 4) on the learner; "
        "max_ticks: 50 on the actor, 20 on the learner"
    )
    with pytest.raises(SchemaMismatch, match="the learner runs task 'pick'; the actor must say its task's spec"):
        connect(server, "mute")


def test_a_version_mismatch_names_both(serve, connect):
    server = serve(config={"version": "1.2"})
    mine = TrainerConfig(port_number=server.config.port_number, version="1.1")
    with pytest.raises(SchemaMismatch, match=r"version: '1.1' on the actor, '1.2' on the learner; install the same"):
        connect(mine)


def test_larger_limits_are_refused_at_the_handshake(serve, connect):
    server = serve(config={"limits": Limits(frame_bytes=1 << 20)})
    with pytest.raises(SchemaMismatch, match=r"limits.frame_bytes: 268435456 on the actor, 1048576 on the learner"):
        connect(TrainerConfig(port_number=server.config.port_number))


def test_another_protocol_version_is_refused_naming_both(serve, started, monkeypatch):
    script = started(Script(serve().config.port_number))
    wire = {"v": PROTOCOL + 1, "r": 5, "new": "fields"}
    reply = script.ask(msgpack.packb(wire))
    assert reply.request_id == 5
    with pytest.raises(ProtocolMismatch, match=f"the learner speaks protocol {PROTOCOL}, this peer {PROTOCOL + 1}"):
        reply.raise_error()


def test_a_client_of_another_protocol_says_so(serve, connect, monkeypatch):
    server = serve()
    monkeypatch.setattr("serl_transport.connection.link.PROTOCOL", PROTOCOL + 1)
    with pytest.raises(ProtocolMismatch, match=f"the learner speaks protocol {PROTOCOL}, this client {PROTOCOL + 1}"):
        connect(server)


def test_an_absent_learner_is_waited_for_aloud(started):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = TrainerConfig(port_number=port, broadcast_port=port + 1 if port < 65535 else 1)
    waits, clients = [], []
    starter = threading.Thread(
        target=lambda: clients.append(TrainerClient("robot-1", "127.0.0.1", config, on_wait=waits.append))
    )
    starter.start()
    eventually(lambda: len(waits) >= 2, "two waiting messages")
    said = rf"waiting for learner at 127.0.0.1:{port} \(\d+ s\)(: nothing listens .* \(check ip= and port=\))?"
    assert re.fullmatch(said, waits[0])
    server = TrainerServer(TrainerConfig(port_number=port, broadcast_port=0))
    server.start(threaded=True)
    started(server)
    starter.join(WAIT)
    started(clients[0])
    with pytest.raises(ServerSilent, match=r"no learner at 127.0.0.1:1 in \d+\.\d s; is it running, on that port"):
        TrainerClient("x", "127.0.0.1", TrainerConfig(port_number=1), wait_for_server=False, timeout_ms=200)


def test_a_name_in_use_and_bad_addresses_are_one_message(serve, connect, tmp_path):
    server = serve()
    connect(server, spool_dir=tmp_path)
    with pytest.raises(SpoolBusy, match="another unique_identifier="):
        connect(server, spool_dir=tmp_path)
    with pytest.raises(ValueError, match=r"cannot connect to tcp://no such host:.*; check ip= and port="):
        TrainerClient("x", "no such host", server.config)
    with pytest.raises(ValueError, match="port_number: expected a port from 0 to 65535, got 70000"):
        TrainerConfig(port_number=70000)
    with pytest.raises(ValueError, match="port_number and broadcast_port must differ, both are 5588"):
        TrainerConfig(broadcast_port=5588)


# Listening


def test_a_port_in_use_is_one_clear_error(serve):
    server = serve()
    port = server.config.port_number
    with pytest.raises(CannotListen, match=rf"127.0.0.1:{port}: Address already in use. .* another port="):
        TrainerServer(TrainerConfig(port_number=port, broadcast_port=0))
    with pytest.raises(CannotListen, match="another broadcast_port="):
        TrainerServer(TrainerConfig(port_number=0, broadcast_port=server.config.broadcast_port))


def test_an_open_bind_needs_the_word_insecure(caplog):
    with pytest.raises(ValueError, match=r"bind_host=0.0.0.0 can be reached from other machines and has no keys"):
        TrainerServer(TrainerConfig(bind_host="0.0.0.0"))
    server = TrainerServer(TrainerConfig(port_number=0, broadcast_port=0, bind_host="0.0.0.0", insecure=True))
    server.stop()
    assert "listening on 0.0.0.0 without keys" in caplog.text


def test_ports_are_free_after_stop(serve, connect):
    server = serve()
    config = server.config
    server.stop()
    again = TrainerServer(config)
    again.stop()


# Hostile bytes


def test_junk_to_the_port_does_not_hurt_an_honest_client(serve, connect, started):
    server = serve(handlers={"request": lambda peer, envelope, body: {"ok": True}})
    port = server.config.port_number
    rng = np.random.default_rng(0)
    for _ in range(30):  # not even ZMTP
        with socket.create_connection(("127.0.0.1", port), timeout=5) as raw:
            raw.sendall(rng.bytes(2000))
    script = started(Script(port))
    hello = Envelope("request", "x", "b", 0, 1, "y").to_frame()
    for frames, code in [
        ([b""], "bad_frame"),
        ([b"\xc1" * 10], "bad_frame"),
        ([msgpack.packb([1, 2])], "bad_frame"),
        ([msgpack.packb({"v": PROTOCOL, "k": 5, "a": "", "b": "", "s": 0, "r": 0, "t": ""})], "bad_frame"),
        ([msgpack.packb({"v": PROTOCOL, "k": "x" * 300, "a": "", "b": "", "s": 0, "r": 0, "t": ""})], "bad_frame"),
        ([bytes(70_000)], "bad_frame"),
        ([Envelope("nonsense", "x").to_frame()], "unknown_kind"),
        ([hello], "hello_required"),
        ([Envelope("hello", "x").to_frame(), b"junk"], "bad_frame"),
        ([Envelope("hello", "x").to_frame(), bytes(2 << 20)], "too_large"),
    ]:
        reply = script.ask(*frames)
        assert reply.error is not None
        assert reply.error[0] == code
        assert server.router.counters[code] > 0
    for _ in range(200):  # a fuzzed envelope or body is answered with something typed, or is a valid message
        frames = [bytearray(hello), bytearray(pack({"a": 1})[0])]
        frame = frames[rng.integers(2)]
        frame[rng.integers(len(frame))] = rng.integers(256)
        reply = script.ask(*map(bytes, frames))
        assert reply.error is None or type(WireError.from_code(*reply.error)) is not WireError
    assert connect(server).request("any") == {"ok": True}


def test_a_connection_speaks_for_the_actor_it_said_hello_as(serve, started):
    server = serve()
    script = started(Script(server.config.port_number))
    hello = {"version": server.config.version, "spec": None, "limits": asdict(server.config.limits)}
    assert script.ask(Envelope("hello", "robot-1", "b").to_frame(), *pack(hello)).error is None
    assert script.ask(Envelope("heartbeat", "robot-1", "b").to_frame()).error is None
    reply = script.ask(Envelope("heartbeat", "robot-2", "b").to_frame())
    assert reply.error == ("unauthorized", "this connection said hello as 'robot-1', not as 'robot-2'")


def test_a_process_that_forgets_to_stop_still_ends(serve):
    port = serve().config.port_number
    code = (
        "from serl_transport import TrainerClient, TrainerConfig, TrainerServer\n"
        f"client = TrainerClient('robot-1', '127.0.0.1', TrainerConfig(port_number={port}))\n"
        "client.send_item({'x': 1}); client.on_notify(print)\n"
        "TrainerServer(TrainerConfig(port_number=0, broadcast_port=0)).start(threaded=True)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=WAIT, check=False).returncode == 0


def test_a_frame_above_the_limit_cuts_its_sender_off_only(serve, connect, started):
    server = serve(config={"limits": Limits(frame_bytes=1 << 20)}, handlers={"request": lambda *_: {"ok": True}})
    client = connect(server)
    script = started(Script(server.config.port_number))
    script.socket.send_multipart([Envelope("request", "x").to_frame(), bytes(2 << 20)])
    assert not script.socket.poll(300)
    assert client.request("any") == {"ok": True}


def test_a_connection_forgotten_by_the_server_says_hello_again_by_itself(serve, connect):
    server = serve(handlers={"request": lambda *_: {"ok": True}})
    client = connect(server)
    server.call_soon(server.router.peers.clear)
    eventually(lambda: not server.router.peers or server.router.counters["hello_required"], "the server forgot")
    assert client.request("any") == {"ok": True}
    assert server.router.counters["hello_required"] > 0


@pytest.mark.parametrize("place", ["seq", "array"])
def test_a_message_changed_on_its_way_is_refused_and_sent_again(serve, connect, monkeypatch, place):
    monkeypatch.setattr("serl_transport.delivery.outbox.RETRY_S", 0.05)
    taken = []
    server = serve(data_callback=lambda name, payload: taken.append(payload))
    client = connect(server)
    send, flips = client._data._transmit, []

    def flip_once(parts):
        envelope = Envelope.from_frame(parts[0])
        if envelope.kind != "data" or flips:
            return send(parts)
        flips.append(place)
        if place == "array":
            return send([*parts[:-1], bytes(len(parts[-1]))])
        return send([parts[0].replace(b"\xa1s\x01", b"\xa1s\x09"), *parts[1:]])

    client._data._transmit = flip_once
    client.send_item({"x": np.arange(5)})
    assert client.flush(WAIT)
    assert flips
    assert [payload["last_id"] for payload in taken] == [1]
    np.testing.assert_array_equal(taken[0]["data"][0]["x"], np.arange(5))
    assert server.router.counters["corrupt"] == 1


def test_a_reply_changed_on_its_way_is_not_believed(serve, connect, monkeypatch):
    server = serve(config={"request_types": ["x"]}, request_callback=lambda kind, payload: {"n": 1})
    client = connect(server)
    right = Envelope._sum
    monkeypatch.setattr(
        Envelope, "_sum", lambda self, stem, frames: bytes(8) if self.kind == "reply" else right(self, stem, frames)
    )
    spoilt = Envelope("reply", request_id=1).to_frame([])
    monkeypatch.setattr(Envelope, "_sum", right)
    with pytest.raises(WireError, match="changed on its way"):
        Envelope.from_frame(spoilt).check([])
    assert client.request("x") == {"n": 1}


def test_a_late_hello_required_is_obeyed_although_nobody_waits_for_it(serve, connect):
    """A slow server answers a heartbeat after the next one was sent: the client must say hello all the same."""
    server = serve(handlers={"request": lambda *_: {"ok": True}})
    client = connect(server)
    link, hellos = client._control, server.router.counters["hello"]
    late = Envelope("reply", boot_id=server.router.boot_id, request_id=10**6, error=("hello_required", "who are you"))
    old = Envelope("reply", boot_id=server.router.boot_id, request_id=1, error=("hello_required", "who are you"))
    link.loop.call_soon(lambda: link._take_reply(old, []))
    assert client.request("any") == {"ok": True}
    assert server.router.counters["hello"] == hellos
    link.loop.call_soon(lambda: link._take_reply(late, []))
    eventually(lambda: server.router.counters["hello"] == hellos + 1, "hello was said again")
    assert client.request("any") == {"ok": True}
