"""An actor's end of a line on one host, against a gateway's end that this file plays, well and badly."""

import os
import random
import secrets
import socket
import struct
import threading
import time

import msgpack
import numpy as np
import pytest

from serl_transport import same_host
from serl_transport.contract.errors import BadFrame, NotReady
from serl_transport.same_host import SLOTS, TOKEN_BYTES, AskLine, LineReply, answer_message, check_note, machine_id
from serl_transport.wire.codec import pack, unpack

SLOT = 1 << 16
BODY = {"image": np.arange(30_000, dtype=np.uint8).reshape(100, 300), "state": np.zeros(3)}


class FarEnd:
    """A gateway's end, one step at a time."""

    def __init__(self, name: bytes | None = None):
        self.name = name or b"flowserl-test-" + secrets.token_hex(8).encode()
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(b"\0" + self.name)
        self.listener.listen()
        self.listener.settimeout(10)
        self.memory = os.memfd_create("test")
        os.ftruncate(self.memory, SLOTS * SLOT)
        self.offer = {"name": self.name, "token": self.token}

    def accept(self, welcome: bytes = msgpack.packb([SLOTS, SLOT]), fds: int = 1) -> None:
        self.peer, _ = self.listener.accept()
        self.peer.settimeout(10)
        assert self.peer.recv(100) == self.token
        socket.send_fds(self.peer, [welcome], [self.memory] * fds)

    def question(self) -> tuple[int, int, list]:
        request_id, slot, note = msgpack.unpackb(self.peer.recv(1 << 17))
        return request_id, slot, msgpack.unpackb(note)

    def frames(self, note: list) -> list[bytes]:
        return [note[0], *(os.pread(self.memory, size, at) for at, size in note[1:])]

    def stop(self) -> None:
        for end in (getattr(self, "peer", None), self.listener):
            if end is not None:
                end.close()
        os.close(self.memory)


@pytest.fixture
def far(started):
    return started(FarEnd())


@pytest.fixture
def line(far):
    line = AskLine.connect(far.offer)
    assert not line.ready
    far.accept()
    assert line.ready
    yield line
    line.close()


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[key], right[key]) for key in left)


def test_a_question_and_its_answer(line, far):
    assert line.send(7, pack(BODY))
    request_id, _, note = far.question()
    assert request_id == 7
    assert same(unpack(far.frames(note)), BODY)
    far.peer.send(answer_message(7, None, None, [b"header", b"bytes"]))
    assert line.receive(5) == LineReply(7, None, [b"header", b"bytes"])
    assert line.receive(0.01) is None
    assert line.send(8, pack(BODY))
    far.peer.send(answer_message(8, ("not_ready", "later"), None, None))
    assert line.receive(5) == LineReply(8, ("not_ready", "later"), None)


def test_a_large_answer_lies_in_the_questions_slot_and_is_copied(line, far):
    assert line.send(1, pack(BODY))
    _, slot, _ = far.question()
    os.pwrite(far.memory, b"large", slot * SLOT + 8)
    far.peer.send(answer_message(1, None, [b"h", [slot * SLOT + 8, 5]], None))
    reply = line.receive(5)
    os.pwrite(far.memory, b"other", slot * SLOT + 8)
    assert reply.frames == [b"h", b"large"]


def test_questions_that_wait_keep_their_slots_until_they_are_answered(line, far):
    assert [line.send(i, pack(BODY)) for i in range(SLOTS + 1)] == [True] * SLOTS + [False]
    assert len({far.question()[1] for _ in range(SLOTS)}) == SLOTS
    far.peer.send(answer_message(1, None, None, [b"late"]))
    assert line.send(9, pack(BODY)), "the late answer has freed a slot"


def test_what_does_not_fit_goes_another_way(line, far):
    assert not line.send(1, [b"h", bytes(SLOT + 1)])
    assert not line.send(1, [bytes(same_host.MOST_BYTES)])
    assert line.send(1, [b"h", bytes(SLOT - 1000)])


@pytest.mark.parametrize(
    "message",
    [b"junk", msgpack.packb(5), msgpack.packb([1, None, None]), msgpack.packb([2, None, None, []]),
     msgpack.packb([1, 5, None, None]), msgpack.packb([1, None, [b"h", [0, SLOTS * SLOT + 1]], None]),
     msgpack.packb([1, None, [b"h", [-1, 4]], None]), msgpack.packb([1, None, [5], None]), b"\xdd\xff\xff\xff\xff"],
)  # fmt: skip
def test_nonsense_ends_the_line(line, far, message):
    assert line.send(1, pack(BODY))
    far.peer.send(message)
    with pytest.raises(EOFError):
        line.receive(5)


def test_the_end_of_the_gateway_is_noticed_at_once(line, far):
    assert line.send(1, pack(BODY))
    far.peer.close()
    with pytest.raises(EOFError):
        line.receive(5)
    with pytest.raises(EOFError):
        line.send(2, pack(BODY))


