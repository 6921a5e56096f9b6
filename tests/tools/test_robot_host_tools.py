"""Which tools work in a robot host's environment, and what the others say there: without anything of the learner's."""

import json
import subprocess
import sys

ABSENT = ("serl_launcher", "torch", "lerobot", "matplotlib", "rerun", "transformers", "safetensors", "pandas")
THERE = {"check_robot", "estop", "keygen", "merge_video", "operate", "visualize_dataset"}
LEARNERS = {
    "audit_reward", "check_run", "eval_open_loop", "export_checkpoint", "preflight", "reaccept", "recover_run", "why",
}  # fmt: skip
PARTS = {"compile_imports", "needs_learner", "sources"}  # not for people
PROGRAM = """
import contextlib, importlib.abc, io, json, runpy, sys
absent, tools = json.loads(sys.argv[1])

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def find(name, real=importlib.util.find_spec):
    return None if name in absent else real(name)

sys.meta_path.insert(0, Blocked())
importlib.util.find_spec = find
said = {}
for tool in tools:
    sys.argv = [tool, "--help"]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(tool, run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code
        except ImportError as error:
            code = str(error)
    sys.modules.pop("needs_learner", None)
    said[tool] = [code, out.getvalue(), err.getvalue()]
print(json.dumps(said))
"""


def test_a_robot_host_has_its_tools_and_the_others_say_where_they_work(repo_root):
    tools = {path.stem: path for path in (repo_root / "tools").glob("*.py")}
    assert set(tools) == THERE | LEARNERS | PARTS
    wanted = [str(tools[name]) for name in sorted(THERE | LEARNERS)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([ABSENT, wanted])], capture_output=True, text=True, timeout=120,
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
