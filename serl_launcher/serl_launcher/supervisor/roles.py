"""Which roles a run needs and how each is started. Called by the learner's main; the supervisor runs what comes out.

gateway    always: sockets, journal, ring
openpi     serving.openpi_port is set: openpi clients get actions, too; derived
groot      serving.groot_port is set: GR00T's clients, the same
policy     someone asks for actions: an online or evaluation stage, or a schedule without stages (serving)
reward     a learned reward is asked for: answers actors' questions about observations; derived once it was up
exporter   always: journal to LeRobotDataset; derived
console    console.port is not null: the operator's web page; derived
trainer    a stage names steps, or there is nothing to serve yet and it must publish the first version
follower   on a machine beyond the first, which has this and its trainer alone: the journal over the wire, and a ring

A derived role never ends a run: what it makes can be made later from what the others keep.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace

from omegaconf import DictConfig, OmegaConf

from serl_launcher.run.paths import RunPaths
from serl_launcher.run.schedule import Stage
from serl_launcher.run.versions import newest_whole
from serl_launcher.supervisor.children import ChildSpec, EndsRun
from serl_launcher.supervisor.launch import is_follower, trainer_command

# Stop order of a run: whoever feeds another goes first; the exporter writes out what the gateway journalled last.
STOP_ORDER = ("openpi", "groot", "trainer", "follower", "policy", "gateway", "exporter")


def roles_for(cfg: DictConfig, paths: RunPaths, stages: Sequence[Stage]) -> list[ChildSpec]:
    """The roles of this run on this machine, in start order."""
    if is_follower(cfg):
        return [_role(paths, "follower", "serl_launcher.follower"), _trainer(cfg, paths)]
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
    role = _role(paths, "trainer", "serl_launcher.learner", grace_s=60.0)
    return replace(role, argv=trainer_command(cfg, *role.argv[2:]))
