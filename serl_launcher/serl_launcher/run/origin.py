"""What `checkpoint_path` says of the policy: its parameters fit only the policy, the units and the cameras that it had.

    a run, its params/ or a checkpoint ─▶ its policy section, and `policy.trained_on` where its task had other ranges
    a folder that export_checkpoint wrote ─▶ policy.checkpoint

flowserl_cli.compose calls `settle_policy`, torch-free, before either side starts; every role builds what it wrote.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, open_dict

from serl_launcher.run.config import plain, task_spec
from serl_launcher.run.files import read_json
from serl_launcher.run.foreign import foreign_config
from serl_transport.contract.specs import TaskSpec

log = logging.getLogger("config")
RANGES = ("state_low", "state_high", "action_low", "action_high")

# What decides which of a policy's tensors are published, and what a yaml without the key means.
WHAT_TRAINS = {"policy.train": "full", "policy.lora_rank": None, "policy.tune": None}


def config_of_run(path: str | Path) -> DictConfig | None:
    """config.yaml of the run that a parameters file, a checkpoint or a run folder lies in; None where there is none.

    Raises ValueError in the user's words when it cannot be read, or names what a folder may not call.
    """
    path = Path(path).absolute()
    for folder in (path, *path.parents[:3]):  # runs/<name>/checkpoints/step_000900/tensors.safetensors
        if (folder / "config.yaml").is_file():
            return foreign_config(folder, "policy", builds=("policy", "algo"))
    return None


def settle_policy(config: DictConfig, chosen: Sequence[str]) -> None:
    """Make the config's policy the one that `checkpoint_path` was trained as, or refuse.

    Of a run: its `policy`, where the user chose none, its `algo` if this process only evaluates, and the ranges and
    cameras that its weights know. Settings that its parameters cannot fit are refused. chosen: the keys that the user
    typed; a section with one of them stays as it is. Raises ValueError that names the key and both values.
    """
    if not config.checkpoint_path:
        return
    if is_exported(Path(config.checkpoint_path)):
        _start_from_export(config)
        return
    theirs = config_of_run(config.checkpoint_path)
    if theirs is None:
        return
    for section in ("policy", "algo") if evaluates(config) else ("policy",):
        if section in theirs and not any(key.split(".")[0] == section for key in chosen):
            with open_dict(config):
                config[section] = theirs[section]
    for key, unsaid in WHAT_TRAINS.items():
        ours, of_the_run = (plain(cfg, key, unsaid) for cfg in (config, theirs))
        if None not in (ours, of_the_run) and ours != of_the_run:
            raise ValueError(
                f"{key} is {ours}, but the run of checkpoint_path={config.checkpoint_path} had {of_the_run}: its "
                f"parameters fit only that; set {key}={_typed(of_the_run)}"
            )
    if plain(config, "policy.init") == plain(theirs, "policy.init") == "random" and plain(theirs, "task.spec"):
        _carry_units(config, theirs)


def is_exported(path: Path) -> bool:
    """Did tools/export_checkpoint.py, or LeRobot, write this folder?"""
    body = read_json(path / "config.json") if path.is_dir() else None
    return body is not None and bool(body.get("type") or body.get("model_type"))


def _start_from_export(config: DictConfig) -> None:
    theirs = plain(config, "policy.checkpoint")
    if theirs not in (None, config.checkpoint_path):
        raise ValueError(f"checkpoint_path={config.checkpoint_path} and policy.checkpoint={theirs}: which one?")
    if not config.learner and config.ip is None:
        raise ValueError(
            f"checkpoint_path={config.checkpoint_path}: a learner serves an exported folder (schedule=eval); "
            "rollout.policy=local takes a run's parameters"
        )
    with open_dict(config):
        config.policy.init, config.policy.checkpoint = "checkpoint", config.checkpoint_path
        config.checkpoint_path = None


def _carry_units(config: DictConfig, theirs: DictConfig) -> None:
    """`policy.trained_on`, where the weights know other ranges or another order of cameras than the task says."""
    spec, other = task_spec(config), task_spec(theirs)
    of = f"the run of checkpoint_path={config.checkpoint_path}"
    _check_dims(of, spec, other)
    known = plain(theirs, "policy.trained_on") or {key: list(getattr(other, key)) for key in RANGES}
    order = list(known.get("cameras") or other.cameras)
    mapping = plain(config, "policy.cameras") or {}
    ours = {mapping.get(camera, camera): camera for camera in spec.cameras}
    if set(ours) != set(order):
        raise ValueError(
            f"cameras: the task has {list(spec.cameras)}, {of} had {order}: map the task's on them with "
            "+policy.cameras={<the task's>:<the run's>}"
        )
    known = {"cameras": [ours[camera] for camera in order], **{key: list(known[key]) for key in RANGES}}
    with open_dict(config):
        if known == {"cameras": list(spec.cameras), **{key: list(getattr(spec, key)) for key in RANGES}}:
            config.policy.pop("trained_on", None)
        else:
            config.policy.trained_on = known


def _check_dims(of: str, spec: TaskSpec, other: TaskSpec) -> None:
    for what in ("state", "action"):
        mine, theirs = (list(getattr(s, f"{what}_names")) for s in (spec, other))
        if len(mine) != len(theirs) or (mine != theirs and set(mine) == set(theirs)):
            raise ValueError(f"{what}: the task's dims are {mine}, {of} had {theirs}: its parameters fit only that")
        if mine != theirs:
            log.warning("%s: the task calls its dims %s, %s called them %s: taken in order", what, mine, of, theirs)


def evaluates(config: DictConfig) -> bool:
    """Does this process act with given parameters and train nothing? A learner without a stage that trains, an actor
    with a local policy."""
    if config.learner:
        return not any(stage.get("steps") for stage in config.schedule.stages)
    return bool(config.actor) and config.rollout.policy == "local"


def _typed(value: Any) -> str:
    """As the command line takes it: {llm:true,visual:false}."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{str(v).lower()}" for name, v in value.items()) + "}"
    return str(value)
