"""Exactly once: every item that `send_item` took is stored once, whichever process is killed with SIGKILL and when."""

import hashlib
import json
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter

import numpy as np
import pytest
from transport_samples import batch, spec

from serl_transport import TrainerConfig
from serl_transport.contract.errors import BadFrame, Refused, StorageFull, TooLarge
from serl_transport.contract.schema import StepBatch
from serl_transport.delivery.dedup import SeenItems
from serl_transport.delivery.outbox import Ledger
from serl_transport.delivery.spool import DiskSpool
from serl_transport.parameters.params import Offer, pull, read_chunk
from serl_transport.wire.blob import join
from serl_transport.wire.codec import Limits, pack, unpack

WAIT = 30.0

# A learner in small: journals (actor, boot, seq, value) with fsync, acknowledges a whole group 20 ms later.
LEARNER = """
import os, sys
from serl_transport import TrainerConfig, TrainerServer
from serl_transport.wire.codec import unpack
from serl_transport.delivery.dedup import SeenItems

port, path = int(sys.argv[1]), sys.argv[2]
journal = open(path, "a+b")
journal.seek(0)
lines = journal.read().split(b"\\n")
journal.truncate(sum(len(line) + 1 for line in lines[:-1]))  # a torn last line was never acknowledged
seen = SeenItems()
for line in lines[:-1]:
    actor, boot, seq, _ = line.decode().split()
    seen.add(actor, boot, int(seq))
server = TrainerServer(TrainerConfig(port_number=port, broadcast_port=0))
group = []

def commit():
    global group
    for envelope, value in group:
        if seen.add(envelope.actor_id, envelope.boot_id, envelope.seq):
            journal.write(f"{envelope.actor_id} {envelope.boot_id} {envelope.seq} {value}\\n".encode())
    journal.flush()
    os.fsync(journal.fileno())
    for envelope, _ in group:
        server.reply(envelope.token, {})
    group = []

def data(peer, envelope, frames):
    if not group:
        server.loop.call_later(0.02, commit)
    group.append((envelope, unpack(frames)["value"]))

server.handle("data", data, raw=True)
print(server.config.port_number, flush=True)
server.start()
"""

# An actor that sends values 0, 1, 2 ... and tells which ones send_item took.
ACTOR = """
import sys, time
from serl_transport import TrainerClient, TrainerConfig
port, spool, first, count = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
client = TrainerClient("robot-1", "127.0.0.1", TrainerConfig(port_number=port), spool_dir=spool)
for value in range(first, first + count):
    client.send_item({"value": value})
    print(value, flush=True)
    time.sleep(0.001)
print("flushed", client.flush(30), flush=True)
client.stop()
"""


class Process:
    """A python script in a process of its own, its lines readable."""

    def __init__(self, code: str, *arguments):
        command = [sys.executable, "-c", code, *map(str, arguments)]
        self.popen = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.popen.stdout is not None
        self.lines = self.popen.stdout

    def kill_9(self) -> list[str]:
        """Kill it; returns the lines that were still to be read."""
        self.popen.send_signal(signal.SIGKILL)
        rest = self.lines.read().split("\n")
        self.popen.wait()
        return [line for line in rest if line]

    def stop(self) -> None:
        if self.popen.poll() is None:
            self.kill_9()


def stored_values(path) -> list[int]:
    return [int(line.split()[3]) for line in path.read_text().splitlines()]


