"""The actor side imports and runs an episode with torch made unimportable."""

import os
import subprocess
import sys
import textwrap

PROGRAM = """
    import importlib, io, pkgutil, sys

    class NoTorch:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in ("torch", "torchvision", "lerobot", "transformers", "serl_launcher"):
                raise ImportError(f"{name} is blocked: the actor side must not need it")

    sys.meta_path.insert(0, NoTorch())
    import openpi_client, serl_robot_infra, serl_transport

    for package in (openpi_client, serl_transport, serl_robot_infra):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            importlib.import_module(module.name)

    from scripted_learner import ScriptedLearner, actor_config, ticket
    from serl_robot_infra.main import main
    from serl_robot_infra.envs.pick import PickEnv

    spec = PickEnv(image_size=32, renderer="ray").spec
    with ScriptedLearner(spec, [ticket("demo", 1), ticket("online", 2)]) as learner:
        code = main(actor_config(learner, sys.argv[1]), io.StringIO())
        assert [e.outcome.success for e in learner.episodes()] == [True, True]
    assert code == 0
    assert "torch" not in sys.modules
    print("ran without torch")
"""


def test_the_actor_side_runs_without_torch(tmp_path):
    paths = [os.path.dirname(__file__), *(path for path in sys.path if path)]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ran without torch" in done.stdout
