"""The gateway over real sockets: an item is stored once and shows up everywhere; tickets, roles, refusals, restarts."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from configured import rule as accepting
from gateway_samples import connected, serving
from replay_samples import SPEC, batches, info, journal_items, wait_for

from serl_launcher.replay.episodes import EpisodeStream, journal_episodes
from serl_launcher.replay.relabelled import Relabelled
from serl_launcher.replay.ring import RingReader
from serl_launcher.replay.transitions import TransitionView
from serl_launcher.replay.views import ChunkView
from serl_launcher.run.files import sha256_of
from serl_launcher.run.internal import InternalClient, PolicyLink
from serl_launcher.run.versions import PublishedVersion, file_path, write_entry
from serl_transport.client import TrainerClient
from serl_transport.contract.errors import BadFrame, NotReady, Refused, SchemaMismatch, UnknownKind
from serl_transport.contract.schema import Outcome, StepBatch
from serl_transport.contract.specs import TaskSpec
from serl_transport.delivery.spool import open_spool
from serl_transport.wire.codec import pack, unpack


def send(client: TrainerClient, parts: list[StepBatch]) -> None:
    """As the client's own."""
    for part in parts:
        own = replace(part.episode, actor_id=client.name, boot_id=client.boot_id)
        client.send_item(replace(part, episode=own).to_body())


def ledger(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "episodes.jsonl").read_text().splitlines()]


def run_ticket(client: TrainerClient, success: bool = True, driven=(), **payload) -> dict:
    """Ask for a ticket, make its episode, wait until it is stored."""
    ticket = client.request("next_episode", payload)
    if ticket["action"] == "run":
        who = info(
            ticket["episode_id"], actor=client.name, boot=client.boot_id, mode=ticket["mode"], stage=ticket["stage"],
            seed=ticket["seed"],
        )  # fmt: skip
        send(client, batches(who, success=success, driven=driven))
        assert client.flush(10)
    return ticket


def deliver_as(client: TrainerClient, boot: str, seq: int, part: StepBatch) -> dict:
    """Deliver an item of an earlier boot, as a client does with what its last process left."""
    box: list = []
    part = replace(part, episode=replace(part.episode, actor_id=client.name, boot_id=boot))
    client._data.loop.call_soon(
        lambda: client._data.submit("data", pack(part.to_body()), box.append, seq=seq, boot_id=boot)
    )
    return unpack(wait_for(lambda: box)[0])


def test_an_item_travels_from_the_client_to_the_ring_and_the_ledger(tmp_path: Path) -> None:
    with serving(tmp_path) as gateway, connected(gateway) as client:
        send(client, batches(info("e1", mode="demo", stage="demos"), (4, 3), driven=(0, 1, 2)))
        send(client, batches(info("e2", mode="eval", stage="before", seed=1_000_000), success=False))
        send(client, batches(info("e3"), (5,), version=7))
        assert client.flush(10)
        wait_for(lambda: len(ledger(tmp_path)) == 3)
        rows = ledger(tmp_path)
        assert [(row["episode_id"], row["ordinal"], row["mode"], row["success"]) for row in rows] == [
            ("e1", 0, "demo", True), ("e2", 1, "eval", False), ("e3", 2, "online", True),
        ]  # fmt: skip
        assert (rows[0]["n_ticks"], rows[0]["return"], rows[0]["interventions"]) == (7, 1.0, 3)
        assert (rows[1]["truncated_by"], rows[2]["policy_version_last"]) == ("time_limit", 7)
        status = client.request("status")
        assert status["counts"]["episodes"] == 3
        assert (status["counts"]["transitions"], status["counts"]["experience"]) == (19, 12)  # evaluation is none
        assert status["counts"]["successes"] == 2
        reader = RingReader(status["ring"])
        episodes = reader.episodes()
        assert [(row.ordinal, row.mode, row.success) for row in episodes] == [(0, "demo", True), (2, "online", True)]
        got = reader.gather(np.arange(episodes[0].first_frame, episodes[0].first_frame + 8))
        assert got["observation.images.front"][:, 0, 0, 0].tolist() == list(range(8))
        assert wait_for(lambda: client.request("status")["actors"]["a"])["boot"] == client.boot_id
    assert [episode.info.episode_id for _, episode in journal_episodes(tmp_path, SPEC)] == ["e1", "e2", "e3"]
    assert json.loads((tmp_path / "status.json").read_text())["counts"]["episodes"] == 3


