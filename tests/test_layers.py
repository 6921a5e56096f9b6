"""The import rule of docs/architecture.md, checked on the syntax tree of every module.

serl_transport ← { openpi_client, serl_robot_infra, serl_launcher }; serl_robot_infra may use openpi_client; the robot
side and the launcher never meet. Torch-free packages never import torch at module level.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGES = {
    "flowserl_cli": "packages/flowserl-cli/src/flowserl_cli",
    "serl_config": "packages/serl-config/src/serl_config",
    "serl_transport": "packages/serl-transport/src/serl_transport",
    "openpi_client": "packages/openpi-client/src/openpi_client",
    "serl_robot_infra": "serl_robot_infra/serl_robot_infra",
    "serl_launcher": "serl_launcher/serl_launcher",
}
# package -> our other packages that it may import
ALLOWED = {
    "flowserl_cli": {"serl_config", "serl_robot_infra", "serl_launcher"},
    "serl_config": set(),
    "serl_transport": set(),
    "openpi_client": {"serl_transport"},
    "serl_robot_infra": {"serl_config", "serl_transport", "openpi_client"},
    "serl_launcher": {"serl_config", "serl_transport", "openpi_client"},
}
HEAVY = {"torch", "torchvision", "lerobot", "transformers", "accelerate", "safetensors"}
TORCH_FREE = ("serl_config", "serl_transport", "openpi_client", "serl_robot_infra")
# Inside the launcher, lower layers do not know the upper ones. (telemetry and paths belong to all.)
UPPER = {
    "replay": {"policies", "critics", "agents", "learner", "serving", "gateway", "exporter"},
    "policies": {"replay", "critics", "agents", "learner", "serving", "gateway", "exporter"},
    "critics": {"replay", "agents", "learner", "serving", "gateway", "exporter"},
    "agents": {"learner", "serving", "gateway", "exporter"},
    "gateway": {"policies", "critics", "agents", "serving", "exporter"},
}
# The processes of the GPU box that must start fast and must not hold torch.
TORCH_FREE_MODULES = ("serl_launcher.gateway.__main__", "serl_launcher.supervisor.main", "serl_launcher.exporter.role")


def imports(source: str, package: str) -> Iterator[tuple[str, bool]]:
    """Absolute names that a module of `package` imports, and whether it does so at module level."""
    tree = ast.parse(source)
    top = set(map(id, _top_level(tree.body)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{module}.{alias.name}", id(node) in top) for alias in node.names)


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run on import; `if TYPE_CHECKING:` does not."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            yield from _top_level([*node.body, *node.orelse])
        elif isinstance(node, ast.Try):
            yield from _top_level([*node.body, *node.orelse, *node.finalbody])


def breaches(package: str, source: str, module: str) -> list[str]:
    """What one module imports against the rule; `module` is its dotted name."""
    found = []
    parts = module.split(".")
    for name, at_import in imports(source, module.rpartition(".")[0]):
        target = name.split(".")
        if target[0] in PACKAGES and target[0] != package and target[0] not in ALLOWED[package]:
            found.append(f"{module} imports {name}")
        if package in TORCH_FREE and target[0] in HEAVY and at_import:
            found.append(f"{module} imports {name}: {package} is torch-free")
        inside = package == target[0] == "serl_launcher" and len(parts) > 2 and len(target) > 1
        if inside and target[1] in UPPER.get(parts[1], ()):
            found.append(f"{module} imports {name}: {parts[1]} lies below {target[1]}")
    return found


def modules(root: Path, package: str) -> Iterator[tuple[str, str]]:
    """(dotted name, source) of every module of a package."""
    folder = root / PACKAGES[package]
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(folder).with_suffix("")
        yield ".".join([package, *relative.parts]), path.read_text(encoding="utf-8")


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(repo_root, package):
    found = [line for name, source in modules(repo_root, package) for line in breaches(package, source, name)]
    assert found == []


def test_every_package_has_modules(repo_root):
    # A moved folder would make the walk above pass on nothing.
    assert all(len(list(modules(repo_root, package))) > 1 for package in PACKAGES)


@pytest.mark.parametrize(
    ("package", "module", "source"),
    [
        ("serl_robot_infra", "serl_robot_infra.actor", "from serl_launcher.replay import ring"),
        ("serl_robot_infra", "serl_robot_infra.actor", "def f():\n    import serl_launcher.run.paths"),
        ("serl_launcher", "serl_launcher.run.paths", "import serl_robot_infra"),
        ("serl_transport", "serl_transport.wire.codec", "from openpi_client import base_policy"),
        ("serl_transport", "serl_transport.wire.codec", "import torch"),
        ("serl_robot_infra", "serl_robot_infra.envs.pick", "try:\n    import torch\nexcept ImportError:\n    pass"),
        ("serl_launcher", "serl_launcher.replay.views", "from serl_launcher.learner.trainer import Trainer"),
        ("serl_launcher", "serl_launcher.agents.sac", "from ..gateway import schedule"),
    ],
)
def test_the_walk_finds_a_breach(package, module, source):
    assert len(breaches(package, source, module)) == 1


@pytest.mark.parametrize(
    ("package", "module", "source"),
    [
        ("serl_robot_infra", "serl_robot_infra.wiring", "def local():\n    import torch"),
        ("serl_robot_infra", "serl_robot_infra.actor", "from openpi_client.base_policy import BasePolicy"),
        ("serl_launcher", "serl_launcher.learner.trainer", "import torch\nfrom serl_launcher.replay import ring"),
        ("serl_transport", "serl_transport.wire.codec", "if TYPE_CHECKING:\n    import torch"),
    ],
)
def test_the_walk_lets_the_allowed_pass(package, module, source):
    assert breaches(package, source, module) == []


@pytest.mark.parametrize("start", TORCH_FREE_MODULES)
def test_light_processes_reach_no_torch_at_import(repo_root, start):
    sources = dict(modules(repo_root, "serl_launcher"))
    seen, waiting = set(), [start]
    while waiting:
        module = waiting.pop()
        if module in seen or module not in sources:
            continue
        seen.add(module)
        for name, at_import in imports(sources[module], module.rpartition(".")[0]):
            if at_import:
                assert name.split(".")[0] not in {"torch", "lerobot", "transformers", "accelerate"}, f"{module}: {name}"
                waiting += [name, name.rpartition(".")[0], f"{name}.__init__", f"{name.rpartition('.')[0]}.__init__"]
    assert len(seen) > 3
