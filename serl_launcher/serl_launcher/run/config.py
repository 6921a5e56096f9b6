"""Read the resolved config.yaml of a run folder. Called by the learner, the exporter and every tool that takes a run.

The file may have been edited by hand or torn by a full disk: a ValueError then says in one line what is wrong with it.
"""

import os
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from serl_transport.contract.specs import TaskSpec


def read_config(path: Path, *needed: str) -> DictConfig:
    """The config, with these dotted keys in it. ValueError names the file, and the line or key."""
    if not os.path.lexists(path):
        raise ValueError(f"{path} does not exist: expected a run's folder, for example runs/quickstart")
    try:
        config = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(config, DictConfig) or not config:
        raise ValueError(f"{path} cannot be read: it is empty or no mapping of keys")
    for key in needed:
        try:
            value = OmegaConf.select(config, key)
        except OmegaConfBaseException as error:
            raise ValueError(f"{path}: {key}: {' '.join(str(error).split())}") from None
        if value is None:
            raise ValueError(f"{path}: {key} is missing; is it the config of a run?")
    return config


def plain(config: DictConfig, key: str, default: Any = None) -> Any:
    """The value of a dotted key, a section as plain containers; `default` when absent."""
    value = OmegaConf.select(config, key, default=default)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def task_spec(config: DictConfig) -> TaskSpec:
    """`task.spec` of a config. ValueError names what is wrong with it."""
    return TaskSpec.from_dict(plain(config, "task.spec"))
