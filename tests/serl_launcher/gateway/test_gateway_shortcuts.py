"""Shelf and line between gateway and policy server: what is put there arrives, and without them the socket serves."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import msgpack
import numpy as np
import pytest
from gateway_samples import connected, serving
from replay_samples import wait_for

from serl_launcher.gateway.line import MOST_BYTES, Line, LineDesk
from serl_launcher.gateway.shelf import SLOT_BYTES, SLOTS, Shelf, ShelfReader
from serl_launcher.run.internal import PolicyLink
from serl_transport.contract.errors import BadFrame, Internal
from serl_transport.wire.envelope import Envelope
from serl_transport.wire.loop import EventLoop


def frames(seed: int, *sizes: int) -> list[bytes]:
    rng = np.random.default_rng(seed)
    return [rng.bytes(size) for size in sizes]


def test_what_is_put_on_the_shelf_is_read_by_another_mapping() -> None:
    shelf, reader = Shelf(), ShelfReader()
    questions = [frames(i, 10, 70_000 + i, 0, 3) for i in range(3)]
    placed = [shelf.put(question) for question in questions]
    for question, place in zip(questions, placed, strict=True):
        assert place is not None
        assert [bytes(frame) for frame in reader.frames(shelf.where, [place[1]])] == question
    assert all(frame.readonly for frame in reader.frames(shelf.where, [placed[0][1]]))


def test_what_does_not_fit_goes_another_way() -> None:
    shelf = Shelf()
    assert shelf.put(frames(0, 100)) is None  # not worth it
    assert shelf.put([bytes(SLOT_BYTES + 1)]) is None
    taken = [shelf.put([bytes(100_000)]) for _ in range(SLOTS)]
    assert shelf.put([bytes(100_000)]) is None
    shelf.free(taken[3][0])
    assert shelf.put([bytes(100_000)])[0] == taken[3][0]


@pytest.mark.parametrize(
    "note", [b"junk", b"", msgpack.packb(5), msgpack.packb([[0]]), msgpack.packb([[0, SLOTS * SLOT_BYTES + 1]])]
)
def test_malformed_notes_are_refused(note: bytes) -> None:
    shelf, reader = Shelf(), ShelfReader()
    with pytest.raises(BadFrame):
        reader.frames(shelf.where, [note])
    with pytest.raises(Internal, match="cannot reach the gateway's shared memory"):
        ShelfReader().frames("/proc/0/fd/9#x", [note])


def test_a_line_carries_messages_both_ways_and_notices_the_end(tmp_path: Path) -> None:
    loop, got = EventLoop(), []
    desk = LineDesk(tmp_path, loop, lambda envelope, body: got.append((envelope, body)))
    thread = threading.Thread(target=loop.run)
    thread.start()
    try:
        line = Line.connect(tmp_path)
        assert line is not None
        assert line.send(Envelope("infer_reply", request_id=b"t"), [b"abc", b""])
        wait_for(lambda: got)
        assert (got[0][0].request_id, got[0][1]) == (b"t", [b"abc", b""])
        assert not line.send(Envelope("infer_reply"), [bytes(MOST_BYTES)])
        assert desk.send(os.getpid(), Envelope("infer", seq=5), [b"q"])
        assert not desk.send(os.getpid() + 1, Envelope("infer"), [])
        envelope, body = wait_for(line.receive)
        assert (envelope.seq, body) == (5, [b"q"])
        assert line.receive() is None
        second = Line.connect(tmp_path)  # this process again: the first line is hung up
        with pytest.raises(EOFError):
            wait_for(line.receive)
        assert second.send(Envelope("infer_reply", request_id=b"2"), [])
        wait_for(lambda: len(got) == 2)
    finally:
        loop.stop()
        thread.join()
        desk.close()
        loop.close()
    assert Line.connect(tmp_path) is None  # nobody listens any more


@pytest.mark.parametrize("shortcuts", [True, False])
def test_questions_are_answered_with_and_without_shortcuts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shortcuts: bool
) -> None:
    sent: list[int] = []
    send = LineDesk.send
    if not shortcuts:
        monkeypatch.setattr(Line, "send", lambda *args: False)
        monkeypatch.setattr(Shelf, "put", lambda *args: None)
    else:
        monkeypatch.setattr(LineDesk, "send", lambda *args: send(*args) and not sent.append(1))
    image = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)
    stop = threading.Event()
    with serving(tmp_path) as gateway, connected(gateway) as client:
        link = PolicyLink(tmp_path)

        def answer() -> None:
            link.serving(version=1)
            while not stop.is_set():
                request = link.receive(0.05)
                if request is not None:
                    seen = request.body["image"]
                    link.reply(request.token, {"sum": int(seen.sum(dtype=np.int64)), "echo": np.zeros(50_000)})

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            wait_for(lambda: gateway.forwarder.to_status()["alive"])
            for i in range(3 * SLOTS):  # slots come back
                reply = client.infer({"image": image + np.uint8(i)})
                assert reply["sum"] == int((image + np.uint8(i)).sum(dtype=np.int64))
                assert reply["echo"].shape == (50_000,)  # too large for the line
        finally:
            stop.set()
            thread.join()
            link.close()
    assert bool(sent) == shortcuts