def test_exactly_once_over_kills_of_learner_and_actor(started, tmp_path):
    journal, spool = tmp_path / "journal", tmp_path / "spool"
    learner = started(Process(LEARNER, 0, journal))
    port = int(learner.lines.readline())
    actor = started(Process(ACTOR, port, spool, 0, 5000))
    taken = []

    def read_until(value: int) -> None:
        while not taken or taken[-1] < value:
            taken.append(int(actor.lines.readline()))

    read_until(150)
    learner.kill_9()
    read_until(300)  # taken while nobody listens
    learner = started(Process(LEARNER, port, journal))
    assert int(learner.lines.readline()) == port
    read_until(600)
    taken += [int(line) for line in actor.kill_9()]

    second = started(Process(ACTOR, port, spool, 10_000, 50))
    lines = [second.lines.readline().strip() for _ in range(51)]
    assert lines[-1] == "flushed True"
    taken += [int(line) for line in lines[:-1]]
    assert second.popen.wait(WAIT) == 0
    learner.kill_9()

    stored = Counter(stored_values(journal))
    assert [value for value in taken if not stored[value]] == [], "taken by send_item and lost"
    assert [value for value, times in stored.items() if times > 1] == [], "stored twice"
    # at most the one item that was spooled just before the kill, its line not yet printed
    assert len(set(stored) - set(taken)) <= 1
    assert len(DiskSpool(spool)) == 0


def test_a_server_restart_on_the_same_port_is_noticed_and_survived(serve, connect, caplog):
    first = serve(handlers={"request": lambda *_: {"server": 1}})
    client = connect(first)
    assert client.request("any") == {"server": 1}
    ports = {"port_number": first.config.port_number, "broadcast_port": first.config.broadcast_port}
    first.stop()
    client.send_item({"value": 1})  # nobody there
    got = []

    def data(peer, envelope, body):
        got.append(body["value"])
        return {}

    serve(config=ports, handlers={"request": lambda *_: {"server": 2}, "data": data})
    assert client.request("any", timeout_ms=WAIT * 1e3) == {"server": 2}
    assert client.flush(WAIT)
    assert got == [1]
    assert "has restarted" in caplog.text


def test_the_acknowledgement_waits_for_the_learners_word(serve, connect, tmp_path):
    tokens = []
    server = serve(raw_handlers={"data": lambda peer, envelope, frames: tokens.append((envelope.seq, envelope.token))})
    client = connect(server, spool_dir=tmp_path)
    assert [client.send_item({"value": i}) for i in range(3)] == [1, 2, 3]
    deadline = time.monotonic() + WAIT
    while len(tokens) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [seq for seq, _ in tokens] == [1, 2, 3]
    assert not client.flush(0.1)
    for _, token in tokens[:2]:
        server.reply(token, {})
    server.reply(tokens[0][1], {})  # acknowledged twice: harmless
    while client.backlog > 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert client.backlog == 1
    server.reply(tokens[2][1], {})
    assert client.flush(WAIT)


def test_a_full_learner_gets_the_item_later_in_order(serve, connect, monkeypatch):
    monkeypatch.setattr("serl_transport.delivery.outbox.RETRY_S", 0.05)
    got, refusals = [], []

    def data(peer, envelope, body):
        if len(refusals) < 3:
            refusals.append(body["value"])
            raise StorageFull("the learner's disk is full")
        got.append(body["value"])
        return {}

    client = connect(serve(handlers={"data": data}))
    for value in range(5):
        client.send_item({"value": value})
    assert client.flush(WAIT)
    assert sorted(got) == [0, 1, 2, 3, 4]
    assert len(refusals) == 3


def test_an_item_the_learner_refuses_does_not_hold_up_the_others(serve, connect, tmp_path, caplog):
    got = []

    def data(peer, envelope, body):
        if body["value"] == 1:
            raise Refused("episode e1 is closed")
        got.append(body["value"])
        return {}

    client = connect(serve(handlers={"data": data}), spool_dir=tmp_path)
    for value in range(3):
        client.send_item({"value": value})
    assert client.flush(WAIT)
    assert (got, client.refused_items) == ([0, 2], 1)
    assert [path.read_text() for path in (tmp_path / "refused").glob("*.txt")] == ["refused: episode e1 is closed\n"]
    assert "the learner refused item 2 (refused)" in caplog.text


