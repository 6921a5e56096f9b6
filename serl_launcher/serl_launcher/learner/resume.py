"""The trainer's state across starts: what a checkpoint holds of it, and what a start finds in a run folder.

    save ─▶ checkpoints/step_…/ ─▶ resume: own checkpoint? all of it
                                           another algorithm's? its policy, the counters and the stages' progress
                                   none: another run's, that `resume` names? all of it
                                         checkpoint_path? its parameters; else from scratch
                                   none of them whole: refused

A damaged checkpoint is named, and the one before it is used.

learner.checkpoint knows the files; the trainer calls `save`, learner.faults `go_back_to`, learner.wiring `resume`.
"""

import copy
import logging
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from serl_launcher.learner import checkpoint
from serl_launcher.learner.copies import Copies
from serl_launcher.learner.learner import Learner
from serl_launcher.learner.publisher import Publisher
from serl_launcher.learner.stage import StageProgress
from serl_launcher.run import checkpoints
from serl_launcher.run.alive import busy
from serl_launcher.run.files import DamagedFileError, read_sealed
from serl_launcher.run.parameters import BEST, StoredTensors, check_base, find_parameters, read_tensors
from serl_launcher.run.paths import RunPaths
from serl_launcher.run.record import origin_of
from serl_launcher.run.versions import KEPT, versions_told

log = logging.getLogger("trainer")
GB = 1e9


