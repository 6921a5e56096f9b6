"""The averaged parameters as numbered policy versions in runs/<name>/params/. Called by the trainer.

The policy server and actors with a local policy load them by name, on top of the same frozen rest (`base`).
"""

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from serl_launcher.learner.copies import Copies
from serl_launcher.learner.learner import Learner
from serl_launcher.policies.base import FlowPolicy
from serl_launcher.run.alive import busy
from serl_launcher.run.files import DamagedFileError
from serl_launcher.run.parameters import base_sha256, publish, tensor_names
from serl_launcher.run.versions import ever_told, highest_number, newest_whole

log = logging.getLogger("trainer")


class Publisher:
    """folder: params/ of the run; name: of the policy, for the file; keep: versions that stay on disk."""

    def __init__(self, folder: Path, learner: Learner, policy: FlowPolicy, *, name: str, keep: int) -> None:
        self._folder, self._learner, self._policy, self._name, self._keep = folder, learner, policy, name, keep
        self._copies = Copies()
        learner.copies.append(self._copies)
        self.base = base_sha256(policy)  # of what is frozen, and of the units
        self.obeyed = 0  # number of the last act for which a version was published
        self.version = 0  # the newest one; the first one published is 1
        self.begun = 0  # the newest one that has a number: beyond `version` while it is being written

    def copy(self) -> Callable[[], None]:
        """The next version as the parameters are now; the result writes it, in any thread, as `publish` does."""
        averaged, step = self._copies.of(dict(self._learner.averaged)), self._learner.step_count
        self.begun += 1
        version = self.begun

        def write() -> None:
            self._copies.wait()
            self._write(self._folder, averaged, version, step, self._keep)
            self.version = version

        return write

    @busy(600.0, "publishing a version")
    def publish(self) -> None:
        """The next version, whole or not at all; on disk when this returns. OSError when the disk refuses.

        Nothing that was begun may still be unwritten.
        """
        self.publish_into(self._folder, self.version + 1, self._keep)
        self.version = self.begun = self.version + 1

    def publish_into(self, folder: Path, version: int, keep: int) -> None:
        """The parameters of now as a version in another folder, beside the newest ones there. OSError as `publish`."""
        self._write(folder, self._learner.averaged, version, self._learner.step_count, keep)

    def _write(self, folder: Path, averaged: Mapping[str, Tensor], version: int, step: int, keep: int) -> None:
        publish(
            folder,
            averaged,
            version=version,
            step=step,
            base=self.base,
            policy=self._name,
            now=time.time(),
            keep=keep,
        )

    def publish_on_request(self, status: Mapping[str, Any], finish: Callable[[], None]) -> None:
        """An operator may ask for a version out of turn. The gateway keeps asking until it hears that it was obeyed.

        finish: waits until what was begun is written.
        """
        wanted = (status.get("operator") or {}).get("publish_wanted", 0)
        if wanted > self.obeyed:
            finish()
            log.info("publishing on an operator's request (act %d)", wanted)
            self.publish()
            self.obeyed = wanted

    def continue_after(self, version: int) -> None:
        """Number on from this version (a checkpoint's), or from the highest on disk: actors have used that one."""
        self.version = self.begun = max(version, highest_number(self._folder))

    def refuse_to_replace_damaged(self) -> None:
        """DamagedFileError where versions were published and none is whole: the next would be of untrained weights."""
        if ever_told(self._folder) and newest_whole(self._folder) is None:
            raise DamagedFileError(
                f"no version in {self._folder} is whole, and there is no checkpoint to go on from. Restore one, or "
                "move the folder aside to start anew"
            )

    @busy(600.0, "looking at the newest version")
    def newest_can_be_served(self) -> bool:
        """Is the newest version whole, with the parts that this algorithm's policy server expects?"""
        newest = newest_whole(self._folder)
        if newest is None or newest.version < self.version:
            return False
        return tensor_names(self._folder / newest.file) == self._learner.names

    def check_frozen(self) -> None:
        """RuntimeError when training moved what is not published: the versions do not fit their base then."""
        if base_sha256(self._policy) != self.base:
            raise RuntimeError("frozen parameters changed while training: published versions do not fit their base")