def test_step_batches_arrive_intact_and_the_ledger_names_them(serve, connect, tmp_path):
    got, sums = [], []

    def data(peer, envelope, frames):
        sums.append(zlib.crc32(join(frames)))
        got.append(StepBatch.from_body(unpack(frames), spec()))
        return {}

    server = serve(raw_handlers={"data": data}, spec=spec())
    client = connect(server, spec=spec(), spool_dir=tmp_path / "spool", ledger_path=tmp_path / "acked.jsonl")
    sent = [batch(0, 3), batch(3, 2), batch(5, 1, final=True)]
    for item in sent:
        client.send_item(item.to_body())
    assert client.flush(WAIT)
    for mine, theirs in zip(sent, got, strict=True):
        for key, rows in mine.arrays.items():
            np.testing.assert_array_equal(theirs.arrays[key], rows)
    rows = [json.loads(line) for line in (tmp_path / "acked.jsonl").read_text().splitlines()]
    assert rows == [
        {"boot": client.boot_id, "seq": i + 1, "crc32": sums[i], "episode_id": "e1", "first_tick": tick, "n": n}
        for i, (tick, n) in enumerate([(0, 3), (3, 2), (5, 1)])
    ]


def test_an_oversize_item_is_refused_before_it_enters_the_spool(serve, connect):
    server = serve(config={"limits": Limits(frame_bytes=1000)})
    client = connect(TrainerConfig(port_number=server.config.port_number, limits=Limits(frame_bytes=1000)))
    with pytest.raises(TooLarge, match="a frame of 2000 bytes, the limit is 1000"):
        client.send_item({"x": np.zeros(2000, np.uint8)})
    assert client.backlog == 0


def test_seen_items_equals_a_plain_set():
    rng = np.random.default_rng(3)
    seen, plain = SeenItems(), set()
    for seq in rng.integers(1, 120, 600).tolist():
        assert seen.add("a", "b", seq) is ((seq) not in plain)
        plain.add(seq)
    assert all((("a", "b", seq) in seen) is (seq in plain) for seq in range(130))
    assert ("a", "other boot", 1) not in seen
    # every seq joined its neighbours: 1, 2, 3, 5 make two ranges
    small = SeenItems()
    for seq in (1, 3, 2, 5):
        small.add("a", "b", seq)
    assert small._ranges["a", "b"] == [(1, 3), (5, 5)]


def test_items_are_packed_when_sent_not_later(serve, connect):
    got = []

    def data(peer, envelope, body):
        got.append(set(body["x"].tolist()))
        return {}

    client = connect(serve(handlers={"data": data}))
    buffer = np.zeros(300, np.int64)
    for value in range(3):
        buffer[:] = value  # the robot reuses its buffer at once
        client.send_item({"x": buffer})
    assert client.flush(WAIT)
    assert got == [{0}, {1}, {2}]
    assert len(pack({"x": buffer})) == 2