class TrainerCheckpoints:
    """folder: checkpoints/ of the run; rng: draws the batches. Which stay on disk: run.checkpoints.superfluous.

    samples: of a step, over all ranks; noted in each checkpoint beside the number of ranks, and said where it differs.
    """

    def __init__(
        self,
        folder: Path,
        learner: Learner,
        stages: StageProgress,
        publisher: Publisher,
        rng: np.random.Generator,
        keep: int,
        every: int | None = None,
        samples: int | None = None,
    ) -> None:
        self._folder, self._learner, self._stages = folder, learner, stages
        self._publisher, self._rng, self._keep, self._every = publisher, rng, keep, every
        self._how = {"samples of a step": samples, "ranks": dist.get_world_size() if dist.is_initialized() else 1}
        self._told = False  # what they take of the disk
        self._copies = Copies()
        learner.copies.append(self._copies)

    @busy(1800.0, "writing a checkpoint")
    def save(self) -> None:
        """A checkpoint of everything that `resume` reads. On disk when this returns; OSError when the disk refuses."""
        self._write(self._learner.tensors(), self._learner.optimizer_state(), self._state(), time.time())

    def copy(self) -> Callable[[], None]:
        """All of it as it is now; the result writes it, in any thread, once the version that it names is written."""
        tree = {"tensors": self._learner.tensors(), "optimizer": self._learner.optimizer_state()}
        tree, state, made = self._copies.of(tree), copy.deepcopy(self._state()), time.time()

        def write() -> None:
            self._copies.wait()
            self._write(tree["tensors"], tree["optimizer"], state, made)

        return write

    def _write(
        self, tensors: Mapping[str, Tensor], optimizer: dict[str, Any], state: dict[str, Any], made: float
    ) -> None:
        step = state["counters"]["step"]
        origin = origin_of(RunPaths(self._folder.parent), step, state["version"], made)
        folder = checkpoint.save(self._folder, step, tensors, optimizer, state, origin=origin, **self._keeping())
        if not self._told:
            self._told = True
            self._tell_size(folder)

    def _state(self) -> dict[str, Any]:
        learner = self._learner
        return {
            "counters": learner.counters(),
            **self._stages.counts(),
            "version": self._publisher.begun,
            "rng": self._rng.bit_generator.state,
            "torch_rng": torch.get_rng_state().tolist(),
            "device_rng": torch.cuda.get_rng_state(learner.device).tolist() if learner.on_card else None,
            "agent": self._agent,
            "base": self._publisher.base,
            "how": self._how,
        }

    def _keeping(self) -> dict[str, int | None]:
        """Which stay; all of them while it is not known which version is the best."""
        try:
            return {"keep": self._keep, "every": self._every, "best": best_step(self._folder.parent)}
        except DamagedFileError as damage:
            log.warning("%s: no checkpoint is deleted until it is known again which version is the best", damage)
            return {"keep": sys.maxsize}

    def _tell_size(self, folder: Path) -> None:
        """What a checkpoint takes on disk, how many stay, and what is free."""
        size = sum(path.stat().st_size for path in folder.iterdir())
        free = shutil.disk_usage(folder).free
        more = f", one for each {self._every} steps" if self._every else ""
        log.log(
            logging.INFO if free > 2 * size else logging.WARNING,
            "a checkpoint takes %.3g GB; the newest %d stay, that of the best version%s; %.3g GB are free",
            size / GB, self._keep, more, free / GB,
        )  # fmt: skip

    def resume(self, checkpoint_path: str | None, other: Path | None = None) -> str | None:
        """From the newest whole checkpoint of this run, whose name it returns; else from `other`, the folder of another
        run's, with all that it holds; else from the parameters of checkpoint_path; else from scratch.

        DamagedFileError where that would throw training away: there are checkpoints, or published versions, and none
        is whole. ValueError where `other` is none to go on from.
        """
        checkpoint.finish(self._folder)
        newest = next(checkpoints.whole(self._folder), None)
        version = 0
        if newest is not None:
            version = self._continue_from(newest)
            if checkpoint_path:
                log.warning("checkpoint_path is for a new run: this one goes on from %s", newest.name)
            if other and other.resolve() != newest.resolve():
                log.warning("resume=%s is for a new run: this one goes on from its own %s", other, newest.name)
        elif checkpoints.folders(self._folder):
            raise DamagedFileError(self._nothing_whole())
        elif other:
            self._check_other(other)
            version = self._continue_from(other)
        elif checkpoint_path:
            path = find_parameters(checkpoint_path)
            tensors, metadata = read_tensors(path)
            self._learner.start_from(tensors)
            check_base(path, metadata, self._publisher.base)
            log.info("starting from %s", path)
        else:
            self._publisher.refuse_to_replace_damaged()
        self._publisher.continue_after(version)
        return None if newest is None else newest.name

    def _check_other(self, folder: Path) -> None:
        if found := checkpoints.problem(folder):
            raise DamagedFileError(f"resume={folder}: expected the folder of a whole checkpoint; {found}")
        state = checkpoint.read_state(folder)
        if not self._is_own(folder):
            raise ValueError(f"resume={folder}: expected a checkpoint of {self._agent}, it is of {state['agent']}")
        if (base := state.get("base")) and base != self._publisher.base:
            raise ValueError(f"resume={folder}: it was trained on another frozen base or in other units")

    def _nothing_whole(self) -> str:
        problems = [checkpoints.problem(folder) for folder in checkpoints.folders(self._folder)]
        return (
            f"no checkpoint in {self._folder} is whole: {'; '.join(map(str, problems))}. Restore one, or move the "
            "folder aside: training then starts anew, from checkpoint_path=<a file of params/> where that is given"
        )

    @busy(1800.0, "looking for a whole checkpoint")
    def last_own(self) -> Path | None:
        """The newest whole checkpoint of the agent that trains now."""
        return next((folder for folder in checkpoints.whole(self._folder) if self._is_own(folder)), None)

    @busy(1800.0, "going back to a checkpoint")
    def go_back_to(self, folder: Path) -> None:
        """Parameters and optimizers of an own checkpoint; steps, and so metrics and versions, count on."""
        steps = self._learner.step_count
        self._restore(folder)
        self._learner.step_count = steps

    @property
    def _agent(self) -> str:
        return type(self._learner.agent).__name__

    def _is_own(self, folder: Path) -> bool:
        return checkpoint.read_state(folder).get("agent", self._agent) == self._agent

    def _restore(self, folder: Path) -> None:
        with checkpoints.reading(folder):
            tensors, optimizer, state = checkpoint.load(folder, self._learner.on_card)
            self._learner.load_tensors(tensors)
            self._learner.load_optimizer_state(optimizer)
        self._learner.load_counters(state["counters"])

    def _continue_from(self, folder: Path) -> int:
        """Take a checkpoint over, of another algorithm what both have; returns its policy version."""
        state = checkpoint.read_state(folder)
        if self._is_own(folder):
            self._restore(folder)
            self._rng.bit_generator.state = state["rng"]
            torch.set_rng_state(torch.tensor(state["torch_rng"], dtype=torch.uint8))
            if self._learner.on_card and state.get("device_rng"):  # older checkpoints have none
                torch.cuda.set_rng_state(torch.tensor(state["device_rng"], dtype=torch.uint8), self._learner.device)
        else:
            self._learner.continue_from(StoredTensors(folder / checkpoints.TENSORS))
            self._learner.step_count = state["counters"]["step"]
            log.warning(
                "%s was trained by %s: %s goes on from its policy and the run's data, values and optimizers start anew",
                folder.name, state["agent"], self._agent,
            )  # fmt: skip
        self._stages.load(state)
        for what, number in state.get("how", {}).items():  # a checkpoint of an older release does not say
            if number != self._how[what]:
                log.warning("%s: %s were %s then, are %s now", folder.name, what, number, self._how[what])
        log.info(
            "resumed from %s at step %d, policy version %d", folder.name, state["counters"]["step"], state["version"]
        )
        return state["version"]


def best_step(run: Path) -> int | None:
    """Trainer step of the best version: by the evaluations, or by fine-tuning's held-out loss; None: there is none.

    DamagedFileError where the file that says it is damaged.
    """
    if kept := read_sealed(run / "params" / KEPT, needed=("version",)):
        version = versions_told(run / "params").get(kept["version"])
        return version.step if version else None
    best = read_sealed(run / BEST / "best.json", needed=("step",))
    return best["step"] if best else None