def test_a_restart_rebuilds_everything_from_the_journal(tmp_path: Path) -> None:
    parts = batches(info("e2"), (3, 3))
    with serving(tmp_path) as gateway, connected(gateway) as client:
        send(client, [*batches(info("e1", mode="demo", stage="demos")), parts[0]])
        assert client.flush(10)
        before, ring, boot = client.request("status"), str(gateway.journalled.ring.path), client.boot_id
    rows = ledger(tmp_path)
    (tmp_path / "episodes.jsonl").unlink()
    with serving(tmp_path) as gateway:
        with connected(gateway) as client:
            status = client.request("status")
            assert status["counts"] == before["counts"]
            assert status["stage"] == before["stage"]
            assert status["ring"] != ring
            assert ledger(tmp_path) == rows
            assert [row.ordinal for row in RingReader(status["ring"]).episodes()] == [0]
            # The rest of the open episode, and a repeat of what was stored, as a client re-sends after a cut.
            for seq, part in ((3, parts[0]), (4, parts[1])):
                assert deliver_as(client, boot, seq, part) == {"duplicate": seq == 3}
            wait_for(lambda: len(ledger(tmp_path)) == 2)
            assert ledger(tmp_path)[1]["n_ticks"] == 6


def test_what_a_person_said_afterwards_is_trained_on_and_the_record_stays(tmp_path: Path) -> None:
    with serving(tmp_path) as gateway, connected(gateway) as client:
        second = batches(info("e2"), (7,), success=False)
        second[0].arrays["observation.images.front"][:] += 100  # tells the two apart
        send(client, [*batches(info("e1"), (4, 3)), *second])
        assert client.flush(10)
        wait_for(lambda: len(ledger(tmp_path)) == 2)
    rows = ledger(tmp_path)
    labels = Relabelled(tmp_path)
    labels.add({"e1": False, "e2": True}, "ana", "2026-01-01T12:00:00+00:00")
    labels.save()
    with serving(tmp_path) as gateway:
        ring = RingReader(gateway.journalled.ring.path)
        imitation = ChunkView(accepting(noop_threshold=0.0), SPEC, 2, words=labels.word_of)
        values = TransitionView(SPEC, 2, gamma=1.0, demo_share=0.5, words=labels.word_of)
        for view in (imitation, values):
            view.attach(ring)
            view.refresh()
        assert [(row.ordinal, row.success) for row in ring.episodes()] == [(0, True), (1, False)]  # as recorded
        drawn = imitation.sample(np.random.default_rng(0), 100)
        assert set(drawn.images["front"][:, 0, 0, 0].tolist()) == {101, 102, 103, 104, 105, 106}
        got = values.sample(np.random.default_rng(0), 400)
        second = got.images["front"][:, 0, 0, 0] >= 100
        np.testing.assert_array_equal(got.return_to_go, np.float32(second))
        assert not got.bootstrap[got.is_pad[:, 1]].any()  # both terminated
        assert ledger(tmp_path) == rows
    recorded = [closed.build().outcome.success for closed in EpisodeStream(tmp_path, SPEC).poll()]
    assert recorded == [True, False]
    (tmp_path / "relabelled.json").write_text('{"e1": true}')
    with pytest.raises(ValueError, match=r"relabelled.json: expected"), serving(tmp_path):
        pass


