"""What all ranks of the trainer do at the same place, by rank 0's word. Made by learner.wiring.

    rank 0: the trainer's loop ── a method here ─▶ Ranks.agree ─▶ each rank does it, rank 0 as well
    others: `follow`           ◀── the word ──────────┘

One word is one act: a step with its size and learning rate, how far the views reach, another rule, a rollback. So no
rank decides for itself, and none is a step ahead. With one rank the method does the act and nothing else.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from serl_launcher.learner.data import Heard, TrainingData
from serl_launcher.learner.learner import Learner
from serl_launcher.learner.profile import Profile, timed
from serl_launcher.learner.ranks import SILENCE_S, Ranks
from serl_launcher.learner.resume import TrainerCheckpoints
from serl_launcher.replay.ring import episode_key
from serl_launcher.replay.verdicts import VerdictLedger
from serl_launcher.replay.views import View
from serl_launcher.run.alive import busy
from serl_launcher.run.first_host import FirstHost
from serl_launcher.run.in_force import Word
from serl_launcher.run.parameters import Renamed, read_tensors
from serl_launcher.run.ready import say_ready

log = logging.getLogger("trainer")


class Words:
    """What people said of episodes, as rank 0 told it."""

    def __init__(self, words: Mapping[str, Mapping[str, Any]]) -> None:
        self.take(words)

    def take(self, words: Mapping[str, Mapping[str, Any]]) -> None:
        """By episode id, the fields of a Word."""
        self._by_key = {episode_key(episode_id): Word(**word) for episode_id, word in words.items()}

    def word_of(self, key: int) -> Word | None:
        """As of replay.relabelled."""
        return self._by_key.get(key)


def told(words: Mapping[str, Word]) -> dict[str, dict[str, Any]]:
    """Words as JSON."""
    return {episode_id: asdict(word) for episode_id, word in words.items()}


class Together:
    """The acts. build_view: a view by a config, and its ledger; of another rank than 0, `words` is what it reads."""

    def __init__(
        self,
        ranks: Ranks,
        learner: Learner,
        data: TrainingData,
        checkpoints: TrainerCheckpoints,
        build_view: Callable[[DictConfig], tuple[View, VerdictLedger | Heard]],
        words: Words | None = None,
        first_host: FirstHost | None = None,
        profile: Profile | None = None,
    ) -> None:
        self.ranks, self.learner, self.data = ranks, learner, data
        self._checkpoints, self._build_view, self._words = checkpoints, build_view, words
        self._profile = profile or Profile(Path(), after=0, steps=0)
        self._reached: tuple[str | None, int] = (None, -1)  # what the others were told
        self._first_host = first_host
        self._over = False
        if ranks.first and learner.in_parts:
            learner.call_the_others = lambda what: ranks.agree(["gather", {"what": what}])

    def _do(self, act: str, **of: Any) -> Any:
        """Rank 0 says what is done, and does it with the others."""
        if self.ranks.world > 1:
            self.ranks.agree([act, of])
        return getattr(self, f"_{act}")(**of)

    def follow(self) -> None:
        """Of another rank than 0: do what it says until the end. RuntimeError when it, or another rank, is gone."""
        while not self._over:
            with busy(SILENCE_S, "waiting for rank 0"):
                act, of = self.ranks.agree()
            with busy(SILENCE_S, act):  # rank 0 waits as well, and is watched by its own pace
                getattr(self, f"_{act}")(**of)
            say_ready()

    # Rank 0's words.

    def step(self, size: int, lr_scale: float) -> tuple[int, dict[str, Any]]:
        """Sample a batch of `size` over all ranks and take a step on it; the batch's size and the metrics."""
        return self._do("step", size=size, lr_scale=lr_scale)

    def begin_stage(self, mode: str) -> None:
        """A stage of this mode begins, or is resumed."""
        self._do("begin_stage", mode=mode)

    def refresh(self, ring: str | None) -> bool:
        """Take in what came to the ring; False while there is none. OSError when verdicts cannot be written."""
        came = self.data.refresh(ring)
        if came and self.ranks.world > 1 and self.data.reach != self._reached:
            path, rows = self._reached = self.data.reach
            came = self._do("reach", ring=path, rows=rows, returns=self.data.judged())
        if came:
            self.data.write_verdicts()
        return came

    def start_over(self, words: Mapping[str, Word]) -> None:
        """People said something of episodes: views are built anew by it, and what was kept of batches is dropped."""
        self._reached = (None, -1)
        self._do("start_over", words=told(words) if self.ranks.world > 1 else {})

    def take_view(self, config: DictConfig) -> None:
        """Views by the rule of this config from now on."""
        self._reached = (None, -1)
        self._do("take_view", config=OmegaConf.to_container(config, resolve=True) if self.ranks.world > 1 else config)

    def go_back_to(self, folder: Path) -> None:
        """Parameters and optimizers of an own checkpoint."""
        self._do("go_back_to", folder=str(folder))

    def start_from(self, file: Path) -> None:
        """The parameters of a published version, perhaps of another algorithm."""
        self._do("start_from", file=str(file))

    def rest(self) -> None:
        """Nothing is to be done: the others hear that rank 0 is there."""
        self._do("rest")

    def end(self) -> None:
        """Training is over."""
        self._do("end")

    # What each rank does.

    def _step(self, size: int, lr_scale: float) -> tuple[int, dict[str, Any]]:
        self._profile.next_step()
        began = time.perf_counter()
        with timed("sample"):
            batch = self.data.sample(size)
        sampled = time.perf_counter()
        metrics = self.learner.step(batch, lr_scale)
        times = {"time/sample_s": sampled - began, "time/step_s": time.perf_counter() - sampled}
        return len(batch) * self.ranks.world, metrics | times

    def _begin_stage(self, mode: str) -> None:
        self.learner.begin_stage(mode)

    def _reach(self, ring: str, rows: int, returns: list[list[Any]]) -> bool:
        return self.data.meet(self.ranks.first or self.data.follow(ring, rows, returns))

    def _start_over(self, words: Mapping[str, Any]) -> None:
        if self._words is not None:
            self._words.take(words)
        self.data.start_over()
        self.learner.agent.forget_data()

    def _take_view(self, config: Any) -> None:
        self.data.take(*self._build_view(OmegaConf.create(config)))

    def _go_back_to(self, folder: str) -> None:
        self._checkpoints.go_back_to(self._first_host.checkpoint(folder) if self._first_host else Path(folder))

    def _start_from(self, file: str) -> None:
        tensors, _ = read_tensors(self._first_host.version(file) if self._first_host else Path(file))
        mine = {name: name for name in tensors if name in self.learner.names}
        self.learner.start_from(Renamed(tensors, mine))

    def _gather(self, what: str) -> None:
        """On another rank than 0: give its parts."""
        found = getattr(self.learner, what)
        if callable(found):
            found()

    def _rest(self) -> None:
        """Nothing."""

    def _end(self) -> None:
        self._over = True
        self.data.close()


class Follower:
    """Another rank than 0, as the role's entry runs it."""

    def __init__(self, together: Together) -> None:
        self._together = together

    def run(self) -> None:
        """Until rank 0 says that training is over. RuntimeError when it, or another rank, is gone."""
        self._together.follow()
