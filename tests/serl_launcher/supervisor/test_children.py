"""Roles as child processes: their logs, their exit codes, when they are up; real processes throughout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import python, wait_for

from serl_launcher.supervisor.children import Child, ChildSpec


def test_output_exit_code_and_tail_are_of_this_start(tmp_path):
    spec = ChildSpec("role", python("print('one'); print('two'); raise SystemExit(7)"), log=tmp_path / "logs/role.log")
    child = Child(spec)
    for _ in range(2):
        child.start()
        death = wait_for(child.poll, "the exit")
        assert (death.name, death.code, death.cause) == ("role", 7, "exit code 7")
        assert child.tail() == ["one", "two"]
        assert child.poll() is None
    assert spec.log.read_text().count("two") == 2


def write_module(folder: Path, text: str) -> dict[str, str]:
    (folder / "small_role.py").write_text(text)
    return {**os.environ, "PYTHONPATH": str(folder)}


@pytest.mark.parametrize(("end", "code"), [("sys.exit(2)", 2), ("sys.exit()", 0), ("pass", 0), ("sys.exit('bad')", 1)])
def test_lifeline_passes_the_exit_code_on(tmp_path, end, code):
    env = write_module(tmp_path, f"import sys\nassert sys.argv[1:] == ['a']\nif __name__ == '__main__': {end}")
    done = subprocess.run([sys.executable, "-m", "serl_launcher.supervisor.lifeline", "small_role", "a"], env=env)
    assert done.returncode == code


def test_a_child_is_ready_once_it_has_removed_its_starting_file(tmp_path):
    up = "import os, time; os.unlink(os.environ['FLOWSERL_STARTING_FILE']); time.sleep(600)"
    child = Child(ChildSpec("role", python(up), starting_file=tmp_path / "logs" / "role.starting"))
    child.start()
    wait_for(lambda: child.ready, "its word")
    child.stop()
    never = Child(ChildSpec("role", python("pass"), starting_file=tmp_path / "logs" / "role.starting"))
    for _ in range(2):  # each start begins anew
        never.start()
        assert not wait_for(never.poll, "the exit").ready