def test_a_ledger_that_cannot_be_written_delays_the_forgetting(serve, connect, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("serl_transport.delivery.outbox.RETRY_S", 0.05)
    failures = iter([OSError(28, "No space left on device")] * 2)
    real = Ledger.write

    def full_twice(self, acknowledged):
        for failure in failures:
            raise failure
        real(self, acknowledged)

    monkeypatch.setattr(Ledger, "write", full_twice)
    path = tmp_path / "acked.jsonl"
    client = connect(serve(handlers={"data": lambda *_: {}}), ledger_path=path)
    client.send_item({"value": 1})
    assert client.flush(WAIT)
    assert [json.loads(line)["seq"] for line in path.read_text().splitlines()] == [1]
    assert "the ledger cannot be written, trying again" in caplog.text


class Ready:
    """A reply that is here."""

    def __init__(self, reply: dict | Exception):
        self.reply = reply

    def result(self, timeout_s: float) -> dict:
        if isinstance(self.reply, Exception):
            raise self.reply
        return self.reply


def test_many_chunks_and_odd_sizes_arrive_whole(monkeypatch):
    monkeypatch.setattr("serl_transport.parameters.params.CHUNK_BYTES", 64)
    rng = np.random.default_rng(0)
    frames = pack({f"t{i}": rng.integers(0, 256, n, np.uint8) for i, n in enumerate((0, 1, 7, 64, 65, 500, 3))})
    offer = Offer.of(1, join(frames))
    assert offer.chunks > 8
    published = pull(lambda payload: Ready(read_chunk(offer, payload)))
    assert bytes(published.blob) == join(frames)
    assert published.sha256 is None
    empty = Offer.of(2, b"")
    assert bytes(pull(lambda payload: Ready(read_chunk(empty, payload))).blob) == b""


def test_a_version_that_is_replaced_while_it_is_pulled_is_pulled_anew(monkeypatch):
    monkeypatch.setattr("serl_transport.parameters.params.CHUNK_BYTES", 64)
    offers = [Offer.of(version, bytes([version]) * 2000) for version in (1, 2, 3)]
    asked = []

    def ask(payload, changes=(5, 20)):
        asked.append(payload)
        held = offers[sum(len(asked) > change for change in changes)]
        try:
            return Ready(read_chunk(held, payload))
        except Refused as error:
            return Ready(error)

    assert pull(ask).blob == bytes([3]) * 2000
    asked.clear()
    with pytest.raises(Refused, match="version 1 is not held, the newest is 2"):
        pull(ask, 1)
    asked.clear()
    with pytest.raises(Refused, match="3 times in a row"):
        pull(lambda payload: ask(payload, [9, 18, 27]) if len(asked) < 27 else ask(payload, []))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": np.zeros(3, np.uint8)}, "does not match its sha256"),
        ({"data": np.zeros(0, np.uint8)}, "version 4 ends at 0 of 3 bytes"),
        ({"data": np.zeros(4, np.uint8)}, "version 4 has 3 bytes, and more came"),
        ({"data": None}, "a reply to params is"),
        ({"total_bytes": "3"}, "a reply to params is"),
    ],
)
def test_parameters_that_do_not_add_up_are_refused(change, message):
    digest = hashlib.sha256(b"abc").hexdigest()
    offer = Offer.of(4, b"abc", digest)
    whole = pull(lambda payload: Ready(read_chunk(offer, payload)))
    assert (whole.version, bytes(whole.blob), whole.sha256) == (4, b"abc", digest)
    with pytest.raises(BadFrame, match=message):
        pull(lambda payload: Ready({**read_chunk(offer, payload), **change}))


@pytest.mark.parametrize(
    ("payload", "error"),
    [
        ({"version": 3}, Refused),
        ({"number": -1}, BadFrame),
        ({"number": 1 << 40}, BadFrame),
        ({"number": "0"}, BadFrame),
    ],
)
def test_a_chunk_that_does_not_exist_is_refused(payload, error):
    with pytest.raises(error):
        read_chunk(Offer.of(4, b"abc"), payload)


class Slow:
    """A server that answers data in order, one every `pace_s`, and passes over what it is told to; counts what came."""

    def __init__(self, server, pace_s, pass_over=()):
        self.came, self._pass_over = Counter(), set(pass_over)
        self._server, self._pace_s, self._due = server, pace_s, []
        server.handle("data", self._data, raw=True)
        server.call_soon(self._answer)

    def _data(self, peer, envelope, frames):
        self.came[envelope.seq] += 1
        if envelope.seq in self._pass_over:
            self._pass_over.discard(envelope.seq)  # lost once
        else:
            self._due.append(envelope.token)

    def _answer(self):
        if self._due:
            self._server.reply(self._due.pop(0), {})
        self._server.loop.call_later(self._pace_s, self._answer)


@pytest.fixture
def short_patience(monkeypatch):
    monkeypatch.setattr("serl_transport.client.RESEND_S", 0.5)


def test_a_slow_learner_is_sent_nothing_twice(serve, connect, short_patience):
    slow = Slow(server := serve(), 0.05)
    client = connect(server)
    for value in range(40):  # the last one is answered after two seconds, four times the patience
        client.send_item({"value": value})
    assert client.flush(WAIT)
    assert set(slow.came.values()) == {1}


@pytest.mark.parametrize("lost", [[7], [40], [*range(1, 41)]])
def test_what_the_learner_passed_over_is_sent_again(serve, connect, short_patience, lost):
    slow = Slow(server := serve(), 0.05, lost)
    client = connect(server)
    for value in range(40):
        client.send_item({"value": value})
    assert client.flush(WAIT)
    assert all(count == 1 + (seq in lost) for seq, count in slow.came.items())
