"""What the gateway does for the console: pictures while somebody looks, a person's frames on their way."""

import threading
import time
from contextlib import contextmanager

import keygen
import pytest
from gateway_samples import connected, serving
from replay_samples import SPEC

from serl_launcher.gateway.hands import Hands
from serl_launcher.gateway.views import KEPT_S, PICTURE_BYTES, Views
from serl_launcher.run.internal import InternalClient
from serl_transport.client import TrainerClient
from serl_transport.config import TrainerConfig
from serl_transport.contract.errors import BadFrame, Refused, SchemaMismatch, Unauthorized

JPEG = b"\xff\xd8 a picture"
BEAT = {"beat": 7, "seq": 0, "tap": 0, "stale": 0, "holds": False, "driving": False}


def drive(frame=1, page="p1", person="ann", **changes):
    body = None if frame is None else {"seq": frame, "echo": 7, "held": ["w"], "axes": {}, "taps": [], **changes}
    return {"actor": "a", "page": page, "person": person, "frame": body}


@pytest.fixture
def hands():
    answers, timers = [], []
    notes = []
    made = Hands(
        lambda token, body: answers.append((token, body)),
        lambda seconds, fn: timers.append(fn),
        lambda act, by: notes.append((act["act"], act["actor"], by, act.get("why"))),
    )
    made.answers, made.timers, made.notes = answers, timers, notes
    return made


def test_pictures_are_taken_only_while_somebody_looks(tmp_path):
    with serving(tmp_path / "run") as gateway, connected(gateway) as actor:
        console = InternalClient(tmp_path / "run", "console")
        assert not actor.request("live", {"pictures": {"front": JPEG}, "tick": 3})["watched"]
        told = console.call("views", {"since": 0})
        assert told["actors"]["a"]["pictures"] == {"front": JPEG}
        assert told["actors"]["a"]["tick"] == 3
        assert told["hands"] == {}
        again = console.call("views", {"since": told["actors"]["a"]["number"]})["actors"]["a"]
        assert "pictures" not in again
        assert again["age_s"] >= 0
        deadline = time.monotonic() + 5
        while not actor.watched:  # the next heartbeat's answer
            assert time.monotonic() < deadline
            time.sleep(0.05)
        console.close()
        with pytest.raises(SchemaMismatch, match="expected a JPEG"):
            actor.request("live", {"pictures": {"front": b"GIF"}})


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"pictures": {"front": JPEG + bytes(PICTURE_BYTES)}}, "a JPEG of 65536 bytes at most"),
        ({"pictures": {f"c{k}": JPEG for k in range(9)}}, "at most 8 by camera"),
        ({"pictures": {"../front": JPEG}}, "without /"),
        ({"says": 3}, "says: expected a text"),
        ({"tick": "3"}, "tick: expected a number"),
    ],
)
def test_what_nobody_could_show_is_refused_by_name(body, why):
    views = Views()
    with pytest.raises(SchemaMismatch, match=why):
        views.take("a", body)
    assert views.give(None, None, {})["actors"] == {}


def test_what_is_kept_of_the_actors_is_bounded_and_old_pictures_go(monkeypatch):
    views = Views()
    for k in range(40):
        views.take(f"a{k}", {"pictures": {"front": JPEG}})
    kept = views.give(None, None, {})["actors"]
    assert sorted(kept) == sorted(f"a{k}" for k in range(24, 40))
    later = time.monotonic() + KEPT_S + 1
    monkeypatch.setattr("serl_launcher.gateway.views.time.monotonic", lambda: later)
    assert views.give(None, None, {})["actors"] == {}


def test_a_frame_answers_the_actor_that_waits_and_only_the_newest_is_kept(hands):
    assert hands.poll("a", b"t1", BEAT | {"table": ["w / s: dx + / -"]}) is None
    beat = hands.drive("console", drive(1))
    assert beat == BEAT
    ((token, body),) = hands.answers
    assert (token, body["frame"]["seq"], body["frame"]["page"], body["frame"]["person"]) == (b"t1", 1, "p1", "ann")
    hands.drive("console", drive(2))
    hands.drive("console", drive(3))
    assert hands.poll("a", b"t2", BEAT | {"beat": 8})["frame"]["seq"] == 3
    assert hands.to_view() == {"a": {"person": "ann", "table": ["w / s: dx + / -"]}}
    assert hands.poll("a", b"t3", BEAT) is None
    hands.timers[-1]()
    assert hands.answers[-1] == (b"t3", {"frame": None})
    hands.timers[0]()  # of a question that was answered long ago
    assert len(hands.answers) == 2


