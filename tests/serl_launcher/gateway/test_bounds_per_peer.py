"""What one peer may cost the gateway: each limit bites its own peer, is told, and leaves the others alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import zmq
from gateway_samples import connected, serving
from replay_samples import SPEC, batches, info, journal_items, wait_for

from serl_launcher.gateway import actors, forward, ingest, ledger
from serl_launcher.gateway.app import Gateway
from serl_launcher.gateway.ledger import Ledger, LedgerRow
from serl_launcher.run.internal import PolicyLink
from serl_transport.client import TrainerClient
from serl_transport.connection import router
from serl_transport.connection.bounded import Bounded
from serl_transport.connection.replay_guard import Boots
from serl_transport.contract.errors import NotReady, Refused
from serl_transport.delivery.spool import open_spool
from serl_transport.wire.codec import pack, unpack
from serl_transport.wire.envelope import Envelope


def send(client: TrainerClient, *episodes: str, whole: bool = True) -> None:
    for name in episodes:
        who = info(name, actor=client.name, boot=client.boot_id)
        for part in batches(who, (3, 3))[: None if whole else 1]:
            client.send_item(part.to_body())


@contextmanager
def dealers(gateway: Gateway) -> Iterator:
    """say(name, envelope, body) on a connection of its own; the reply's error or body."""
    context = zmq.Context()

    def connect():
        socket = context.socket(zmq.DEALER)
        socket.connect(f"tcp://127.0.0.1:{gateway.port}")

        def ask(envelope: Envelope, body: dict):
            socket.send_multipart([envelope.to_frame(), *pack(body)])
            assert socket.poll(10_000)
            envelope, *frames = socket.recv_multipart()
            envelope = Envelope.from_frame(envelope)
            return envelope.error or (unpack(frames) if frames else {})

        return ask

    try:
        yield connect
    finally:
        context.destroy(linger=0)


def hello(name: str, boot: str = "b1", request: int = 1) -> tuple[Envelope, dict]:
    limits = {key: 1 for key in ("header_bytes", "frame_bytes", "total_bytes", "frames", "depth", "rank")}
    body = {"version": "0.1.0", "limits": limits, "spec": SPEC.to_dict(), "session": name}
    return Envelope("hello", name, boot, request_id=request), body


def test_an_actor_that_opens_episodes_and_ends_none_waits_beside_an_honest_one(tmp_path: Path, caplog) -> None:
    with serving(tmp_path, gateway__dead_actor_s=1.0) as gateway:
        with connected(gateway, "greedy") as greedy, connected(gateway, "honest") as honest:
            send(greedy, *(f"g{n}" for n in range(ingest.OPEN)), whole=False)
            assert greedy.flush(10)
            send(greedy, "one more", whole=False)
            wait_for(lambda: "8 episodes of 'greedy' are open, as many as one actor may have" in caplog.text)
            assert greedy.backlog == 1
            send(honest, *(f"h{n}" for n in range(20)))
            assert honest.flush(10)
            # those that nothing comes for are closed, and what waited is taken
            assert greedy.flush(20)
            assert greedy.refused_items == honest.refused_items == 0
    names = [item.batch.episode.episode_id for item in journal_items(tmp_path, SPEC)]
    assert names.count("one more") == 1
    assert len(names) == ingest.OPEN + 1 + 40


def test_too_much_before_the_disk_is_asked_for_again_and_nothing_is_lost(tmp_path: Path, caplog, monkeypatch) -> None:
    monkeypatch.setattr(ingest, "ITEMS", 1)
    spool = open_spool(tmp_path / "spool", 1 << 24)
    for n in range(30):
        for part in batches(info(f"e{n}", actor="greedy", boot=spool.boot_id), (3, 3)):
            spool.append([b"", *pack(part.to_body())])
    spool.close()
    with serving(tmp_path / "run") as gateway:
        with connected(gateway, "greedy", spool_dir=tmp_path / "spool") as greedy, connected(gateway) as honest:
            send(honest, "h")
            wait_for(lambda: "wait for the disk: ask again" in caplog.text)
            assert honest.flush(20)
            monkeypatch.setattr(ingest, "ITEMS", 512)
            assert greedy.flush(30)
            assert greedy.refused_items == 0
        wait_for(lambda: not gateway.ingest._loads)
    assert len(list(journal_items(tmp_path / "run", SPEC))) == 62


