"""A robot host's environment out of the learner's: its packages hidden, and a program that runs tools there."""

ABSENT = ("serl_launcher", "torch", "lerobot", "matplotlib", "rerun", "transformers", "safetensors", "pandas")
PROGRAM = """
import contextlib, importlib.abc, io, json, runpy, sys
absent, tools, words = json.loads(sys.argv[1])

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
    sys.argv = [tool, *words]
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