def test_one_page_drives_and_a_second_person_is_told_who(hands, monkeypatch):
    with pytest.raises(Refused, match="a listens to no page: start that actor with operator=browser"):
        hands.drive("console", drive())
    hands.poll("a", b"t1", BEAT)
    hands.drive("console", drive())
    for other in (drive(1, page="p2", person="bob"), drive(None, page="p2", person="bob")):
        with pytest.raises(Refused, match="ann drives a from another page"):
            hands.drive("console", other)
    assert hands.drive("console", drive(None)) == BEAT
    assert hands.poll("a", b"t2", BEAT)["frame"] == {"page": "p1", "gone": True}
    hands.drive("console", drive(1, page="p2", person="bob"))
    later = time.monotonic() + 1.5
    monkeypatch.setattr("serl_launcher.gateway.hands.time.monotonic", lambda: later)
    hands.poll("a", b"t3", BEAT)
    hands.drive("console", drive(2))  # bob's page has been silent for longer than a second
    hands.drive("console", drive(3, person="eve"))  # who typed another name
    assert hands.notes == [
        ("take_keys", "a", "ann (console)", None), ("release_keys", "a", "ann (console)", None),
        ("take_keys", "a", "bob (console)", None), ("release_keys", "a", "bob (console)", "the page is silent"),
        ("take_keys", "a", "ann (console)", None), ("release_keys", "a", "ann (console)", None),
        ("take_keys", "a", "eve (console)", None),
    ]  # fmt: skip


def test_who_has_the_keys_is_in_the_ledger_and_in_the_status_and_nobody_has_them_after_a_kill(tmp_path):
    with serving(tmp_path / "run") as gateway, connected(gateway) as actor:
        actor.request("hands", BEAT)
        with connected_as(gateway, gateway_ports(gateway), "operator") as console:
            console.request("drive", drive(1))
            assert within(lambda: console.request("status", {})["operator"]["keys"]) == {"a": "ann (console)"}
    with serving(tmp_path / "run") as gateway:
        acts = within(lambda: [row for row in gateway.operator.ledger.rows if row["act"] == "release_keys"])
        assert [(row["by"], row["actor"], row["why"]) for row in acts] == [("ann (console)", "a", "the gateway ended")]
        assert gateway.operator.state.keys == {}


def within(look, seconds=5.0):
    """What `look` finds, once it finds something: notes are written by a thread."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def gateway_ports(gateway):
    return TrainerConfig(gateway.port, gateway.broadcast_port)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"seq": 0}, "frame.seq: expected a whole number from 1"),
        ({"held": ["w"] * 17}, "frame.held: expected at most 16 names"),
        ({"axes": {"LX": float("nan")}}, "frame.axes.LX: expected a number from -1 to 1"),
        ({"taps": [[1]]}, "frame.taps: expected at most 16 pairs"),
        ({"held": ["w\n"]}, "frame.held: expected a text"),
    ],
)
def test_a_frame_that_cannot_be_meant_is_refused_and_drives_nothing(hands, changes, why):
    hands.poll("a", b"t1", BEAT)
    with pytest.raises(BadFrame, match=why):
        hands.drive("console", drive(**changes))
    assert hands.answers == []


def test_over_the_wire_a_frame_comes_at_once_and_an_actor_may_not_drive(tmp_path):
    keys = tmp_path / "keys"
    assert keygen.main([str(keys), "--actor", "a", "--operator", "console"]) == 0
    with serving(tmp_path / "run", security={"keys_dir": str(keys), "allow_list": None}) as gateway:
        ports = TrainerConfig(gateway.port, gateway.broadcast_port, keys_dir=str(keys))
        with connected_as(gateway, ports, "actor") as actor, connected_as(gateway, ports, "operator") as console:
            answers = []
            waiting = threading.Thread(target=lambda: answers.append(actor.request("hands", BEAT)))
            waiting.start()
            deadline = time.monotonic() + 5
            while not gateway.hands.to_view():
                assert time.monotonic() < deadline
                time.sleep(0.005)
            assert console.request("drive", drive(4))["beat"] == 7
            waiting.join(5)
            frame = answers[0]["frame"] or actor.request("hands", BEAT)["frame"]  # it had waited for 0.2 s already
            assert frame["seq"] == 4
            with pytest.raises(Unauthorized, match="drive: expected an operator's key"):
                actor.request("drive", drive())


@contextmanager
def connected_as(gateway, ports, role):
    name, spec = ("a", SPEC) if role == "actor" else ("console", None)
    client = TrainerClient(name, "127.0.0.1", ports, spec=spec, role=role, wait_for_server=False)
    try:
        yield client
    finally:
        client.stop()
