"""A role that is stopped, hangs or is killed, in a whole run: both screens say so, and it is started again."""

import os
import re
import signal
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from whole_run import Run, check

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
    """A run of online episodes only, long enough for its roles to be looked after."""
    stages = "schedule.stages=[{name: online, mode: online, episodes: 45, steps: 20}]"
    return Run(folder, ports, stages, "serving.openpi_port=0", stages_of_its_own=True, env=env)


def is_well(status: dict) -> bool:
    """Every role works, and episodes come in."""
    return not status["troubles"] and status["trainer"]["alive"] and status["counts"]["online"] >= 2


def within(run: Run, pattern: str, seconds: float, start: int = 0) -> float:
    """Wait until the screens show what matches, from character `start` on; the seconds it took."""
    began = time.monotonic()
    while not re.search(pattern, run.text()[start:], re.MULTILINE):
        assert run.process.poll() is None, run.text()[-4000:]
        assert time.monotonic() - began < seconds, f"no {pattern!r} within {seconds} s:\n{run.text()[start:][-4000:]}"
        time.sleep(0.1)
    return time.monotonic() - began


def shown(run: Run, role: str, start: int) -> float:
    """Both screens tell of the role; the seconds it took. Actors see a silent gateway for themselves, or, where it was
    soon there again, hear of it from the next one."""
    began = time.monotonic()
    within(run, rf"^\[learner\] \S+ {role}: (stopped|silent)", 10, start)
    at_the_actor = rf"learner: {role} " + ("|learner silent for" if role == "gateway" else "")
    within(run, rf"^\[actor\] ({at_the_actor})", 10 - (time.monotonic() - began), start)
    return time.monotonic() - began


def shown_and_started_again(run: Run, signum: int, *roles: str, again_s: float = 60) -> dict[str, float]:
    """Send the signal to all these roles at once; the seconds until both screens told of each."""
    start = len(run.text())
    for role in roles:
        os.kill(run.pid(MODULES[role]), signum)
    began, took = time.monotonic(), {}
    for role in roles:
        shown(run, role, start)
        took[role] = round(time.monotonic() - began, 1)
    all_well_again(run, start, roles, again_s)
    return took


def all_well_again(run: Run, start: int, names: Iterable[str], again_s: float = 60) -> None:
    """Each was started again, and a gateway of now says that all is well."""
    for name in names:
        within(run, rf"^\[learner\] \S+ {name} started again", again_s, start)
    since = time.time()
    run.wait_for(lambda status: status["time"] > since and is_well(status), 90)


ROUNDS = ("policy", "trainer", "exporter", "openpi"), ("gateway",)


@pytest.mark.timeout(600)
def test_a_role_that_is_stopped_is_shown_on_both_screens_and_started_again(tmp_path, free_ports, figures):
    """And one that is killed, the actor too: nothing is lost."""
    took: dict[str, float] = {}
    with small(tmp_path, free_ports) as run:
        run.wait_for(is_well, 180)
        for roles in ROUNDS:
            took |= shown_and_started_again(run, signal.SIGSTOP, *roles)
        all_are_killed_at_once(run)
        a_stopped_supervisor_is_shown_and_the_run_goes_on(run)
        run.end(300)
    figures.row("stopped roles", "shown on both screens within 10 s", max(took.values()) <= 10, **took)
    assert "nothing lost" in check(run.folder)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_role_whose_work_loop_hangs_is_shown_started_again_and_says_where_it_hung(tmp_path, free_ports, figures):
    (tmp_path / "sitecustomize.py").write_text(HANG)
    took: dict[str, float] = {}
    with small(tmp_path, free_ports, PYTHONPATH=str(tmp_path)) as run:
        run.wait_for(is_well, 180)
        for roles in ROUNDS:
            took |= shown_and_started_again(run, signal.SIGUSR1, *roles)
        run.end(300)
    figures.row("hanging roles", "shown on both screens within 10 s", max(took.values()) <= 10, **took)
    for role in MODULES:
        assert "in hang" in (run.folder / "logs" / f"{role}.log").read_text(), role
    assert "nothing lost" in check(run.folder)


def all_are_killed_at_once(run: Run) -> None:
    start, before = len(run.text()), run.status()["counts"]["online"]
    for module in (*MODULES.values(), "actor=true"):
        run.kill(module)
    all_well_again(run, start, MODULES)
    run.wait_for(lambda status: status["counts"]["online"] >= before + 2, 60)


def a_stopped_supervisor_is_shown_and_the_run_goes_on(run: Run) -> None:
    supervisor, start, before = run.pid("learner=true"), len(run.text()), run.status()["counts"]["online"]
    os.kill(supervisor, signal.SIGSTOP)
    within(run, r"^\[actor\] learner: supervisor silent for", 10, start)
    within(run, r"^\[learner\] the learner is stopped \(SIGSTOP\)", 10, start)
    run.wait_for(lambda status: status["counts"]["online"] > before, 60)
    os.kill(supervisor, signal.SIGCONT)
    within(run, r"^\[actor\] learner: supervisor is well again", 10, start)
    assert "started again (pid" not in run.text()[start:]
