"""A folder that somebody else may have made is data: what of its config may be built, and where its links may lead.

Called by every tool that takes a run's folder and builds something from it or writes into it, and by `run.origin` for
`checkpoint_path`. A start's own words are not asked: config/ and the command line are the user's.

Built is what this project's config/ names, to the letter, and what stands in a package that the user trusts:
FLOWSERL_TRUST=my_lab,other.robots in the environment. An absolute path in it is a folder that links may lead to.
"""

import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from serl_launcher.run.config import read_config
from serl_transport.contract.bounds import shown

TRUST = "FLOWSERL_TRUST"
WHOLE_PATH = 4096  # a path that a person must find is shown whole
CONFIG_DIR = Path(__file__).resolve().parents[3] / "config"
DOCUMENTED = frozenset({"serl_launcher.replay.threshold.QuantileThreshold"})  # no yaml of ours names it
_TARGET = re.compile(r"_target_:\s*([\w.]+)")


def foreign_config(run: Path, *needed: str, builds: tuple[str, ...] = ()) -> DictConfig:
    """config.yaml of a run's folder; `builds`: its sections that the caller will build.

    ValueError in one line: what cannot be read, a link that leads out, a target that is not trusted.
    """
    path = run / "config.yaml"
    config = read_config(path, *needed)
    check_links(run)
    for section in builds:
        _check_targets(config.get(section), section, path)
    return config


def check_links(folder: Path) -> None:
    """Raise ValueError naming the first link in `folder` that leads out of it: reading it would copy, and writing it
    would overwrite, a file of somebody else's choice."""
    home = folder.resolve()
    allowed = [home, *(Path(word).resolve() for word in _trusted() if word.startswith("/"))]
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root, name)
            if not path.is_symlink():
                continue
            target = Path(os.path.realpath(path))  # of a link that leads to itself, the link
            if not any(target.is_relative_to(place) for place in allowed):
                place = shown(str(target if target.is_dir() else target.parent), WHOLE_PATH)
                raise ValueError(
                    f"{path} is a link to {shown(str(target), WHOLE_PATH)}, out of the folder: put the file itself "
                    f"there; if you made the link, set {TRUST}={place}"
                )


def _check_targets(node: Any, key: str, path: Path) -> None:
    for where, target in _targets(OmegaConf.to_container(node) if OmegaConf.is_config(node) else node, key):
        if not isinstance(target, str) or (target not in _named_by_config() and not _is_trusted(target)):
            package = target.partition(".")[0] if isinstance(target, str) else ""
            package = package if package.isidentifier() else "…"
            raise ValueError(
                f"{path}: {where}._target_: {shown(target)} is nothing that this project's config/ names, so a folder "
                f"may not call it; if it is of a package of yours, set {TRUST}={package}"
            )


def _targets(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, `_target_`) of a node and everything in it."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield key, node["_target_"]
        for name, child in node.items():
            yield from _targets(child, f"{key}.{name}")
    elif isinstance(node, list):
        for place, child in enumerate(node):
            yield from _targets(child, f"{key}.{place}")


@lru_cache(1)
def _named_by_config() -> frozenset[str]:
    return DOCUMENTED.union(*(_TARGET.findall(file.read_text("utf-8")) for file in CONFIG_DIR.rglob("*.yaml")))


def _is_trusted(target: str) -> bool:
    """Is it defined in a trusted package? Not merely reached through one, as my_lab.os.system would be."""
    for package in _trusted():
        if target.startswith(f"{package}."):
            found = get_object(target)
            home = getattr(found, "__module__", None) or ""
            return home == package or home.startswith(f"{package}.")
    return False


def _trusted() -> list[str]:
    return [word.strip() for word in os.environ.get(TRUST, "").split(",") if word.strip()]