def test_the_schedule_leads_an_actor_through_the_stages(tmp_path: Path) -> None:
    with serving(tmp_path) as gateway, connected(gateway) as client:
        trainer = InternalClient(tmp_path, "trainer", patience_s=10)
        assert trainer.hello()["stage"]["name"] == "demos"
        assert run_ticket(client, success=False)["stage"] == "demos"  # a failed demonstration does not count
        demos = [run_ticket(client) for _ in range(2)]
        assert all(ticket["seed"] < 1_000_000 and ticket["min_version"] == -1 for ticket in demos)
        assert run_ticket(client)["action"] == "wait"
        status = trainer.progress(step=10, stage_steps={"sft": 10}, version=4, metrics={"losses/flow": 0.5})
        assert status["stage"] == {
            "index": 2, "name": "before", "mode": "eval", "steps_goal": None, "episodes_goal": 2, "steps": 0,
            "episodes": 0, "min_version": 4,
        }  # fmt: skip
        assert status["trainer"] == {"step": 10, "version": 4, "metrics": {"losses/flow": 0.5}, "alive": True,
                                     "waits": None}  # fmt: skip
        evals = [run_ticket(client, success=k == 0) for k in range(2)]
        assert [ticket["seed"] for ticket in evals] == [1_000_000, 1_000_001]
        assert [(ticket["min_version"], ticket["takeover"]) for ticket in evals] == [(4, False)] * 2
        online = [run_ticket(client, success=k > 0, driven=(2,) if k == 1 else ()) for k in range(4)]
        assert {ticket["stage"] for ticket in online} == {"online"}
        assert online[0]["takeover"]
        status = client.request("status")
        assert status["eval"] == {"before": {"episodes": 2, "successes": 1, "version": 3}}
        assert status["rates"]["success_rate"] == 0.5  # of four: a failure, a helped one, two alone
        assert status["rates"]["intervention_rate"] == 0.25
        assert not status["done"]
        assert trainer.progress(step=15, stage_steps={"sft": 10, "online": 5}, version=6)["done"]
        # The learner is about to end: nobody may start an episode that it would not take.
        assert {client.request("next_episode", {"want": w})["action"] for w in ("follow", "demo", "eval")} == {"stop"}
        trainer.close()
    with serving(tmp_path) as gateway:
        assert gateway.status()["done"]  # known without the trainer


def test_an_actor_may_ask_for_its_own_episodes(tmp_path: Path) -> None:
    with serving(tmp_path, schedule__stages=[]) as gateway, connected(gateway) as client:
        assert client.request("next_episode", {})["action"] == "stop"
        tickets = [run_ticket(client, want="eval", episodes=2) for _ in range(3)]
        assert [ticket["action"] for ticket in tickets] == ["run", "run", "stop"]
        assert [ticket["seed"] for ticket in tickets[:2]] == [1_000_000, 1_000_001]
        assert tickets[0]["stage"] == "adhoc_eval"
        assert run_ticket(client, want="demo")["mode"] == "demo"
        with connected(gateway, "b") as other:  # counts of its own
            assert run_ticket(other, want="eval", episodes=2)["seed"] == 1_000_000
        for payload in ({"want": "evla"}, {"want": "eval", "episodes": 0}):
            with pytest.raises(BadFrame, match="next_episode"):
                client.request("next_episode", payload)
        with pytest.raises(UnknownKind, match="next_episode, status, params"):
            client.request("nothing", {})


def test_bad_items_are_refused_once_and_hold_nothing_up(tmp_path: Path, caplog) -> None:
    with serving(tmp_path) as gateway, connected(gateway) as client:
        good = batches(info("e1"))
        bad = dict(good[0].arrays)
        bad["action"] = bad["action"] * np.nan
        send(client, [replace(good[0], arrays=bad), replace(good[0], episode=replace(info("e0"), task="other"))])
        client.send_item({"hello": "world"})
        send(client, good)
        assert client.flush(10)
        wait_for(lambda: len(ledger(tmp_path)) == 1)
        assert client.refused_items == 3
    text = caplog.text
    assert "action dim 'dx'" in text
    assert "expected task 'toy', got 'other'" in text


