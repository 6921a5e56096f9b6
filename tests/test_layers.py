"""Who may import whom: pyproject.toml's contracts ([tool.importlinter]), run on the checkout and on a broken copy."""

import graphlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

SOURCES = (
    "flowserl_cli",
    "packages/serl-config/src",
    "packages/serl-transport/src",
    "packages/openpi-client/src",
    "serl_robot_infra",
    "serl_launcher",
)
PACKAGES = ("flowserl_cli", "serl_config", "serl_transport", "openpi_client", "serl_robot_infra", "serl_launcher")
# The processes of the GPU box that must start fast and must not hold torch.
LIGHT = (
    "serl_launcher.gateway.__main__", "serl_launcher.supervisor.main", "serl_launcher.exporter.role",
    "serl_launcher.console.__main__", "serl_launcher.follower.__main__",
)  # fmt: skip
HEAVY = ("torch", "torchvision", "lerobot", "transformers", "accelerate")

# What a file of a package may not say -> how the contract that forbids it is called in the report.
BREACHES = {
    ("serl_robot_infra", "from serl_launcher.replay import ring"): "robot side and the launcher never meet",
    ("serl_launcher.run", "def f():\n    import serl_robot_infra.link"): "robot side and the launcher never meet",
    ("openpi_client", "import serl_config.mistakes"): "client package knows the wire alone",
    ("flowserl_cli", "import serl_transport.client"): "commands know the two sides",
    ("serl_robot_infra.envs", "try:\n    import torch\nexcept ImportError:\n    pass"): "free of torch",
    ("serl_launcher.replay", "from ..agents import sac"): "rooms of the launcher",
    ("serl_launcher.serving", "import serl_launcher.supervisor.main"): "rooms of the launcher",
    ("serl_launcher.critics", "def f():\n    import serl_launcher.run.paths"): "rooms of the launcher",
    ("serl_transport.wire", "import serl_transport.connection.link"): "rooms of the transport",
    ("serl_robot_infra.observers", "import serl_robot_infra.wiring"): "No circles",
}


def lint(root: Path, config: Path) -> tuple[int, str]:
    """Exit code and report of `lint-imports` on the packages of a checkout."""
    paths = os.pathsep.join(str(root / source) for source in SOURCES)
    command = [str(Path(sys.executable).with_name("lint-imports")), str(config), "--no-cache", "--no-logo"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": paths, "COLUMNS": "300"}
    )
    return done.returncode, done.stdout + done.stderr


def test_the_contracts_hold(repo_root):
    code, report = lint(repo_root, repo_root / "pyproject.toml")
    assert code == 0, report


@pytest.fixture(scope="module")
def report_on_a_broken_copy(repo_root, tmp_path_factory):
    """The report on a checkout to which every one of BREACHES was added, a file each."""
    root = tmp_path_factory.mktemp("broken")
    for source in SOURCES:
        shutil.copytree(repo_root / source, root / source, ignore=shutil.ignore_patterns("__pycache__"))
    for number, (package, text) in enumerate(BREACHES):
        folder = next(root / source for source in SOURCES if (root / source / package.split(".")[0]).is_dir())
        (folder / package.replace(".", "/") / f"breach_{number}.py").write_text(text + "\n")
    return lint(root, repo_root / "pyproject.toml")


@pytest.mark.parametrize("breach", BREACHES, ids=lambda breach: f"{breach[0]}: {breach[1].splitlines()[-1].strip()}")
def test_a_breach_is_found(report_on_a_broken_copy, breach):
    code, report = report_on_a_broken_copy
    number = list(BREACHES).index(breach)
    (section,) = [part for part in sections(report) if BREACHES[breach] in part.partition("\n")[0]]
    assert code == 1
    found = "in serl_robot_infra." if BREACHES[breach] == "No circles" else f"{breach[0]}.breach_{number} -> "
    assert found in section


def sections(report: str) -> list[str]:
    """The part of the report for each broken contract, its name first."""
    _, _, broken = report.partition("Broken contracts\n")
    lines = broken.splitlines()
    heads = [i for i in range(len(lines) - 1) if lines[i] and lines[i + 1] == "-" * len(lines[i])]
    return ["\n".join(lines[a:b]) for a, b in zip(heads, [*heads[1:], len(lines)], strict=True)]


def test_no_file_imports_itself_in_the_end():
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    assert len(graph.modules) > 200
    assert circle({name: graph.find_modules_directly_imported_by(name) for name in graph.modules}) == []


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring; none: an empty list."""
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_a_circle_is_named():
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()})) == {"a", "b", "c"}


def test_light_processes_import_no_torch():
    program = f"import sys, {', '.join(LIGHT)}\nprint(*sorted(set(sys.modules) & {set(HEAVY)}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
