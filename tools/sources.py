"""What a tool is pointed at: a run's folder, something in one, or a checkpoint's folder. eval_open_loop and why ask.

runs/<name>, its params/, a file in there, or runs/<name>/checkpoints/step_000900 ─▶ the run's own config
a folder with config.json (LeRobot's or NVIDIA's layout, as export_checkpoint writes) ─▶ config/, policy.checkpoint
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from flowserl_cli.compose import load_config
from serl_launcher.policies.checkpoint import POLICIES, Checkpoint
from serl_launcher.policies.groot_n1_5.checkpoint import is_n1_5
from serl_launcher.run.foreign import foreign_config


def run_of(source: Path) -> Path | None:
    """The run's folder that `source` is or lies in; None where there is none."""
    here = source.absolute()
    return next((folder for folder in (here, *here.parents[:3]) if (folder / "config.yaml").is_file()), None)


def config_of(source: Path, words: list[str], *needed: str, builds: tuple[str, ...] = ()) -> DictConfig:
    """The config of what `source` names. words: overrides, for a checkpoint's folder alone.

    Raises ValueError or FileNotFoundError in the user's words.
    """
    if (source / "config.json").is_file():
        own = [
            "++policy.init=checkpoint",
            f"++policy.checkpoint={source.absolute()}",
            "++policy.action_horizon=null",
        ]
        chosen = [] if any(word.startswith("policy=") for word in words) else [f"policy={policy_of(source)}"]
        return load_config([*chosen, *own, *words])
    run = run_of(source)
    if run is None:
        raise FileNotFoundError(
            f"{source}: not a run folder (no config.yaml), nothing in one, and no checkpoint's folder (no config.json)"
        )
    if words:
        raise ValueError(f"{source} is of a run with its own config: {words[0]!r} goes with a checkpoint's folder")
    return foreign_config(run, *needed, builds=builds)


def policy_of(folder: Path) -> str:
    """The yaml of config/policy/ that fits a checkpoint's folder. Raises ValueError naming its type."""
    found = Checkpoint.find(str(folder))
    kind = found.config.get("type") or found.config.get("model_type")
    if kind not in POLICIES:
        raise ValueError(f"{folder}/config.json: expected a policy of type {', '.join(POLICIES)}, got {kind!r}")
    return "groot_n1_5" if kind == "groot" and is_n1_5(found) else POLICIES[kind]