def test_an_item_sent_again_and_again_is_answered_to_the_last_who_sent_it(tmp_path: Path) -> None:
    with serving(tmp_path) as gateway, dealers(gateway) as connect:
        ask = connect()
        assert "params_version" in ask(*hello("a"))
        held = []
        append, gateway.ingest._writer.append = gateway.ingest._writer.append, lambda *a: held.append(a)
        (part,) = batches(info("e1", boot="b1"), (4,))
        for request in range(2, 2 + 3 * ingest.WAITING):
            gateway.server.call_soon(
                lambda request=request: gateway.ingest.data(
                    next(iter(gateway.server.router.peers.values())),
                    replace_token(Envelope("data", "a", "b1", 1, request), bytes([request])),
                    pack(part.to_body()),
                )
            )
        wait_for(lambda: held)
        wait_for(lambda: len(gateway.ingest._in_flight["a", "b1", 1]) == ingest.WAITING)
        assert gateway.ingest._loads["a"].items == 1
        gateway.ingest._writer.append = append
        gateway.ingest._in_flight["a", "b1", 1].clear()  # made-up return addresses
        append(*held[0])
        wait_for(lambda: not gateway.ingest._in_flight)


def replace_token(envelope: Envelope, token: bytes) -> Envelope:
    envelope.token = token
    return envelope


def test_unanswered_questions_of_one_actor_are_bounded(tmp_path: Path) -> None:
    with serving(tmp_path) as gateway, connected(gateway, "greedy") as greedy, connected(gateway, "honest") as honest:
        policy = PolicyLink(tmp_path)
        policy.serving(version=0)
        wait_for(lambda: gateway.status()["serving"]["alive"])
        asked = [greedy._control.ask("infer", {"n": n}) for n in range(forward.ASKING)]
        wait_for(lambda: len(gateway.forwarder._in_flight) == forward.ASKING)
        with pytest.raises(NotReady, match="64 questions of 'greedy' are unanswered; ask again"):
            greedy.infer({"n": -1})
        mine = honest._control.ask("infer", {"who": "honest"})
        for _ in range(forward.ASKING + 1):
            request = policy.receive(10)
            policy.reply(request.token, {"echo": request.body})
        assert mine.result(10) == {"echo": {"who": "honest"}}
        assert {answer.result(10)["echo"]["n"] for answer in asked} == set(range(forward.ASKING))
        assert not gateway.forwarder._asking
        policy.close()


