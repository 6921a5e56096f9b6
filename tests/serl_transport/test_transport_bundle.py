"""Several items in one message: what the receiver refuses, and that delivery is as it is for items that come alone."""

import json
import struct
import threading
import time
import zlib

import numpy as np
import pytest
import zmq

from serl_transport import bundle
from serl_transport.contract.errors import BadFrame, Refused, StorageFull, TooLarge, WireError
from serl_transport.delivery.spool import DiskSpool
from serl_transport.wire import codec
from serl_transport.wire.blob import join, split
from serl_transport.wire.codec import DEFAULT_LIMITS, Limits, pack, unpack
from serl_transport.wire.envelope import Envelope

WAIT = 30.0
HEAD, ITEM = struct.Struct("<4sI"), struct.Struct("<QQ")


def items(n: int, size: int = 3000) -> list[tuple[int, list]]:
    """`n` items (seq, frames) with an array of `size` bytes each."""
    return [(seq, pack({"value": seq, "x": np.full(size, seq, np.uint8)})) for seq in range(1, n + 1)]


def left_over(folder, bodies, store: str = "") -> None:
    """A spool in which an earlier process left these items."""
    spool = DiskSpool(folder)
    for body in bodies:
        spool.append([store.encode(), *pack(body)])
    spool.close()


class RawPeer:
    """A connection that has said hello and sends what it likes."""

    def __init__(self, server, name: str = "raw"):
        self.context, self.name = zmq.Context(), name
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.RCVTIMEO, int(WAIT * 1e3))
        self.socket.connect(f"tcp://127.0.0.1:{server.config.port_number}")
        limits = {key: getattr(server.config.limits, key) for key in DEFAULT_LIMITS.__slots__}
        self.send(Envelope("hello", name, "b", 0, 1), pack({"version": server.config.version, "limits": limits}))
        assert self.receive()[0].error is None

    def send(self, envelope: Envelope, frames: list) -> None:
        self.socket.send_multipart([envelope.to_frame(frames), *frames])

    def items(self, request_id: int, frames: list) -> None:
        self.send(Envelope(bundle.ITEMS, self.name, "b", 0, request_id), frames)

    def receive(self) -> tuple[Envelope, dict]:
        first, *frames = self.socket.recv_multipart()
        envelope = Envelope.from_frame(first)
        envelope.check(frames)
        return envelope, unpack(frames) if frames else {}

    def silent(self, ms: int = 200) -> bool:
        return not self.socket.poll(ms)

    def stop(self) -> None:
        self.context.destroy(linger=0)


@pytest.fixture
def raw(started):
    return lambda server, **arguments: started(RawPeer(server, **arguments))


def test_what_is_written_is_read():
    sent = items(5)
    frame = bundle.write(sent)
    got = bundle.read([zmq.Frame(frame)], DEFAULT_LIMITS)
    assert [seq for seq, _ in got] == [1, 2, 3, 4, 5]
    for (_, frames), (_, blob) in zip(sent, got, strict=True):
        assert bytes(blob) == join(frames)
        body = unpack(split(blob))
        np.testing.assert_array_equal(body["x"], unpack(frames)["x"])
        assert not body["x"].flags.writeable


def table(sizes: list[int], count: int | None = None, magic: bytes = b"SJI1", rest: bytes = b"") -> bytes:
    """A head that claims these sizes, and what follows it."""
    rows = b"".join(ITEM.pack(seq, size) for seq, size in enumerate(sizes, 1))
    return HEAD.pack(magic, len(sizes) if count is None else count) + rows + rest


@pytest.mark.parametrize(
    ("frames", "error", "message"),
    [
        ([], BadFrame, "has one frame, got 0"),
        ([b"", b""], BadFrame, "has one frame, got 2"),
        ([b""], BadFrame, "has a head of 8 bytes, got 0"),
        ([b"SJI1"], BadFrame, "has a head of 8 bytes, got 4"),
        ([table([], magic=b"SJB1")], BadFrame, "starts with b'SJI1' and their number"),
        ([table([])], BadFrame, "their number, 1 to 16"),
        ([table([8] * 17, rest=bytes(8 * 17))], BadFrame, "their number, 1 to 16"),
        ([table([], count=1 << 31)], BadFrame, "their number, 1 to 16"),
        ([table([8], count=2)], BadFrame, "cannot hold the table of 2 items"),
        ([table([8, 8], rest=bytes(8))], BadFrame, "2 items of 56 bytes in all, the message has 48"),
        ([table([8], rest=bytes(9))], BadFrame, "1 items of 32 bytes in all, the message has 33"),
        ([table([(1 << 64) - 8, 16], rest=bytes(8))], BadFrame, "2 items of"),
        ([bytes(bundle.MAX_BYTES + (1 << 20))], TooLarge, "in one message, the limit is"),
    ],
)  # fmt: skip
def test_a_table_that_is_none_is_refused(frames, error, message):
    with pytest.raises(error, match=message):
        bundle.read(frames, DEFAULT_LIMITS)


def test_the_sockets_limits_hold_for_the_whole_message():
    with pytest.raises(TooLarge, match="a frame of"):
        bundle.read([bundle.write(items(3))], Limits(frame_bytes=5000))


