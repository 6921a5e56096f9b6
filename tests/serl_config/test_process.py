"""Process groups end whole, die with their parent, and the restart budget; real processes throughout."""

import subprocess
import sys
import time

from processes import gone, python, read_pid, wait_for

from serl_config.process import Death, Process, ProcessSpec, RestartBudget, group_members


def test_death_by_a_signal_is_named():
    process = Process(ProcessSpec("role", python("import os; os.kill(os.getpid(), 9)")))
    process.start()
    assert wait_for(process.poll, "the kill").cause == "signal SIGKILL"


def test_stop_ends_the_children_of_the_child(tmp_path):
    inner = "import signal,time; signal.signal(15, lambda *_: None); open('ready', 'w').write('1'); time.sleep(600)"
    code = f"import subprocess,sys; subprocess.Popen([sys.executable, '-S', '-c', {inner!r}]).wait()"
    process = Process(ProcessSpec("role", ("env", "-C", str(tmp_path), *python(code)), grace_s=0.3))
    process.start()
    pid = process.pid
    wait_for((tmp_path / "ready").exists, "the grandchild")
    assert len(group_members(pid)) == 2
    process.stop()  # the grandchild ignores SIGTERM
    assert group_members(pid) == []
    assert process.pid is None


def test_a_dead_leader_takes_its_group_along(tmp_path):
    code = "import subprocess,os; subprocess.Popen(['sleep', '600']); os._exit(1)"
    process = Process(ProcessSpec("role", python(code), grace_s=1.0))
    process.start()
    pid = process.pid
    assert wait_for(process.poll, "the exit").code == 1
    assert group_members(pid) == []


def test_a_child_dies_with_its_parent(tmp_path):
    parent_code = f"""
import sys, time
from pathlib import Path
from serl_config.process import Process, ProcessSpec
process = Process(ProcessSpec("role", ("sleep", "600")))
process.start()
Path({str(tmp_path / "pid")!r}).write_text(str(process.pid))
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", parent_code])
    pid = read_pid(tmp_path / "pid")
    assert not gone(pid)
    parent.kill()
    parent.wait()
    wait_for(lambda: gone(pid), "the orphan's end")


def death(lived_s=1.0, ready=False):
    return Death("role", 1, lived_s, ready)


def test_budget_backs_off_and_gives_up_on_the_fifth_death_before_it_was_ready():
    budget = RestartBudget()
    assert [budget.died(death(lived_s)) for lived_s in (1, 1, 1, 90, 1)] == [0.5, 1.0, 2.0, 0.5, None]


def test_budget_never_gives_up_what_was_ready_and_waits_a_minute_at_most():
    budget = RestartBudget()
    assert [budget.died(death(ready=True)) for _ in range(9)] == [0.5, 1, 2, 4, 8, 16, 32, 60, 60]
    assert budget.died(death(61.0, ready=True)) == 0.5


def test_a_process_counts_as_ready_after_a_minute(monkeypatch):
    process = Process(ProcessSpec("side", python("import time; time.sleep(600)")))
    process.start()
    assert not process.ready
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 61.0)
    assert process.ready
    monkeypatch.undo()
    process.stop()
