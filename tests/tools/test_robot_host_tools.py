"""Which tools work in a robot host's environment, and what the others say there: without anything of the learner's."""

import json
import subprocess
import sys

from robot_host import ABSENT, PROGRAM

THERE = {"check_robot", "doctor", "estop", "keygen", "merge_video", "operate", "visualize_dataset"}
LEARNERS = {
    "audit_reward", "check_run", "edit_dataset", "eval_open_loop", "export_checkpoint", "preflight", "reaccept",
    "recover_run", "runs", "submit_job", "why",
}  # fmt: skip
PARTS = {"compile_imports", "needs_learner", "sources"}  # not for people


def test_a_robot_host_has_its_tools_and_the_others_say_where_they_work(repo_root):
    tools = {path.stem: path for path in (repo_root / "tools").glob("*.py")}
    assert set(tools) == THERE | LEARNERS | PARTS
    wanted = [str(tools[name]) for name in sorted(THERE | LEARNERS)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([ABSENT, wanted, ["--help"]])],
        capture_output=True, text=True, timeout=120,
        env={"PYTHONPATH": str(repo_root / "tools")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    for name in THERE:
        code, out, err = said[str(tools[name])]
        assert (code or 0, err) == (0, ""), name
        assert "usage:" in out
    for name in LEARNERS:
        code, _, err = said[str(tools[name])]
        assert code == 2, f"{name}: {code}"
        assert err.startswith(f"{name}.py: this needs the learner's environment")
        assert len(err.splitlines()) == 1