@pytest.mark.parametrize(
    "refused", [5, [5], [[0, "internal"]], [[3, "internal", ""]], [["0", "internal", ""]], [[-1, "internal", ""]]]
)
def test_a_reply_that_refuses_what_was_not_sent_is_none(refused):
    with pytest.raises(BadFrame, match="refused: "):
        bundle.refusals({"refused": refused}, 3)


def test_what_waits_travels_together_and_arrives_once(serve, connect, tmp_path):
    left_over(tmp_path / "spool", [{"value": i} for i in range(40)])
    got, sums = [], {}

    def data(peer, envelope, frames):
        got.append(unpack(frames)["value"])
        sums[envelope.boot_id, envelope.seq] = zlib.crc32(join(frames))
        return {}

    server = serve(raw_handlers={"data": data})
    client = connect(server, spool_dir=tmp_path / "spool", ledger_path=tmp_path / "acked.jsonl")
    assert client.flush(WAIT)
    assert got == list(range(40))
    assert server.router.counters["data"] == 40
    assert 3 <= server.router.counters["items"] <= 4
    rows = [json.loads(line) for line in (tmp_path / "acked.jsonl").read_text().splitlines()]
    assert {(row["boot"], row["seq"]): row["crc32"] for row in rows} == sums
    assert not server.router._gatherings


def test_stores_and_boots_do_not_share_a_message(serve, connect, tmp_path):
    left_over(tmp_path, [{"value": 0}, {"value": 1}])
    left_over(tmp_path, [{"value": 2}, {"value": 3}])
    left_over(tmp_path, [{"value": 4}, {"value": 5}], store="other")
    got = []
    server = serve(handlers={"data": lambda peer, envelope, body: got.append(
        (envelope.boot_id, envelope.target, envelope.seq, body["value"])) or {}})  # fmt: skip
    client = connect(server, spool_dir=tmp_path)
    assert client.flush(WAIT)
    assert [value for *_, value in got] == [0, 1, 2, 3, 4, 5]
    assert [(store, seq) for _, store, seq, _ in got] == [("", 1), ("", 2)] * 2 + [("other", 1), ("other", 2)]
    assert len({boot for boot, *_ in got}) == 3
    assert server.router.counters["items"] == 3


