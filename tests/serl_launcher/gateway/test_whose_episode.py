"""Whose an episode is: two actors, their keys, and everything one of them may try with the other's tickets."""

from __future__ import annotations

import json
import logging
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from gateway_samples import config, serving
from replay_samples import SPEC, batches, info, journal_items, wait_for

from serl_launcher.gateway.app import Gateway
from serl_transport.client import TrainerClient
from serl_transport.config import TrainerConfig
from serl_transport.contract.errors import Refused, Unauthorized, WireError
from serl_transport.contract.schema import EpisodeInfo
from serl_transport.security.keys import KeyPair, write_pair
from serl_transport.wire.codec import pack

STAGES = [{"name": "demos", "mode": "demo", "episodes": 50}]


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> Path:
    """robot-1 and robot-2, `any` that may take any name, alice who may steer."""
    folder = tmp_path_factory.mktemp("keys")
    lines = []
    for role, name in (
        ("", "learner"),
        ("actor", "robot-1"),
        ("actor", "robot-2"),
        ("actor", "*"),
        ("operator", "alice"),
    ):
        pair = KeyPair.new()
        write_pair(folder, "any" if name == "*" else name, pair)
        lines += [f"{role} {name} {pair.public.decode()}\n"] if role else []
    for name in ("third", "spare"):  # names without a line of their own, with the key of any
        (folder / f"{name}.secret").write_bytes((folder / "any.secret").read_bytes())
        (folder / f"{name}.secret").chmod(0o600)
    (folder / "allow_list").write_text("".join(lines))
    (folder / "allow_list").chmod(0o644)
    return folder


@contextmanager
def client(gateway: Gateway, name: str, keys: Path | None, role: str = "actor") -> Iterator[TrainerClient]:
    ports = TrainerConfig(gateway.port, gateway.broadcast_port, keys_dir=None if keys is None else str(keys))
    with_spec = None if role == "operator" else SPEC
    actor = TrainerClient(name, "127.0.0.1", ports, spec=with_spec, role=role, wait_for_server=False)
    try:
        yield actor
    finally:
        actor.stop()


def ticket_of(actor: TrainerClient) -> EpisodeInfo:
    """A ticket as the episode that its actor will make."""
    got = actor.request("next_episode", {})
    assert got["action"] == "run"
    return info(
        got["episode_id"], actor=actor.name, boot=actor.boot_id, mode=got["mode"], stage=got["stage"], seed=got["seed"]
    )


def deliver(actor: TrainerClient, part, seq: int) -> str:
    """The gateway's answer to one item, sent as it is: `taken`, or the code of the refusal."""
    box: list = []
    submit = actor._data.submit
    actor._data.loop.call_soon(lambda: submit("data", pack(part.to_body()), box.append, seq=seq))
    answer = wait_for(lambda: box)[0]
    return answer.code if isinstance(answer, WireError) else "taken"


def ledger(run: Path) -> dict[str, dict]:
    rows = map(json.loads, (run / "episodes.jsonl").read_text().splitlines())
    return {row["episode_id"]: row for row in rows}


# What each kind of sender gets for each kind of episode: start, extend, end as a success, end as a failure.
WHOLE_ANSWER = {
    "own": "taken",
    "other's": "refused",  # robot-2's, who has begun, with the sender's own name inside
    "other's, as theirs": "refused",  # with robot-2's name and boot inside
    "other's, unbegun": "refused",
    "unticketed": "refused",
    "finished": "refused",
    "unknown": "refused",  # the form of a ticket, and another digest
    "replayed": "refused",  # the own, finished one under a new seq
}