def test_another_task_is_refused_at_the_handshake(tmp_path: Path) -> None:
    with serving(tmp_path) as gateway:
        other = TaskSpec.from_dict({**SPEC.to_dict(), "max_ticks": 61})
        with pytest.raises(SchemaMismatch, match="max_ticks: 61 on the actor, 60 on the learner"):
            TrainerClient("a", "127.0.0.1", gateway.server.config, spec=other, wait_for_server=False)


def test_an_actor_of_another_run_is_refused_before_it_delivers_what_its_spool_holds(tmp_path: Path) -> None:
    spool = open_spool(tmp_path / "spool", 1 << 20)
    for part in batches(info("e1", boot=spool.boot_id)):
        spool.append([b"", *pack(part.to_body())])
    spool.close()
    with serving(tmp_path / "first", run="quickstart") as gateway:
        with pytest.raises(Refused, match=r"is of run 'quickstart', this actor of run 'second': .* run=quickstart, or"):
            with connected(gateway, run="second", spool_dir=tmp_path / "spool"):
                pass
        with connected(gateway, run="quickstart"):
            pass
        assert not list(journal_items(tmp_path / "first", SPEC))
        with connected(gateway, spool_dir=tmp_path / "spool") as client:  # one that names no run
            assert client.flush(10)
        assert len(list(journal_items(tmp_path / "first", SPEC))) == 2


def test_inference_goes_to_the_policy_server_and_back(tmp_path: Path) -> None:
    question = {"observation": {"state": np.zeros(2, np.float32), "images": {}}, "prompt": "p", "min_version": 0}
    with serving(tmp_path) as gateway, connected(gateway) as client:
        with pytest.raises(NotReady, match="no policy server"):
            client.infer(question)
        link = PolicyLink(tmp_path)
        link.serving(version=3, requests=0, batch_mean=0.0, p50_ms=None)
        wait_for(lambda: client.request("status")["serving"].get("version") == 3)

        def work(*steps) -> threading.Thread:
            """The policy server's thread: take one question, then do the rest."""

            def serve() -> None:
                request = wait_for(lambda: link.receive(1.0))
                assert request.body["prompt"] == "p"
                for step in steps:
                    step(request.token)

            thread = threading.Thread(target=serve)
            thread.start()
            return thread

        actions = {"actions": np.ones((4, 2), np.float32), "policy_version": 3}
        thread = work(lambda token: link.reply(token, actions))
        assert client.infer(question)["actions"].shape == (4, 2)
        thread.join()
        thread = work(lambda token: link.reply(token, NotReady("version 9 is not here")))
        with pytest.raises(NotReady, match="version 9"):
            client.infer(question)
        thread.join()
        # Another policy server takes over while a question is open: the actor is told, instead of waiting.
        replacement = PolicyLink(tmp_path)
        thread = work(lambda token: replacement.serving(version=4, requests=0, batch_mean=0.0, p50_ms=1.0))
        with pytest.raises(NotReady, match="replaced"):
            client.infer(question)
        thread.join()
        link.close()
        replacement.close()


def test_parameters_are_announced_and_pulled(tmp_path: Path) -> None:
    blob = np.random.default_rng(0).integers(0, 256, 5_000_000, dtype=np.uint8).tobytes()
    params = tmp_path / "params"
    params.mkdir()
    with serving(tmp_path) as gateway, connected(gateway) as client:
        with pytest.raises(NotReady):
            client.fetch_params()
        heard: list[dict] = []
        client.on_notify(heard.append)
        (params / "v000002.safetensors").write_bytes(blob)
        entry = {"version": 2, "step": 10, "file": "v000002.safetensors", "bytes": len(blob),
                 "sha256": hashlib.sha256(blob).hexdigest(), "time": 1.0}  # fmt: skip
        (params / "latest.json").write_text(json.dumps(entry))
        wait_for(lambda: gateway.params.version == 2)
        published = client.fetch_params()
        assert (published.version, published.blob) == (2, blob)
        assert wait_for(lambda: [body for body in heard if body["topic"] == "params"])[0]["version"] == 2
        with pytest.raises(Refused, match="newest is 2"):
            client.fetch_params(1)