def test_large_items_travel_alone(serve, connect, tmp_path):
    big = np.zeros(bundle.MAX_BYTES * 2 // 3, np.uint8)
    left_over(tmp_path, [{"x": big}, {"x": big}, {"x": big[:100]}, {"x": big}])
    server = serve(handlers={"data": lambda *_: {}})
    client = connect(server, spool_dir=tmp_path)
    assert client.flush(WAIT)
    assert (server.router.counters["data"], server.router.counters["items"]) == (4, 1)


def test_one_refused_item_goes_aside_and_a_full_disks_one_comes_again(serve, connect, tmp_path, monkeypatch):
    monkeypatch.setattr("serl_transport.delivery.outbox.RETRY_S", 0.05)
    left_over(tmp_path, [{"value": i} for i in range(10)])
    got, full = [], []

    def data(peer, envelope, body):
        value = body["value"]
        if value == 3:
            raise Refused("episode e3 is closed")
        if value == 5 and len(full) < 2:
            full.append(value)
            return StorageFull("the learner's disk is full")
        if value == 7 and len(full) < 2:
            raise KeyError(value)
        got.append(value)
        return {}

    server = serve(handlers={"data": data})
    client = connect(server, spool_dir=tmp_path)
    assert client.flush(WAIT)
    assert sorted(got) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert client.refused_items == 1
    assert [path.read_text() for path in (tmp_path / "refused").glob("*.txt")] == ["refused: episode e3 is closed\n"]
    assert server.router.counters["refused"] == 1
    assert server.router.counters["storage_full"] == 2
    assert server.router.counters["internal"] >= 1


def test_the_reply_waits_for_the_last_item(serve, connect, tmp_path):
    left_over(tmp_path, [{"value": i} for i in range(4)])
    tokens, here = {}, threading.Event()

    def data(peer, envelope, frames):
        tokens[envelope.seq] = envelope.token
        if len(tokens) == 4:
            here.set()

    server = serve(raw_handlers={"data": data})
    client = connect(server, spool_dir=tmp_path)
    assert here.wait(WAIT)
    for seq in (3, 1, 2):
        server.reply(tokens[seq], {})
        server.reply(tokens[seq], Refused("a second answer changes nothing"))
    assert not client.flush(0.2)
    assert client.backlog == 4
    server.reply(tokens[4], {})
    assert client.flush(WAIT)
    server.reply(tokens[4], {})  # nobody waits any more
    assert client.refused_items == 0
    assert not server.router._gatherings


def test_a_message_that_is_refused_as_a_whole_comes_again_one_by_one(serve, connect, tmp_path, monkeypatch):
    left_over(tmp_path, [{"value": i} for i in range(5)])
    monkeypatch.setattr(bundle, "write", lambda items: b"no table of items")
    got = []
    server = serve(handlers={"data": lambda peer, envelope, body: got.append(body["value"]) or {}})
    client = connect(server, spool_dir=tmp_path)
    assert client.flush(WAIT)
    assert got == [0, 1, 2, 3, 4]
    assert client.refused_items == 0
    assert (server.router.counters["items"], server.router.counters["bad_frame"]) == (1, 1)


def test_a_flipped_byte_sends_all_items_again(serve, connect, tmp_path, monkeypatch):
    monkeypatch.setattr("serl_transport.delivery.outbox.RETRY_S", 0.05)
    left_over(tmp_path, [{"value": i} for i in range(5)])
    real, flips = Envelope.check, []

    def check(self, frames):
        if self.kind == bundle.ITEMS and len(flips) < 2:
            frames = [bytearray(memoryview(frames[0]))]
            frames[0][40 + len(flips)] ^= 1
            flips.append(1)
        real(self, frames)

    monkeypatch.setattr(Envelope, "check", check)
    got = []
    server = serve(handlers={"data": lambda peer, envelope, body: got.append(body["value"]) or {}})
    client = connect(server, spool_dir=tmp_path)
    assert client.flush(WAIT)
    assert got == [0, 1, 2, 3, 4]
    assert server.router.counters["corrupt"] == 2


def test_a_repeated_message_is_answered_once_by_its_last_tokens(serve, raw):
    tokens, lock = [], threading.Semaphore(0)

    def data(peer, envelope, frames):
        tokens.append(envelope.token)
        lock.release()

    server = serve(raw_handlers={"data": data})
    peer = raw(server)
    for _ in range(2):
        peer.items(7, [bundle.write(items(2))])
    for _ in range(4):
        assert lock.acquire(timeout=WAIT)
    assert len(set(tokens)) == 4
    for token in tokens[:2]:
        server.reply(token, {})
    assert peer.silent()
    server.reply(tokens[3], {})
    server.reply(tokens[2], Refused("no"))
    envelope, body = peer.receive()
    assert (envelope.request_id, envelope.error) == (7, None)
    assert body == {"refused": [[0, "refused", "no"]]}
    assert peer.silent(50)


def test_a_peer_that_wants_ever_more_answers_is_told_to_wait(serve, raw, monkeypatch):
    monkeypatch.setattr(bundle, "MOST_OPEN", 3)
    server = serve(raw_handlers={"data": lambda *_: None})
    peer = raw(server)
    for request_id in (10, 11, 12, 13):
        peer.items(request_id, [bundle.write(items(2))])
    envelope, _ = peer.receive()
    assert (envelope.request_id, envelope.error[0]) == (13, "not_ready")
    address = next(iter(server.router.peers))
    assert len(server.router._gatherings[address]) == 3
    server.loop.call_soon(lambda: server.router.forget(address))
    deadline = time.monotonic() + WAIT
    while server.router._gatherings and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not server.router._gatherings
    peer.items(14, [bundle.write(items(1))])
    assert peer.receive()[0].error[0] == "hello_required"


def test_silent_peers_leave_no_answers_behind(serve, raw, monkeypatch):
    server = serve(raw_handlers={"data": lambda *_: None}, config={"peer_timeout_s": 0.3})
    peer = raw(server)
    peer.items(10, [bundle.write(items(2))])
    deadline = time.monotonic() + WAIT
    while not server.router._gatherings and server.router.peers and time.monotonic() < deadline:
        time.sleep(0.01)
    while server.router.peers and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not server.router._gatherings


def test_each_item_gets_its_own_verdict(serve, raw):
    """Nested messages, blobs that are none, items above the limits: only they are refused."""
    got = []
    server = serve(handlers={"data": lambda peer, envelope, body: got.append(envelope.seq) or {}},
                   config={"limits": Limits(frames=4)})  # fmt: skip
    good = join(pack({"value": 1}))
    crowded = join(pack({f"x{i}": np.zeros(2000, np.uint8) for i in range(5)}))
    blobs = [good, bundle.write(items(2)), b"", good[:-8], crowded, join([b"\xc1"]), join([]), good]
    peer = raw(server)
    peer.items(20, [table([len(blob) for blob in blobs], rest=b"".join(blobs))])
    envelope, body = peer.receive()
    assert (envelope.request_id, envelope.error) == (20, None)
    codes = {index: code for index, code, _ in body["refused"]}
    assert codes == {1: "bad_frame", 2: "bad_frame", 3: "bad_frame", 4: "too_large", 5: "bad_frame", 6: "bad_frame"}
    assert got == [1, 8]


def test_an_operators_connection_sends_no_items(serve, connect):
    client = connect(serve(handlers={"data": lambda *_: {}}), role="operator")
    with pytest.raises(WireError, match="items is an actor's"):
        client._control.call(bundle.ITEMS, [bundle.write(items(2))])


def test_tokens_of_others_are_refused():
    from serl_transport.connection.router import _read_token

    for token in (b"", b"\x01", codec.msgpack.packb([b"a", 1, 2]), codec.msgpack.packb([b"a", 1, 2, "3"])):
        with pytest.raises(BadFrame, match="not one of ours"):
            _read_token(token)