@pytest.mark.parametrize("how", ["start", "extend", "end as success", "end as failure"])
@pytest.mark.parametrize("with_keys", ["own key", "* key", "operator key", "no keys"])
def test_only_who_holds_the_ticket_moves_the_episode(tmp_path: Path, keys: Path, how: str, with_keys: str) -> None:
    folder = None if with_keys == "no keys" else keys
    attacker = {"own key": "robot-1", "* key": "third", "operator key": "alice", "no keys": "robot-1"}[with_keys]
    security = {"keys_dir": None if folder is None else str(folder)}
    with (
        serving(tmp_path / "run", schedule__stages=STAGES, security=security) as gateway,
        client(gateway, attacker, folder) as mine,
        client(gateway, "robot-2", folder) as theirs,
    ):
        begun, unbegun, own, done = ticket_of(theirs), ticket_of(theirs), ticket_of(mine), ticket_of(mine)
        assert deliver(theirs, batches(begun, (3, 3))[0], 1) == "taken"
        for seq, part in enumerate(batches(done), 1):
            assert deliver(mine, part, seq) == "taken"
        if how != "start":
            assert deliver(mine, batches(own, (3, 3))[0], 3) == "taken"
        as_mine = {"actor_id": mine.name, "boot_id": mine.boot_id}
        episodes = {
            "own": own,
            "other's": replace(begun, **as_mine),
            "other's, as theirs": begun,
            "other's, unbegun": replace(unbegun, **as_mine),
            "unticketed": replace(own, episode_id="of my own"),
            "finished": done,
            "unknown": replace(own, episode_id=own.episode_id[:-1] + ("0" if own.episode_id[-1] != "0" else "1")),
            "replayed": done,
        }
        answers = {}
        for seq, (kind, who) in enumerate(episodes.items(), 10):
            part = batches(who, (3, 3), success=how == "end as success")[how.startswith("end")]
            if how == "extend":
                part = batches(who, (3, 3, 3))[1]
            answers[kind] = deliver(mine, part, seq)
        expected = WHOLE_ANSWER | ({"unticketed": "taken"} if with_keys == "no keys" else {})
        assert answers == expected
        # the other's episode goes on and ends as its own actor says
        assert deliver(theirs, batches(begun, (3, 3), success=False)[1], 2) == "taken"
        wait_for(lambda: begun.episode_id in ledger(tmp_path / "run"))
        rows = ledger(tmp_path / "run")
        assert (rows[begun.episode_id]["actor"], rows[begun.episode_id]["success"]) == ("robot-2", False)


@pytest.mark.parametrize(
    "change", [{"mode": "online"}, {"stage": "online"}, {"seed": 7}, {"boot_id": "b0"}, {"actor_id": "x"}]
)
def test_mode_stage_seed_and_maker_are_the_tickets(tmp_path: Path, change: dict) -> None:
    with serving(tmp_path, schedule__stages=STAGES) as gateway, client(gateway, "robot-1", None) as actor:
        who = replace(ticket_of(actor), **change)
        assert deliver(actor, batches(who)[0], 1) == "refused"


def test_a_name_is_the_connections_and_a_key_the_names(tmp_path: Path, keys: Path) -> None:
    security = {"keys_dir": str(keys)}
    with serving(tmp_path, schedule__stages=STAGES, security=security) as gateway:
        with client(gateway, "robot-2", keys) as theirs, client(gateway, "robot-1", keys) as mine:
            who = ticket_of(theirs)
            mine._data._actor_id = "robot-2"  # an item under another name than the connection's
            assert deliver(mine, batches(who)[0], 1) == "unauthorized"
        other = keys.parent / "stolen"
        other.mkdir(exist_ok=True, mode=0o700)
        for name, key in (("learner.public", "learner.public"), ("robot-2.secret", "robot-1.secret")):
            (other / name).write_bytes((keys / key).read_bytes())
            (other / name).chmod(0o600)
        with (
            pytest.raises(Unauthorized, match="belongs to 'robot-1', not to 'robot-2'"),
            client(gateway, "robot-2", other),
        ):
            pass


@pytest.mark.parametrize("how", ["start", "end as success"])
def test_an_operators_connection_makes_no_episode(tmp_path: Path, keys: Path, how: str) -> None:
    security = {"keys_dir": str(keys)}
    with (
        serving(tmp_path, schedule__stages=STAGES, security=security) as gateway,
        client(gateway, "robot-2", keys) as theirs,
        client(gateway, "alice", keys, role="operator") as alice,
    ):
        who = ticket_of(theirs)
        parts = batches(who, (3, 3))
        if how != "start":
            assert deliver(theirs, parts[0], 1) == "taken"
        for claimed in (who, replace(who, actor_id="alice", boot_id=alice.boot_id)):
            part = batches(claimed, (3, 3))[how != "start"]
            assert deliver(alice, part, 1) == "unauthorized"
        with pytest.raises(Unauthorized, match="hello with role operator, not as an actor's"):
            alice.request("next_episode", {})
        assert deliver(theirs, parts[1] if how != "start" else parts[0], 2) == "taken"


@pytest.mark.parametrize(("unticketed", "with_keys", "answer"), [
    ("auto", False, "taken"), ("auto", True, "refused"), (True, True, "taken"), (False, False, "refused"),
])  # fmt: skip
def test_the_config_says_whether_episodes_need_a_ticket(tmp_path, keys, unticketed, with_keys, answer) -> None:
    changes = {"security": {"keys_dir": str(keys) if with_keys else None}, "gateway__unticketed": unticketed}
    with serving(tmp_path, **changes) as gateway, client(gateway, "robot-1", keys if with_keys else None) as actor:
        assert deliver(actor, batches(info("e1", actor="robot-1", boot=actor.boot_id))[0], 1) == answer