def test_a_damaged_version_is_neither_announced_nor_handed_out(tmp_path: Path) -> None:
    params = tmp_path / "params"

    def publish(version: int) -> None:
        path = file_path(params, version)
        path.write_bytes(b"%d" % version * 1000)
        write_entry(params, PublishedVersion(version, 0, path.name, 1000, sha256_of(path), 0.0))

    params.mkdir()
    publish(1)
    publish(2)
    file_path(params, 2).write_bytes(b"3" + b"2" * 999)
    with serving(tmp_path) as gateway, connected(gateway) as client:
        assert client.fetch_params().version == gateway.params.version == 1
        assert gateway.params.times == {}  # published before anybody here looked
        file_path(params, 3).write_bytes(b"x")  # of a version whose entry is not there yet
        publish(4)
        before = time.monotonic()
        wait_for(lambda: gateway.params.version == 4)
        assert before - 1.0 < gateway.params.times[4] <= time.monotonic()  # of this machine's uptime, not a wall clock
        assert client.fetch_params().blob == b"4" * 1000


def test_a_damaged_operator_file_is_taken_for_a_pause(tmp_path: Path, caplog) -> None:
    (tmp_path / "operator.json").write_bytes(b"")
    with serving(tmp_path) as gateway, connected(gateway) as client:
        assert (
            client.request("next_episode", {"want": "follow"})["reason"] == "an operator paused the run (operator.json)"
        )
        assert "operator.json is damaged: it holds no JSON object: the run is taken for paused" in caplog.text


def test_a_dead_actors_episode_is_closed_and_its_evaluation_seed_issued_again(tmp_path: Path) -> None:
    stages = [{"name": "before", "mode": "eval", "episodes": 1}]
    with serving(tmp_path, schedule__stages=stages, gateway__dead_actor_s=1.0) as gateway:
        with connected(gateway) as client:
            ticket = client.request("next_episode", {})
            who = info(ticket["episode_id"], boot=client.boot_id, mode="eval", stage="before", seed=ticket["seed"])
            send(client, batches(who, (4, 4))[:1])
            assert client.flush(10)
            with connected(gateway, "b") as other:
                assert other.request("next_episode", {})["action"] == "wait"  # the only seed is taken
                client.stop()
                again = wait_for(lambda: _run_of(other.request("next_episode", {})))
                assert again["seed"] == ticket["seed"]
                assert again["episode_id"] != ticket["episode_id"]
        wait_for(lambda: len(ledger(tmp_path)) == 1)
        row = ledger(tmp_path)[0]
        assert (row["truncated_by"], row["n_ticks"], row["whole"]) == ("dead_actor", 3, False)
        assert gateway.status()["stage"]["episodes"] == 0  # a cut episode is no outcome
    assert [episode.n for _, episode in journal_episodes(tmp_path, SPEC)] == [3]


def test_a_stopped_evaluation_is_no_outcome_and_its_seed_goes_out_again(tmp_path: Path) -> None:
    stages = [{"name": "before", "mode": "eval", "episodes": 1}]
    with serving(tmp_path, schedule__stages=stages, gateway__dead_actor_s=0.5) as gateway, connected(gateway) as client:
        ticket = client.request("next_episode", {})
        who = info(ticket["episode_id"], boot=client.boot_id, mode="eval", stage="before", seed=ticket["seed"])
        (part,) = batches(who, (4,), success=False)
        send(client, [replace(part, outcome=Outcome(False, "environment", "stop"))])
        assert client.flush(10)
        assert not wait_for(lambda: ledger(tmp_path))[0]["whole"]
        assert client.request("next_episode", {})["seed"] == ticket["seed"]


