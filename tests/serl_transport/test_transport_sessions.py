"""Two processes with one name: the living one keeps it, a restarted one gets it back at once, nothing is lost."""

import json
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import zmq

from serl_transport.connection.link import Link
from serl_transport.connection.router import Peer
from serl_transport.connection.sessions import GONE_S, Sessions
from serl_transport.contract.errors import NotReady, Refused, ServerSilent

ACTOR = """
    import json, sys, time
    from serl_transport import TrainerClient, TrainerConfig
    from serl_transport.contract.errors import WireError
    port, spool, tag = int(sys.argv[1]), sys.argv[2] or None, sys.argv[3]
    try:
        client = TrainerClient("robot-1", "127.0.0.1", TrainerConfig(port_number=port), spool_dir=spool)
    except WireError as error:
        print(json.dumps({"refused": error.code, "message": error.message}), flush=True)
        sys.exit(2)
    print(json.dumps({"in": tag}), flush=True)
    n = 0
    while True:
        client.send_item({"from": tag, "n": n})
        n += 1
        try:
            client.request("ping", timeout_ms=20000)
        except WireError as error:
            print(json.dumps({"told": error.code, "message": error.message, "sent": n,
                              "delivered": client.flush(20)}), flush=True)
            client.stop()
            sys.exit(2)
        time.sleep(0.05)
"""