def test_a_word_that_is_no_answer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gateway\.unticketed: expected auto, true or false, got 'yes'"):
        with serving(tmp_path, gateway__unticketed="yes"):
            pass


def test_a_ticket_holds_after_kill_9_and_for_the_next_process_of_its_actor(tmp_path: Path) -> None:
    """Issued, the gateway killed at once; recorded while it is away; delivered by a later boot from the spool."""
    run, spool = tmp_path / "run", tmp_path / "spool"
    run.mkdir()
    with serving(tmp_path / "ports") as gateway:
        ports = (gateway.port, gateway.broadcast_port)
    cfg = config(schedule__stages=STAGES, gateway__unticketed=False, port=ports[0], broadcast_port=ports[1])
    (run / "config.yaml").write_text(yaml.safe_dump(cfg))

    def start() -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-m", "serl_launcher.gateway", str(run)], stderr=subprocess.DEVNULL)

    options = {"spec": SPEC, "spool_dir": spool, "timeout_ms": 20_000}
    process = start()
    try:
        actor = TrainerClient("robot-1", "127.0.0.1", TrainerConfig(*ports), **options)
        who = ticket_of(actor)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for part in batches(who):
            actor.send_item(part.to_body())
        actor.stop()
        process = start()
        again = TrainerClient("robot-1", "127.0.0.1", TrainerConfig(*ports), **options)
        assert again.boot_id != who.boot_id
        assert again.flush(20)
        assert again.refused_items == 0
        again.stop()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)
    assert [item.batch.episode for item in journal_items(run, SPEC)] == [who, who]


def test_the_secret_is_private_kept_and_made_anew_when_lost(tmp_path: Path, caplog) -> None:
    path, old = tmp_path / "ticket.secret", os.umask(0)
    try:
        with serving(tmp_path, schedule__stages=STAGES) as gateway, client(gateway, "robot-1", None) as actor:
            begun, kept = ticket_of(actor), ticket_of(actor)
            assert deliver(actor, batches(begun, (3, 3))[0], 1) == "taken"
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    secret, boot = path.read_bytes(), begun.boot_id
    assert len(json.loads(secret)["secret"]) == 64
    assert "ticket.secret" not in caplog.text
    path.write_bytes(secret[:7])  # as a full disk would leave it
    caplog.set_level(logging.WARNING)
    with serving(tmp_path, schedule__stages=STAGES, gateway__unticketed=False) as gateway:
        assert "ticket.secret is damaged: it holds no JSON object: made anew" in caplog.text
        with client(gateway, "robot-1", None) as actor:
            actor._data._boot_id = boot  # an item of the boot before
            assert deliver(actor, batches(begun, (3, 3))[1], 2) == "taken"  # open: nothing has to be proved
            assert deliver(actor, batches(kept)[0], 3) == "refused"
    assert path.read_bytes() != secret[:7]
    path.chmod(0o640)
    with pytest.raises(ValueError, match=r"ticket.secret can be read by others \(mode 0640\): chmod 600"):
        with serving(tmp_path):
            pass
    path.unlink()
    with serving(tmp_path, schedule__stages=STAGES):
        assert "ticket.secret is missing: made anew" in caplog.text


def test_of_two_beginnings_that_come_at_once_one_is_taken_and_the_other_told(tmp_path: Path) -> None:
    """Both are in flight before either is on disk; the second was acknowledged, and then dropped."""
    with serving(tmp_path, schedule__stages=STAGES) as gateway, client(gateway, "robot-1", None) as actor:
        for n in range(8):  # as many as may be open
            who = info(f"e{n}", actor=actor.name, boot=actor.boot_id)
            box: list = []

            def both(who: EpisodeInfo = who, box: list = box, n: int = n) -> None:
                for k in (0, 1):
                    part = batches(replace(who, start_time=float(k)), (3, 3))[0]
                    actor._data.submit("data", pack(part.to_body()), box.append, seq=2 * n + k + 1)

            actor._data.loop.call_soon(both)
            wait_for(lambda box=box: len(box) == 2)
            codes = [answer.code if isinstance(answer, WireError) else "taken" for answer in box]
            assert sorted(codes) == ["refused", "taken"]


def test_a_refusal_tells_why(tmp_path: Path) -> None:
    with serving(tmp_path, schedule__stages=STAGES, gateway__unticketed=False) as gateway:
        with client(gateway, "robot-1", None) as actor:
            who = ticket_of(actor)
            for changed, message in (
                (
                    replace(who, episode_id="e1"),
                    "has no ticket of this run: ask for next_episode, or .*unticketed=true",
                ),
                (replace(who, seed=5), "its ticket is another's, or was for another stage, mode or seed than 'demos'"),
            ):
                with pytest.raises(Refused, match=message):
                    gateway.ingest._seal.check(changed)
