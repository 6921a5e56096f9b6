"""10,000 hostile messages and 900 half-open connections against a real gateway, an honest actor beside them.

Every message is answered by a typed error or dropped and counted; the process lives, its memory stays, and the honest
actor loses nothing.
"""

from __future__ import annotations

import os
import random
import socket
import time
from collections import Counter

import keygen
import pytest
import zmq
from chaos import SEED
from hostile import Hostile, tcp_garbage
from rig import Windows

from serl_transport import TrainerConfig
from serl_transport.contract.specs import TaskSpec
from serl_transport.security import auth
from serl_transport.security.keys import ClientKeys
from serl_transport.wire.codec import DEFAULT_LIMITS, pack
from serl_transport.wire.envelope import Envelope

MESSAGES = int(os.environ.get("FAULTS_HOSTILE", "10000"))
HALF_OPEN = 900
BURSTS = 8
CALM_S = 2.0


def rss_mb(pid: int) -> float:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


class Intruder:
    """A DEALER with an actor's key that has said hello and then misbehaves; reconnects when it is cut off."""

    def __init__(self, port: int, keys_dir: str, spec: TaskSpec):
        self.context = zmq.Context()
        self.keys = ClientKeys.load(keys_dir, "intruder")
        self.port, self.spec = port, spec
        self.answers: Counter[str] = Counter()
        self.connect()

    def connect(self) -> None:
        self.socket = self.context.socket(zmq.DEALER)
        auth.configure(self.socket, DEFAULT_LIMITS, self.keys)
        self.socket.connect(f"tcp://127.0.0.1:{self.port}")
        limits = {key: 1 for key in ("header_bytes", "frame_bytes", "total_bytes", "frames", "depth", "rank")}
        hello = {"version": TrainerConfig().version, "limits": limits, "spec": self.spec.to_dict()}
        self.socket.send_multipart([Envelope("hello", "intruder", "b", 0, 1).to_frame(), *pack(hello)])
        assert self.socket.poll(20_000), "the intruder's own hello was not answered"
        assert Envelope.from_frame(self.socket.recv_multipart()[0]).error is None

    def ask(self, frames: list[bytes]) -> str:
        """Send; the error code of the answer, or 'ok'."""
        self.socket.send_multipart(frames)
        if not self.socket.poll(20_000):
            return "no answer"
        error = Envelope.from_frame(self.socket.recv_multipart()[0]).error
        return error[0] if error else "ok"


@pytest.fixture
def under_siege(rig, tmp_path):
    """A gateway with keys, an honest actor, an intruder with an actor's key."""
    keys = tmp_path / "keys"
    assert keygen.main([str(keys), "--actor", "robot-1", "--actor", "intruder"]) == 0
    run = rig(security={"keys_dir": str(keys), "allow_list": None})
    run.start_gateway()
    actor = run.start_actor(keys_dir=str(keys))
    run.await_acknowledged(5, 60)
    time.sleep(4)
    from fault_actor import make_spec

    intruder = Intruder(run.ports[0], str(keys), make_spec())
    yield run, actor, intruder
    intruder.context.destroy(linger=0)


def test_ten_thousand_hostile_messages(under_siege, figures):
    run, actor, intruder = under_siege
    pid, before, began = run.gateway.pid, rss_mb(run.gateway.pid), time.monotonic()
    print(f"hostile seed {SEED}")
    stock, rng = Hostile(SEED), random.Random(SEED)
    outcomes: Counter[tuple[str, str]] = Counter()
    garbage, windows, burst = 0, Windows(), began
    for i in range(MESSAGES):
        if i % max(1, MESSAGES // BURSTS) == 0:  # whatever else the machine does falls on both kinds of windows alike
            if i:
                windows.spans["fault"].append((burst, time.monotonic()))
            with windows.during("calm"):
                time.sleep(CALM_S)
            burst = time.monotonic()
        if i % 20 == 19:  # no protocol at all, on connections of their own
            with socket.create_connection(("127.0.0.1", run.ports[i // 20 % 2]), timeout=5) as raw:
                raw.sendall(tcp_garbage(rng))
            garbage += 1
            continue
        attack, frames = stock.make()
        outcomes[attack, intruder.ask(frames)] += 1
    ended = time.monotonic()
    windows.spans["fault"].append((burst, ended))
    assert run.gateway.poll() is None
    assert run.gateway.pid == pid
    growth = rss_mb(pid) - before
    report = run.finish(actor)
    run.stop_gateway()
    counts = run.judge()
    unanswered = sum(n for (_, code), n in outcomes.items() if code == "no answer")
    accepted = {attack: n for (attack, code), n in outcomes.items() if code == "ok"}
    ratio = windows.p99_ratio(report)
    lost = report["sent"] - counts["items in the journal"]
    figures.row(
        "hostile", "each a typed error or a counted drop, same process, < 200 MB, honest actor loses 0, p99 < 3 ×",
        not unanswered and not accepted and growth < 200 and ratio < 3 and not lost,
        messages=MESSAGES, typed_errors=sum(outcomes.values()) - unanswered - sum(accepted.values()),
        connections_of_garbage=garbage, unanswered=unanswered, accepted=accepted,
        codes=dict(Counter(code for (_, code), n in outcomes.items() for _ in range(n))),
        rss_growth_mb=round(growth, 1), honest_p99_ratio=round(ratio, 2), honest_items=report["sent"], honest_lost=lost,
        seconds=round(ended - began, 1),
    )  # fmt: skip
    assert unanswered == 0
    assert not accepted, accepted
    assert growth < 200
    assert ratio < 3
    assert counts["items in the journal"] == report["sent"], "an intruder's item was taken, or an honest one lost"


def test_nine_hundred_half_open_connections(under_siege, figures):
    run, actor, intruder = under_siege
    windows = Windows()
    with windows.during("calm"):
        time.sleep(4)
    with windows.during("fault"):
        began = time.monotonic()
        idle = [socket.create_connection(("127.0.0.1", run.ports[i % 2]), timeout=5) for i in range(HALF_OPEN)]
        newcomer = Intruder(run.ports[0], str(run.run.parent / "keys"), intruder.spec)
        welcome_s = time.monotonic() - began
        newcomer.context.destroy(linger=0)
        run.await_acknowledged(16, 60)
    deadline = time.monotonic() + 3 * auth.HANDSHAKE_MS / 1e3
    closed = 0
    for connection in idle:  # the gateway closes every one of them, by itself
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            while connection.recv(4096):
                pass
            closed += 1
        except ConnectionResetError:
            closed += 1
        except TimeoutError:
            pass
        connection.close()
    with windows.during("calm"):
        time.sleep(4)
    report = run.finish(actor)
    run.stop_gateway()
    counts = run.judge()
    ratio = windows.p99_ratio(report)
    figures.row(
        "half_open", "all closed, a newcomer let in, honest p99 < 3 ×", closed == HALF_OPEN and ratio < 3,
        connections=HALF_OPEN, closed_by_the_gateway=closed, newcomer_s=round(welcome_s, 2),
        honest_p99_ratio=round(ratio, 2),
    )  # fmt: skip
    assert closed == HALF_OPEN
    assert counts["items in the journal"] == report["sent"]
    assert ratio < 3
