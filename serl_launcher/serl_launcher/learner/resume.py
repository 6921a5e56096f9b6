"""The trainer's state across starts: what a checkpoint holds of it, and what a start finds in a run folder.

    save ─▶ checkpoints/step_…/ ─▶ resume: own checkpoint? all of it
                                           another algorithm's? its policy, the counters and the stages' progress
                                   none: checkpoint_path? its parameters; else from scratch
                                   none of them whole: refused

A damaged checkpoint is named, and the one before it is used.

learner.checkpoint knows the files; the trainer calls `save`, learner.faults `go_back_to`, learner.wiring `resume`.
"""

import copy
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from serl_launcher.learner import checkpoint
from serl_launcher.learner.copies import Copies
from serl_launcher.learner.learner import Learner
from serl_launcher.learner.publisher import Publisher
from serl_launcher.learner.stage import StageProgress
from serl_launcher.run import checkpoints
from serl_launcher.run.alive import busy
from serl_launcher.run.files import DamagedFileError
from serl_launcher.run.parameters import StoredTensors, check_base, find_parameters, read_tensors
from serl_launcher.run.paths import RunPaths
from serl_launcher.run.record import origin_of

log = logging.getLogger("trainer")


class TrainerCheckpoints:
    """folder: checkpoints/ of the run; rng: draws the batches; keep: checkpoints that stay on disk."""

    def __init__(
        self,
        folder: Path,
        learner: Learner,
        stages: StageProgress,
        publisher: Publisher,
        rng: np.random.Generator,
        keep: int,
    ) -> None:
        self._folder, self._learner, self._stages = folder, learner, stages
        self._publisher, self._rng, self._keep = publisher, rng, keep
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
        checkpoint.save(self._folder, step, tensors, optimizer, state, self._keep, origin)

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
        }

    def resume(self, checkpoint_path: str | None) -> str | None:
        """From the newest whole checkpoint of this run, whose name it returns; else from checkpoint_path; else from
        scratch.

        DamagedFileError where that would throw training away: there are checkpoints, or published versions, and none
        is whole.
        """
        checkpoint.finish(self._folder)
        newest = next(checkpoints.whole(self._folder), None)
        version = 0
        if newest is not None:
            version = self._continue_from(newest)
            if checkpoint_path:
                log.warning("checkpoint_path is for a new run: this one goes on from %s", newest.name)
        elif checkpoints.folders(self._folder):
            raise DamagedFileError(self._nothing_whole())
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
        log.info(
            "resumed from %s at step %d, policy version %d", folder.name, state["counters"]["step"], state["version"]
        )
        return state["version"]
