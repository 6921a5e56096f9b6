"""The policy settings of the run that `checkpoint_path` names: its parameters fit only the policy that it had.

flowserl_cli.compose calls `settle_policy`, torch-free, before either side starts.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, open_dict

from serl_launcher.run.config import plain
from serl_launcher.run.foreign import foreign_config

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
    """Where `checkpoint_path` lies in a run: take its `policy` and `algo` if this process only evaluates, and refuse
    settings that its parameters cannot fit.

    chosen: the keys that the user typed; a section with one of them stays as it is. Raises ValueError that names the
    key and both values.
    """
    theirs = config_of_run(config.checkpoint_path) if config.checkpoint_path else None
    if theirs is None:
        return
    if evaluates(config):
        for section in ("policy", "algo"):
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