@pytest.mark.parametrize(
    ("welcome", "fds"),
    [(b"junk", 1), (b"", 1), (msgpack.packb([SLOTS, SLOT]), 0), (msgpack.packb([SLOTS, SLOT + 4096]), 1),
     (msgpack.packb([0, SLOT]), 1), (msgpack.packb([1, 1 << 62]), 1), (msgpack.packb([-1, -1]), 1),
     (msgpack.packb(["a", None]), 1)],
)  # fmt: skip
def test_a_welcome_that_is_none(far, welcome, fds):
    line = AskLine.connect(far.offer)
    far.accept(welcome, fds)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(EOFError):
        assert line.ready
    assert len(os.listdir("/proc/self/fd")) == before, "the descriptor that came was closed"
    line.close()


@pytest.mark.parametrize(
    "offer",
    [None, 5, {}, {"name": b"x"}, {"name": b"nobody-listens-here", "token": b"t"}, {"name": "text", "token": b"t"},
     {"name": b"x" * 4000, "token": b"t"}, {"name": b"", "token": None}],
)  # fmt: skip
def test_offers_that_lead_nowhere(offer):
    assert AskLine.connect(offer) is None


def test_somebody_elses_socket_is_not_trusted(far, monkeypatch):
    monkeypatch.setattr(same_host, "peer_of", lambda connection: (1, os.getuid() + 1))
    assert AskLine.connect(far.offer) is None
    peer, _ = far.listener.accept()
    assert peer.recv(100) == b"", "not even the token was sent"
    peer.close()


def test_notes_are_believed_only_inside_their_slot():
    rng = random.Random(7)
    good = [b"h", [SLOT, 10], [2 * SLOT - 5, 5], [2 * SLOT, 0]]
    assert check_note(good, SLOT, SLOT) == [1, 10, 5, 0]
    values = [None, True, -1, 0, 5, SLOT - 1, SLOT, 2 * SLOT, 1 << 62, -(1 << 62), 1.5, "x", b"x", [], [0], {}]
    accepted = 0
    for _ in range(5000):
        note = [rng.choice([b"h", b"", *values]), *([rng.choice(values), rng.choice(values)] for _ in range(2))]
        note = rng.choice([note, note, note, rng.choice(values), [*note, rng.choice(values)]])
        try:
            sizes = check_note(note, SLOT, SLOT)
        except BadFrame:
            continue
        accepted += 1
        assert len(sizes) == len(note)
        assert all(at >= SLOT and size >= 0 and at + size <= 2 * SLOT for at, size in note[1:])
    assert accepted


# The asker, with a server that offers such a line.


@pytest.fixture
def lined(serve, connect, far):
    """(client, far end, bodies that came over TCP) before its line is accepted."""
    over_tcp = []

    def infer(peer, envelope, body):
        over_tcp.append(body)
        return {"way": "tcp"}

    server = serve(handlers={"infer": infer})
    machines = []

    def hello(peer, body):
        machines.append(body.get("machine"))
        return {"line": far.offer if body.get("machine") else None}

    server.on_hello(hello)
    client = connect(server)
    assert client.infer({}) == {"way": "tcp"}
    return client, far, over_tcp


def answered_by(far, *messages):
    """Answer the next questions in a thread; each message is made from the question's request id."""

    def run():
        for message in messages:
            request_id, _, _ = far.question()
            far.peer.send(message(request_id))

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_the_asker_takes_the_line_and_goes_back_to_tcp(lined):
    client, far, over_tcp = lined
    while client.infer({})["way"] != "tcp" or not over_tcp:
        time.sleep(0.01)
    far.accept()
    ways = answered_by(
        far,
        lambda i: answer_message(i, None, None, [bytes(f) for f in pack({"way": "line"})]),
        lambda i: answer_message(i, ("not_ready", "later"), None, None),
        lambda i: answer_message(i, None, None, None),  # too large for the line
        lambda i: answer_message(i, None, None, []),
    )
    assert client.infer({}) == {"way": "line"}
    assert client.asks_over_line
    with pytest.raises(NotReady, match="later"):
        client.infer({})
    before = len(over_tcp)
    assert client.infer({"n": 1}) == {"way": "tcp"}
    assert client.infer({}) == {}
    assert len(over_tcp) == before + 1
    ways.join()
    far.peer.close()
    assert client.infer({"n": 2}) == {"way": "tcp"}, "the gateway has hung up"
    far.accept()  # it said hello again, so it was offered a line again
    ways = answered_by(far, lambda i: answer_message(i, None, None, [bytes(f) for f in pack({"way": "line"})]))
    assert client.infer({}) == {"way": "line"}
    ways.join()


@pytest.mark.parametrize("message", [b"junk", b"\xc1", struct.pack("<Q", 7)])
def test_a_line_that_never_served_is_not_asked_for_again(lined, message):
    client, far, _ = lined
    far.accept()
    thread = answered_by(far, lambda i: message)
    assert client.infer({"n": 1}) == {"way": "tcp"}
    thread.join()
    assert client.infer({"n": 2}) == {"way": "tcp"}
    far.listener.settimeout(0.3)
    with pytest.raises(TimeoutError):
        far.listener.accept()


def test_no_line_where_it_is_switched_off_or_the_host_is_another(serve, connect, far):
    seen = []
    server = serve(handlers={"infer": lambda peer, envelope, body: {}})
    server.on_hello(lambda peer, body: seen.append((body["link"], body.get("machine"))))
    connect(server, "on").infer({})
    connect(server, "off", use_line=False).infer({})
    assert [machine for link, machine in seen if link == "infer"] == [machine_id(), None]
    assert {machine for link, machine in seen if link != "infer"} == {None}