def test_the_actors_that_are_known_are_bounded_and_the_silent_ones_go_first(
    tmp_path: Path, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(actors, "ACTORS", 2)
    with serving(tmp_path, gateway__dead_actor_s=2.5) as gateway, dealers(gateway) as connect:
        with connected(gateway, "honest") as honest:
            assert "params_version" in connect()(*hello("x1"))
            code, message = connect()(*hello("x2"))
            assert (code, message) == ("not_ready", "2 actors are here, as many as one learner knows; ask again")
            wait_for(lambda: isinstance(connect()(*hello("x2")), dict))
            assert "more than 2 actors: x1, silent for longest, is forgotten" in caplog.text
            assert set(gateway.status()["actors"]) == {"honest", "x2"}
            send(honest, "h")
            assert honest.flush(10)


def test_the_connections_are_bounded_and_a_flapping_links_old_ones_go_first(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(router, "PEERS", 6)
    monkeypatch.setattr(router, "PEERS_OF_ACTOR", 3)
    with serving(tmp_path) as gateway, connected(gateway, "honest") as honest, dealers(gateway) as connect:
        for _ in range(5):
            assert "params_version" in connect()(*hello("flapping"))
        peers = gateway.server.router.peers
        assert sum(peer.actor_id == "flapping" for peer in list(peers.values())) == 3
        assert "params_version" in connect()(*hello("x1"))
        code, message = connect()(*hello("x2"))
        assert code == "not_ready"
        assert message == "this learner has 6 connections, as many as it serves; ask again"
        send(honest, "h")
        assert honest.flush(10)
        assert len(peers) == 6


def test_names_of_processes_and_troubles_are_forgotten_oldest_first_and_that_is_said(caplog, monkeypatch) -> None:
    caplog.set_level(logging.WARNING)
    kept: Bounded[str, int] = Bounded(3, "things")
    for n in (0, 1, 2, 0, 3, 4):
        kept[str(n)] = n
    assert list(kept) == ["0", "3", "4"]
    assert caplog.text.count("more than 3 things: from now on the oldest are forgotten") == 1
    monkeypatch.setattr("serl_transport.connection.replay_guard._KNOWN_ACTORS", 3)
    boots = Boots()
    for n in range(10):
        boots.enter(f"actor-{n}", "1")
    assert len(boots._current) == len(boots._retired) == 3
    assert "more than 3 actor names" in caplog.text
    monkeypatch.setattr(ingest, "KINDS", 3)
    problems = ingest.Problems()
    for n in range(10):
        problems.note(f"actor-{n}", Refused("no"))
    problems.report()
    assert len(problems._counts) == 3


def row(n: int, stage: str, boot: str, seed: int, success: bool, version: int = 3) -> LedgerRow:
    return LedgerRow(
        f"e{n}", n, "a", boot, "eval", stage, seed, 5, 0.0, success, 0, 0, version, None, True, 1.0, 2.0, 0.5
    )  # fmt: skip


def test_evaluations_that_actors_ask_for_begin_anew_with_a_later_version(tmp_path: Path) -> None:
    book = Ledger(tmp_path / "episodes.jsonl")
    trials = [("b1", 1, False), ("b1", 2, False), ("b2", 4, True), ("b1", 2, True), ("b2", 5, False)]
    for n, (boot, version, success) in enumerate(trials):
        book.add(row(n, "adhoc_eval", boot, seed=1_000_000 + n, success=success, version=version))
    assert book.evaluations() == {"adhoc_eval": {"episodes": 2, "successes": 1, "version": 5}}
    for n, version in enumerate((1, 4)):  # a stage of the schedule is one evaluation, whichever versions acted
        book.add(row(9 + n, "after", "b1", seed=1_000_000 + n, success=True, version=version))
    assert book.evaluations()["after"] == {"episodes": 2, "successes": 2, "version": 4}


def test_stages_and_ad_hoc_counts_are_bounded_and_the_totals_are_not(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(ledger, "STAGES", 3)
    monkeypatch.setattr(ledger, "SCOPES", 2)
    book = Ledger(tmp_path / "episodes.jsonl")
    for n in range(10):
        book.add(row(n, "adhoc_eval", f"b{n}", seed=1_000_000, success=n % 2 == 0))
    book.add(row(10, "adhoc_eval", "b9", seed=1_000_000, success=True))  # a seed of that process again
    assert book.evaluations() == {"adhoc_eval": {"episodes": 10, "successes": 5, "version": 3}}
    assert [book.scope(("adhoc_eval", "a", f"b{n}")).counted for n in (0, 8, 9)] == [0, 1, 1]
    for stage in ("before", "after"):
        book.check_stage(stage)
        book.add(row(11, stage, "b", seed=1_000_001, success=True))
    book.check_stage("before")
    with pytest.raises(Refused, match="stage 'made up': this run has episodes of 3 stages"):
        book.check_stage("made up")
    assert book.stage_episodes() == {"before": 1, "after": 1}


def test_made_up_stages_are_refused_at_the_door(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(ledger, "STAGES", 2)
    with serving(tmp_path) as gateway, connected(gateway) as client:
        for n in range(4):
            who = replace(info(f"e{n}", boot=client.boot_id), stage=f"s{n}")
            for part in batches(who):
                client.send_item(part.to_body())
            assert client.flush(10)
        assert client.refused_items == 4
        wait_for(lambda: gateway.journalled.ledger.rows == 2)
