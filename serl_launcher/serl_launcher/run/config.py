"""Read the resolved config.yaml of a run folder. Called by the learner, the exporter and every tool that takes a run.

The file may have been edited by hand or torn by a full disk: a ValueError then says in one line what is wrong with it.
It may come from a stranger (`run.foreign`) and is data: no interpolation, which could read this machine's environment,
no alias, which could make gigabytes of a line, no tag of Python's. A start writes it without any of these.
"""

import os
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from serl_transport.contract.bounds import printable, shown
from serl_transport.contract.specs import TaskSpec

MAX_BYTES = 4 << 20  # of a config.yaml; a start's has some ten thousand


def read_config(path: Path, *needed: str) -> DictConfig:
    """The config, with these dotted keys in it. ValueError names the file, and the line or key."""
    if not os.path.lexists(path):
        raise ValueError(f"{path} does not exist: expected a run's folder, for example runs/quickstart")
    try:
        _check_aliases(path)
        config = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {printable(' '.join(str(error).split()))}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(config, DictConfig) or not config:
        raise ValueError(f"{path} cannot be read: it is empty or no mapping of keys")
    _check_interpolations(OmegaConf.to_container(config), path)
    for key in needed:
        try:
            value = OmegaConf.select(config, key)
        except OmegaConfBaseException as error:
            raise ValueError(f"{path}: {key}: {' '.join(str(error).split())}") from None
        if value is None:
            raise ValueError(f"{path}: {key} is missing; is it the config of a run?")
    return config


def _check_aliases(path: Path) -> None:
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{path}: expected at most {MAX_BYTES} bytes, got {size}")
    with path.open("rb") as file:
        for event in yaml.parse(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            if isinstance(event, yaml.AliasEvent):
                line = event.start_mark.line + 1
                raise ValueError(f"{path} line {line}: an alias (*{shown(event.anchor)}); a run's config has none")


def _check_interpolations(node: Any, path: Path, key: str = "") -> None:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, child in items:
        where = f"{key}.{name}" if key else str(name)
        if (isinstance(child, str) and "${" in child) or (isinstance(name, str) and "${" in name):
            raise ValueError(f"{path}: {where}: expected a plain value, got the interpolation {shown(child)}")
        _check_interpolations(child, path, where)


def plain(config: DictConfig, key: str, default: Any = None) -> Any:
    """The value of a dotted key, a section as plain containers; `default` when absent."""
    value = OmegaConf.select(config, key, default=default)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def task_spec(config: DictConfig) -> TaskSpec:
    """`task.spec` of a config. ValueError names what is wrong with it."""
    return TaskSpec.from_dict(plain(config, "task.spec"))


def dotted(node: Any, prefix: str = "") -> dict[str, Any]:
    """Every value of nested sections and lists by its dotted key; an empty section is a value."""
    if not isinstance(node, dict | list) or not node:
        return {prefix.rstrip("."): node}
    items = node.items() if isinstance(node, dict) else enumerate(node)
    return {key: value for name, child in items for key, value in dotted(child, f"{prefix}{name}.").items()}