def test_what_a_person_discarded_is_recorded_and_never_learned_from(tmp_path: Path) -> None:
    """Also what was acknowledged before the word came: no frame of it reaches the ring, now or after a restart."""
    stages = [{"name": "demos", "mode": "demo", "episodes": 1}]
    with serving(tmp_path, schedule__stages=stages) as gateway, connected(gateway) as client:
        ticket = client.request("next_episode", {})
        who = info(ticket["episode_id"], boot=client.boot_id, mode="demo", stage="demos", seed=ticket["seed"])
        first, last = batches(who, (4, 4), success=False)
        send(client, [first])
        assert client.flush(10)  # half of it is on the learner's disk
        send(client, [replace(last, outcome=Outcome(False, "human", "discard"))])
        assert client.flush(10)
        (row,) = wait_for(lambda: ledger(tmp_path))
        assert (row["truncated_by"], row["n_ticks"], row["whole"]) == ("discard", 8, False)
        again = client.request("next_episode", {})  # the stage still wants its demonstration
        assert again["action"] == "run"
        assert again["episode_id"] != ticket["episode_id"]
        assert gateway.status()["counts"]["experience"] == 0
        assert RingReader(gateway.status()["ring"]).episodes() == []
    with serving(tmp_path, schedule__stages=stages) as gateway:
        assert RingReader(gateway.status()["ring"]).episodes() == []


def _run_of(reply: dict) -> dict | None:
    return reply if reply["action"] == "run" else None


def test_a_restarted_actor_takes_the_place_of_its_last_process(tmp_path: Path) -> None:
    spool, parts = tmp_path / "spool", batches(info("e1"), (3, 3))
    with serving(tmp_path) as gateway:
        with connected(gateway, spool_dir=spool) as client:
            send(client, parts[:1])
            assert client.flush(10)
        with connected(gateway, spool_dir=spool) as client:
            send(client, batches(info("e2", boot=client.boot_id)))
            assert client.flush(10)
            wait_for(lambda: len(ledger(tmp_path)) == 2)  # long before the 30 s of a silent actor
        assert [(row["episode_id"], row["truncated_by"]) for row in ledger(tmp_path)] == [
            ("e2", None), ("e1", "dead_actor"),
        ]  # fmt: skip


def test_a_full_disk_is_a_typed_refusal_and_the_client_gets_through_afterwards(tmp_path: Path) -> None:
    with serving(tmp_path, journal__segment_mb=1) as gateway, connected(gateway) as client:
        gateway.ingest._writer._segment_bytes = 16  # the next item opens a new segment …
        blocker = tmp_path / "journal" / "000002.seg"
        blocker.mkdir()  # … which cannot be written
        send(client, batches(info("e1")))
        assert not client.flush(1.5)
        assert client.backlog == 2
        assert client.refused_items == 0
        blocker.rmdir()
        assert client.flush(10)
        wait_for(lambda: len(ledger(tmp_path)) == 1)


def test_what_the_journal_took_last_is_in_the_ledger(tmp_path: Path, monkeypatch) -> None:
    """The gateway is told to end while the disk still works on an episode's last batch."""
    real, working = os.fdatasync, threading.Event()

    def slow(file: int) -> None:
        working.set()
        time.sleep(0.5)
        real(file)

    with serving(tmp_path) as gateway:
        with connected(gateway) as client:
            *first, last = batches(info("e1", boot=client.boot_id))
            for part in first:
                client.send_item(part.to_body())
            assert client.flush(30)
            monkeypatch.setattr(os, "fdatasync", slow)
            client.send_item(last.to_body())
            assert working.wait(30)
            gateway.stop()
    assert [json.loads(line)["episode_id"] for line in (tmp_path / "episodes.jsonl").read_text().splitlines()] == ["e1"]
