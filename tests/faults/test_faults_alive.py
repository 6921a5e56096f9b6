"""A role that is stopped or hangs, in a whole run: both screens say so within ten seconds, and it is started again."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
from whole_run import STEPS, Run, check

MODULES = {
    "gateway": "serl_launcher.gateway",
    "policy": "serl_launcher.serving",
    "trainer": "serl_launcher.learner",
    "exporter": "serl_launcher.exporter",
    "openpi": "serl_launcher.serving.openpi_server",
}
# SIGUSR1 makes the main thread, which is every role's work loop, wait for a lock that it holds itself.
HANG = """
import signal, threading

def hang(*_):
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()

signal.signal(signal.SIGUSR1, hang)
"""


def small(folder: Path, ports: tuple[int, int], **env: str) -> Run:
    """A run whose online stage lasts until 30 episodes are there; its roles are looked at meanwhile."""
    return Run(folder, ports, "+schedule.stages.3.episodes=30", "serving.openpi_port=0", env=env)


def within(run: Run, pattern: str, seconds: float, start: int = 0) -> float:
    """Wait until the screens show what matches, from character `start` on; the seconds it took."""
    began = time.monotonic()
    while not re.search(pattern, run.text()[start:], re.MULTILINE):
        assert run.process.poll() is None, run.text()[-4000:]
        assert time.monotonic() - began < seconds, f"no {pattern!r} within {seconds} s:\n{run.text()[start:][-4000:]}"
        time.sleep(0.1)
    return time.monotonic() - began


def shown(run: Run, role: str, start: int) -> float:
    """Both screens tell of the role; the seconds it took. The actors of a silent gateway see that for themselves."""
    began = time.monotonic()
    within(run, rf"^\[learner\] \S+ {role}: (stopped|silent)", 10, start)
    at_the_actor = "learner silent for" if role == "gateway" else rf"learner: {role} "
    within(run, rf"^\[actor\] {at_the_actor}", 10 - (time.monotonic() - began), start)
    return time.monotonic() - began


@pytest.mark.timeout(500)
def test_each_role_that_is_stopped_is_shown_on_both_screens_and_started_again(tmp_path, free_ports, figures):
    took: dict[str, float] = {}
    with small(tmp_path, free_ports) as run:
        run.wait_for(lambda status: status["counts"]["online"] >= 2 and status["trainer"]["step"] > STEPS["sft"], 180)
        for role, module in [*MODULES.items(), ("launcher", MODULES["trainer"])]:
            start, name = len(run.text()), "trainer" if role == "launcher" else role
            os.kill(run.pid(module, launcher=role == "launcher"), signal.SIGSTOP)
            took[role] = shown(run, name, start)
            within(run, rf"^\[learner\] \S+ {name} started again", 30, start)
            run.wait_for(lambda status: not status["troubles"] and status["trainer"]["alive"], 90)
        summary = run.end(300)
    figures.row("stopped roles", "shown on both screens within 10 s", max(took.values()) <= 10,
                **{role: round(seconds, 1) for role, seconds in took.items()})  # fmt: skip
    assert summary["success_rate_episodes"] == 4
    assert "nothing lost" in check(run.folder)


@pytest.mark.timeout(500)
def test_each_role_whose_work_loop_hangs_is_shown_and_started_again_and_says_where_it_hung(
    tmp_path, free_ports, figures
):
    (tmp_path / "sitecustomize.py").write_text(HANG)
    took: dict[str, float] = {}
    with small(tmp_path, free_ports, PYTHONPATH=str(tmp_path)) as run:
        run.wait_for(lambda status: status["counts"]["online"] >= 2 and status["trainer"]["step"] > STEPS["sft"], 180)
        for roles in (("policy", "trainer", "exporter", "openpi"), ("gateway",)):
            start = len(run.text())
            for role in roles:
                os.kill(run.pid(MODULES[role]), signal.SIGUSR1)
            began = time.monotonic()
            for role in roles:
                shown(run, role, start)
                took[role] = time.monotonic() - began
            for role in roles:
                within(run, rf"^\[learner\] \S+ {role} started again", 60, start)
                assert "in hang" in (run.folder / "logs" / f"{role}.log").read_text()
            run.wait_for(lambda status: not status["troubles"] and status["trainer"]["alive"], 90)
        summary = run.end(300)
    figures.row("hanging roles", "shown on both screens within 10 s", max(took.values()) <= 10,
                **{role: round(seconds, 1) for role, seconds in took.items()})  # fmt: skip
    assert summary["success_rate_episodes"] == 4
    assert "nothing lost" in check(run.folder)


@pytest.mark.timeout(300)
def test_a_stopped_supervisor_is_shown_and_the_run_goes_on(tmp_path, free_ports):
    with small(tmp_path, free_ports) as run:
        run.wait_for(lambda status: status["counts"]["online"] >= 1, 180)
        supervisor, start = run.pid("learner=true"), len(run.text())
        os.kill(supervisor, signal.SIGSTOP)
        within(run, r"^\[actor\] learner: supervisor silent for", 10, start)
        within(run, r"^\[learner\] the learner is stopped \(SIGSTOP\)", 10, start)
        before = run.status()["counts"]["online"]
        run.wait_for(lambda status: status["counts"]["online"] > before, 60)
        os.kill(supervisor, signal.SIGCONT)
        run.end(300)
    assert "started again" not in run.text()
    assert "is killed" not in run.text()