class Actor:
    """A client in a process of its own."""

    def __init__(self, port, spool, tag):
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(ACTOR), str(port), str(spool or ""), tag],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def says(self):
        return json.loads(self.process.stdout.readline())

    def stop(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def learner(serve):
    """A server that keeps what comes; `arrived(tag)` lists it."""
    taken = []
    server = serve(
        config={"request_types": ["ping"]},
        request_callback=lambda kind, payload: {},
        data_callback=lambda store, payload: taken.extend(payload["data"]),
    )
    server.arrived = lambda tag: [item["n"] for item in list(taken) if item["from"] == tag]
    return server


def arrives(learner, tag, n):
    deadline = time.monotonic() + 30
    while len(learner.arrived(tag)) < n:
        assert time.monotonic() < deadline, learner.arrived(tag)
        time.sleep(0.02)


def test_the_second_living_process_of_a_name_is_refused_and_the_first_goes_on(learner, started, tmp_path):
    port = learner.config.port_number
    first = started(Actor(port, tmp_path / "here", "first"))
    assert first.says() == {"in": "first"}
    second = started(Actor(port, tmp_path / "there", "second"))
    said = second.says()
    assert said["refused"] == "refused"
    assert "another living process speaks as 'robot-1'" in said["message"]
    assert f"process {first.process.pid}" in said["message"]
    assert "give this one another unique_identifier=" in said["message"]
    arrives(learner, "first", len(learner.arrived("first")) + 10)
    got = learner.arrived("first")
    assert got == list(range(len(got)))
    assert learner.arrived("second") == []


@pytest.mark.parametrize("spool", ["disk", "memory"])
def test_after_kill_9_the_name_is_free_at_once(learner, started, tmp_path, spool):
    port, folder = learner.config.port_number, tmp_path / "spool" if spool == "disk" else None
    for tag in ("one", "two", "three"):
        actor = started(Actor(port, folder, tag))
        assert actor.says() == {"in": tag}
        arrives(learner, tag, 3)
        actor.process.kill()
        actor.process.wait()
    assert learner.router.counters["not_ready"] == 0  # nobody had to wait until a rival was known to be gone
    assert learner.router.counters["refused"] == 0


def test_a_silent_rival_is_replaced_told_so_and_still_delivers(learner, started, tmp_path):
    port = learner.config.port_number
    first = started(Actor(port, tmp_path / "here", "first"))
    assert first.says() == {"in": "first"}
    arrives(learner, "first", 5)
    first.process.send_signal(signal.SIGSTOP)  # its host is there, it says nothing
    second = started(Actor(port, tmp_path / "there", "second"))
    assert second.says() == {"in": "second"}
    arrives(learner, "second", 5)
    first.process.send_signal(signal.SIGCONT)
    told = first.says()
    assert told["told"] == "refused"
    assert "has taken over from this one" in told["message"]
    assert "unique_identifier=" in told["message"]
    assert told["delivered"]
    assert learner.arrived("first") == list(range(told["sent"]))
    arrives(learner, "second", len(learner.arrived("second")) + 10)


class Rival:
    def __init__(self, boot, session=None, last_seen=0.0):
        self.address, self.boot_id, self.last_seen = boot.encode(), boot, last_seen
        self.session, self.host = session, None


def test_what_decides(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("serl_transport.connection.sessions.time.monotonic", lambda: now[0])
    there, dead, forgotten = [], set(), []
    sessions = Sessions(
        lambda name, boot: [r for r in there if r.boot_id != boot], lambda a: a not in dead, forgotten.append
    )
    assert sessions.enter("a", "1", "s", delivers=False)
    there.append(Rival("1", "s", 100.0))
    with pytest.raises(NotReady):
        sessions.enter("a", "2", "other", delivers=False)
    now[0] += 1
    there[0].last_seen = now[0]
    with pytest.raises(Refused, match="give this one another unique_identifier="):
        sessions.enter("a", "2", "other", delivers=False)
    with pytest.raises(NotReady):  # asked anew
        sessions.enter("a", "2", None, delivers=False)
    now[0] += GONE_S
    assert sessions.enter("a", "2", None, delivers=False)
    assert forgotten == [b"1"]
    with pytest.raises(Refused, match="taken over"):
        sessions.enter("a", "1", "s", delivers=False)
    assert sessions.enter("a", "1", "s", delivers=True) is False
    there[:] = [Rival("2", "t", now[0])]
    assert sessions.enter("a", "3", "t", delivers=False)  # from the same spool: the process before it is dead
    there[:] = [Rival("3", "t", now[0])]
    dead.add(b"3")
    assert sessions.enter("a", "4", None, delivers=False)  # hung up
    there[:] = [Rival("4", "", now[0])]
    with pytest.raises(NotReady):
        sessions.enter("a", "5", "", delivers=False)  # no session proves nothing


def test_one_links_refusal_does_not_make_the_other_wait_anew(monkeypatch):
    """Both links of a newcomer say hello every second; the rival is heard between, never between the two."""
    now = 100.0
    monkeypatch.setattr("serl_transport.connection.sessions.time.monotonic", lambda: now)
    rival = Peer(b"r", "robot", "older", last_seen=99.0)
    sessions = Sessions(lambda name, boot: [rival], lambda address: True, lambda address: None)
    for delivers in (True, False):
        with pytest.raises(NotReady):
            sessions.enter("robot", "newer", "s", delivers=delivers)
    rival.last_seen, now = 100.5, 101.0
    for delivers in (True, False):
        with pytest.raises(Refused, match="another living process"):
            sessions.enter("robot", "newer", "s", delivers=delivers)


def test_a_link_that_is_closed_before_its_hello_was_answered_ends_whole():
    """Its thread ends, its context with it, and whoever asked is told."""
    context = zmq.Context()
    mute = context.socket(zmq.ROUTER)
    port = mute.bind_to_random_port("tcp://127.0.0.1")
    link = Link(f"tcp://127.0.0.1:{port}", name="x", actor_id="a", boot_id="b", hello=dict, heartbeat=dict)
    link.start()
    try:
        assert mute.poll(10_000)  # its hello
        answers = [link.ask("infer", {}) for _ in range(3)]
        deadline = time.monotonic() + 10
        while len(link._pending) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        link.stop()
        context.destroy(linger=0)
    assert link.context.closed
    assert link.refused is None
    for answer in answers:
        with pytest.raises(ServerSilent, match="was closed"):
            answer.result(5.0)
