"""A lab's own config folder and package, outside this checkout: `--config-dir ../my_lab/config`.

    ../my_lab/config/{task,operator,reward,…}/*.yaml   shadow and extend the groups of config/
    ../my_lab/my_lab/…                                 the package that they name, beside the folder or installed

Called by `compose` with the command line's words. A `Lab` flows out, and `use` makes its package importable here and in
every process that is started from here. A `_target_` of neither this project nor a package that the user named is
refused: named are the packages beside the folder, which the flag points at, and those of FLOWSERL_TRUST.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import yaml

from serl_config.nearest import nearest

FLAG = "--config-dir"
TRUST = "FLOWSERL_TRUST"
OURS = ("flowserl_cli", "openpi_client", "serl_config", "serl_launcher", "serl_robot_infra", "serl_transport")


@dataclass(frozen=True, slots=True)
class Lab:
    """One config folder, and the packages that its yamls name."""

    config_dir: Path  # absolute
    packages: dict[str, Path]  # top-level name -> its folder or file

    @property
    def root(self) -> Path:
        """Where packages of its own lie: beside the folder."""
        return self.config_dir.parent

    def use(self) -> None:
        """Its packages can be imported and are trusted, here and in the processes that are started from here."""
        if any(path.parent == self.root for path in self.packages.values()):
            if str(self.root) not in sys.path:
                sys.path.append(str(self.root))
            _add_to("PYTHONPATH", [str(self.root)], os.pathsep)
        _add_to(TRUST, [name for name in self.packages if name not in OURS], ",")

    def origin(self) -> dict[str, Any]:
        """Which code this is, for the record: `config_dir`, and of each package version, commit and digest."""
        return {
            "config_dir": str(self.config_dir),
            "packages": {name: _identity(name, path) for name, path in sorted(self.packages.items())},
        }


def joined(argv: Sequence[str]) -> list[str]:
    """`--config-dir X` as the one word `--config-dir=<absolute X>`. ValueError: no folder follows, or it is said twice.

    Relative to the work folder, which the run scripts set to the checkout.
    """
    words: list[str] = []
    rest = iter(argv)
    for word in rest:
        if word == FLAG:
            word = f"{FLAG}={next(rest, '')}"
        if word.startswith(f"{FLAG}="):
            folder = word.partition("=")[2]
            if not folder or folder.startswith("--"):
                raise ValueError(
                    f"{FLAG}: expected a folder, such as {FLAG} ../my_lab/config, got {folder or 'nothing'}"
                )
            word = f"{FLAG}={Path(folder).resolve()}"
        words.append(word)
    if sum(word.startswith(f"{FLAG}=") for word in words) > 1:
        raise ValueError(f"{FLAG} is said twice; expected one folder")
    return words


def take_lab(words: Sequence[str], ours: Path) -> tuple[list[str], Lab | None]:
    """The other words, and the lab that `--config-dir` names; `ours`: this project's config folder.

    ValueError names the folder, file or name that cannot be used as meant.
    """
    words = joined(words)
    folders = [word.partition("=")[2] for word in words if word.startswith(f"{FLAG}=")]
    others = [word for word in words if not word.startswith(f"{FLAG}=")]
    return others, _open(Path(folders[0]), ours) if folders else None


def _open(folder: Path, ours: Path) -> Lab:
    if not folder.is_dir():
        raise ValueError(f"{FLAG} {folder}: no such folder (relative ones start at {Path.cwd()})")
    if folder == ours.resolve():
        raise ValueError(f"{FLAG} {folder}: that is this project's own, which is always read; name your lab's")
    _check_layout(folder, ours)
    named = _named(ours)
    packages: dict[str, Path] = {}
    for file in sorted(folder.rglob("*.yaml")):
        for key, target in _targets(_read(file)):
            name = target.partition(".")[0]
            if name in OURS or target in named:
                continue
            packages[name] = packages.get(name) or _find(name, folder, f"{file}: {key}: {target}")
    _check_names(folder.parent, packages)
    return Lab(folder, packages)


def _check_layout(folder: Path, ours: Path) -> None:
    groups = sorted(path.name for path in ours.iterdir() if path.is_dir())
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name not in groups and any(path.rglob("*.yaml")):
            raise ValueError(f"{path}: no group is called {path.name!r}{nearest(path.name, groups)}")
        if path.suffix == ".yaml":
            raise ValueError(
                f"{path}: expected yamls in the folders of groups ({', '.join(groups)}); {path.name} is not read"
            )
    if not any(folder.glob("*/*.yaml")):
        raise ValueError(f"{FLAG} {folder}: it holds no yaml: expected task/<yours>.yaml and the like")


def _read(file: Path) -> Any:
    try:
        return yaml.load(file.read_text("utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{file} cannot be read: {' '.join(str(error).split())}") from None


def _targets(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key of the `_target_`, its name) of everything in a yaml."""
    for name, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if name == "_target_" and isinstance(child, str) and "${" not in child:
            yield f"{key}._target_" if key else "_target_", child
        yield from _targets(child, f"{key}.{name}" if key else str(name))


@lru_cache(1)
def _named(ours: Path) -> set[str]:
    """What this project's own config names, such as torch.optim.AdamW."""
    return {target for file in ours.rglob("*.yaml") for _, target in _targets(_read(file))}


def _find(name: str, folder: Path, where: str) -> Path:
    """The package of that name: beside the folder, or installed and named by FLOWSERL_TRUST."""
    for path in (folder.parent / name, folder.parent / f"{name}.py"):
        if path.exists():
            return path
    if name not in [word.strip().partition(".")[0] for word in os.environ.get(TRUST, "").split(",")]:
        raise ValueError(
            f"{where} is of no package that you named: expected {folder.parent / name} beside the folder, or "
            f"{TRUST}={name} for one that is installed"
        )
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ValueError(f"{where}: {name} is not installed: VIRTUAL_ENV=.venv .venv/bin/uv pip install <its folder>")
    place = spec.origin or next(iter(spec.submodule_search_locations or []), "")
    return Path(place).parent if Path(place).name == "__init__.py" else Path(place)


def _check_names(root: Path, packages: dict[str, Path]) -> None:
    """What lies beside the folder must hide no module of Python's or of the environment from our processes."""
    if not any(path.parent == root for path in packages.values()):
        return
    elsewhere = [place for place in sys.path if place and Path(place).resolve() != root]
    for path in sorted(root.iterdir()):
        name = path.stem
        if not (path.suffix == ".py" or (path / "__init__.py").is_file()) or not name.isidentifier():
            continue
        found = None if name in sys.stdlib_module_names else PathFinder.find_spec(name, elsewhere)
        if name in sys.stdlib_module_names or (
            found and found.origin and root not in Path(found.origin).resolve().parents
        ):
            other = "Python's own" if found is None else found.origin
            raise ValueError(
                f"{path} hides {other} module {name}: rename it, or give config/ and your package a folder of their own"
            )


def _identity(name: str, path: Path) -> dict[str, str | None]:
    """A package's version where it is installed, commit where it is in git, and digest of its Python files."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = None
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path.parent)}\n".encode() + file.read_bytes())
    return {"version": version, "commit": _commit(path), "digest": digest.hexdigest()[:16]}


def _commit(path: Path) -> str | None:
    """With `+changes` where what git knows of it was edited; None outside a repository."""
    folder = path if path.is_dir() else path.parent
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+changes", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _add_to(variable: str, words: Sequence[str], separator: str) -> None:
    present = [word for word in os.environ.get(variable, "").split(separator) if word]
    if missing := [word for word in words if word not in present]:
        os.environ[variable] = separator.join([*present, *missing])
