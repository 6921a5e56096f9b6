"""kill -9, SIGSTOP, duplicates, version mismatch: nothing that was acknowledged is lost or doubled."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass

import pytest
from rig import cpu_s, is_listening, until

from serl_transport import TrainerClient, TrainerConfig
from serl_transport.contract.errors import SchemaMismatch

LEARNER_KILLS = int(os.environ.get("FAULTS_LEARNER_KILLS", "20"))
ACTOR_KILLS = int(os.environ.get("FAULTS_ACTOR_KILLS", "10"))


def test_learner_and_actor_are_killed_again_and_again(rig, figures):
    """Also the whole way: ledger ⊆ journal ⊆ dataset, at the end."""
    run = rig()
    run.start_gateway()
    actor = run.start_actor()
    run.await_acknowledged(5, 60)
    resumes: list[Resume] = []
    for _ in range(LEARNER_KILLS):
        time.sleep(0.3)
        run.gateway.kill()
        run.gateway.wait()
        resumes.append(resume(run))
    actor_resumes = []
    for _ in range(ACTOR_KILLS):
        time.sleep(0.5)
        actor.kill()
        actor.wait()
        killed = time.monotonic()
        actor = run.start_actor()
        run.await_acknowledged(1, 30)
        actor_resumes.append(time.monotonic() - killed)
    run.finish(actor)
    run.stop_gateway()
    counts = run.judge(dataset=True)
    slowest = max(resumes, key=lambda one: one.seconds)
    figures.row(
        "kills", "0 acknowledged lost, 0 duplicates, resume ≤ 10 s", max(slowest.seconds, *actor_resumes) <= 10,
        learner_kills=LEARNER_KILLS, actor_kills=ACTOR_KILLS, lost=0, duplicates=0,
        acknowledged_items=counts["acknowledged items"], episodes_in_dataset=counts["episodes in the dataset"],
        learner_resume_s_max=round(slowest.seconds, 2), actor_resume_s_max=round(max(actor_resumes), 2),
        slowest_learner_resume=str(slowest),
    )  # fmt: skip
    assert max(slowest.seconds, *actor_resumes) <= 10, (str(slowest), actor_resumes, run.logs())


@dataclass(frozen=True, slots=True)
class Resume:
    """Where the time of one restart of the learner went."""

    listening_s: float  # from the start of the process until it listens: the interpreter and its imports
    ack_s: float  # from then until an acknowledgement: recovery, hello, journal
    cpu_s: float  # what the process had of the processor in all that time
    load: float  # of the machine

    @property
    def seconds(self) -> float:
        return self.listening_s + self.ack_s

    def __str__(self) -> str:
        spans = f"{self.listening_s:.2f} s to listen, {self.ack_s:.2f} s to an ack"
        return f"{spans}, {self.cpu_s:.2f} s of CPU, load {self.load:.1f}"


def resume(run) -> Resume:
    """Start the gateway and wait for an acknowledgement."""
    started = time.monotonic()
    gateway = run.start_gateway()
    before = run.acknowledged()
    until(lambda: is_listening(run.ports[0]) or gateway.poll() is not None, 30, f"it listens; {run.logs()}")
    listening = time.monotonic()
    until(lambda: run.acknowledged() > before, 30, f"an ack, {listening - started:.1f} s to listen; {run.logs()}")
    acknowledged = time.monotonic()
    load = os.getloadavg()[0]
    return Resume(listening - started, acknowledged - listening, cpu_s(gateway.pid), load)


def test_every_message_three_times(rig, figures):
    run = rig()
    run.start_gateway()
    actor = run.start_actor(tripled=True)
    run.await_acknowledged(20, 60)
    report = run.finish(actor)
    run.stop_gateway()
    counts = run.judge()
    assert counts["items in the journal"] == report["sent"]
    doubled = counts["items in the journal"] - report["sent"]
    figures.row("tripled", "0 duplicates", doubled == 0, items=report["sent"], duplicates=doubled)


def test_a_stopped_learner_is_noticed_within_the_timeout(rig, figures):
    """SIGSTOP: TCP stays up, nobody answers. Questions end at their timeout and the control loop goes on."""
    run, timeout_ms = rig(), 500
    run.start_gateway()
    actor = run.start_actor(infer_ms=timeout_ms)
    run.await_acknowledged(5, 60)
    run.gateway.send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    time.sleep(4)
    run.gateway.send_signal(signal.SIGCONT)
    woken = time.monotonic()
    resume_s = run.await_acknowledged(1, 30)
    report = run.finish(actor)
    run.stop_gateway()
    run.judge()
    silent = [took for at, took, code in report["silences"] if code == "server_silent" and stopped < at < woken - 1]
    assert silent
    period = 1 / run.hz
    late = max(silent) - timeout_ms / 1e3
    figures.row(
        "sigstop", "a question ends within two periods of its timeout", late <= 2 * period,
        late_periods=round(late / period, 2), resume_s=round(resume_s, 2), questions=len(silent),
    )  # fmt: skip
    assert late <= 2 * period


def test_other_versions_are_refused_by_name(rig):
    run = rig()
    run.start_gateway()
    actor = run.start_actor()
    run.await_acknowledged(2, 60)
    with pytest.raises(SchemaMismatch, match=r"version: '0\.0\.1' on the actor, '0\.1\.0' on the learner"):
        TrainerClient("old", "127.0.0.1", TrainerConfig(*run.ports, version="0.0.1"), wait_for_server=False)
    run.await_acknowledged(2)
    run.finish(actor)
    run.stop_gateway()
    run.judge()
