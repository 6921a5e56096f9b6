"""Which roles a run needs and how each is started. Called by the learner's main; the supervisor runs what comes out.

gateway    always: sockets, journal, ring
openpi     serving.openpi_port is set: openpi clients get actions, too; derived
groot      serving.groot_port is set: GR00T's clients, the same
policy     someone asks for actions: an online or evaluation stage, or a schedule without stages (serving)
reward     a learned reward is asked for: answers actors' questions about observations; derived once it was up
exporter   always: journal to LeRobotDataset; derived
console    console.port is not null: the operator's web page; derived
trainer    a stage names steps, or there is nothing to serve yet and it must publish the first version

A derived role never ends a run: what it makes can be made later from what the others keep.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from serl_launcher.run.paths import RunPaths
from serl_launcher.run.schedule import Stage
from serl_launcher.run.versions import newest_whole
from serl_launcher.supervisor.children import ChildSpec, EndsRun
from serl_launcher.supervisor.lifeline import EXIT_FILE

# Stop order of a run: whoever feeds another goes first; the exporter writes out what the gateway journalled last.
STOP_ORDER = ("openpi", "groot", "trainer", "policy", "gateway", "exporter")


def roles_for(cfg: DictConfig, paths: RunPaths, stages: Sequence[Stage]) -> list[ChildSpec]:
    """The roles of this run in start order."""
    serves = not stages or any(stage.mode in ("eval", "online") for stage in stages)
    trains = any(stage.steps for stage in stages) or (serves and newest_whole(paths.params) is None)
    roles = [_role(paths, "gateway", "serl_launcher.gateway", grace_s=20.0)]
    if serves:
        roles.append(_role(paths, "policy", "serl_launcher.serving"))
        for name in ("openpi", "groot"):
            if OmegaConf.select(cfg, f"serving.{name}_port") is not None:
                roles.append(_role(paths, name, f"serl_launcher.serving.{name}_server", ends_run="never"))
    if OmegaConf.select(cfg, "reward.model"):
        roles.append(_role(paths, "reward", "serl_launcher.rewards", ends_run="until ready"))
    roles.append(_role(paths, "exporter", "serl_launcher.exporter", grace_s=120.0, ends_run="never"))
    if OmegaConf.select(cfg, "console.port") is not None:
        roles.append(_role(paths, "console", "serl_launcher.console", grace_s=5.0, ends_run="never"))
    if trains:
        roles.append(_trainer(cfg, paths))
    return roles


def _role(paths: RunPaths, name: str, module: str, grace_s: float = 10.0, ends_run: EndsRun = "always") -> ChildSpec:
    argv = (sys.executable, "-m", module, str(paths.root))
    return ChildSpec(
        name,
        argv,
        log=paths.log(name),
        env={"PYTHONUNBUFFERED": "1"},
        grace_s=grace_s,
        starting_file=paths.starting(name),
        beats=True,
        ends_run=ends_run,
    )


def _trainer(cfg: DictConfig, paths: RunPaths) -> ChildSpec:
    exit_file = paths.logs / "trainer.exit"
    role = _role(paths, "trainer", "serl_launcher.learner", grace_s=60.0)
    argv = (*accelerate_command(cfg), "-m", "serl_launcher.supervisor.lifeline", *role.argv[2:])
    return replace(role, argv=argv, env={**role.env, EXIT_FILE: str(exit_file)}, exit_file=exit_file)


def accelerate_command(cfg: DictConfig) -> tuple[str, ...]:
    """`accelerate launch` with every default named that it would warn about; launch.* of the config passes on."""
    options = {
        "num_processes": 1,
        "num_machines": 1,
        "mixed_precision": "no",
        "dynamo_backend": "no",
        "num_cpu_threads_per_process": OmegaConf.select(cfg, "trainer.threads", default=1),
        **(OmegaConf.to_container(cfg.launch) if cfg.get("launch") else {}),
    }
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    if cfg.trainer.device == "cpu" or not has_gpu():
        command.append("--cpu")
    for key, value in options.items():
        command += [f"--{key}"] if value is True else [] if value in (False, None) else [f"--{key}", str(value)]
    return tuple(command)


def has_gpu() -> bool:
    """Is a CUDA device present? Asks the driver's files: this process must not import torch."""
    return Path("/proc/driver/nvidia/gpus").is_dir() or Path("/dev/nvidia0").exists()
