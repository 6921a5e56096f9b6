"""A person's later word on episodes, and the episodes as they are by it.

    operate.py verdict, console ─▶ gateway ──┐
    tools/audit_reward.py --relabel ─▶ save ─┴▶ acts.jsonl ─▶ correct(episode): journal_episodes and who else learns
                                                          └─▶ word_of(key), as_said: the views over the ring

The journal, and with it the ring, the dataset and episodes.jsonl, keeps what was recorded. relabelled.json is an older
release's, read where it is; a word in acts.jsonl outranks it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from serl_launcher.replay.ring import episode_key
from serl_launcher.run.acts import ActsLedger
from serl_launcher.run.files import DamagedFileError, read_sealed
from serl_launcher.run.in_force import Word
from serl_launcher.run.paths import RunPaths
from serl_transport.contract.schema import DISCARD, Episode, Outcome


@dataclass(frozen=True, slots=True)
class Label:
    """That a person called one episode a success or a failure."""

    success: bool
    by: str  # login name
    time: str  # ISO 8601


class Relabelled:
    """Words on a run's episodes. Raises ValueError when relabelled.json cannot be read as such.

    They are those of the time when it was made; `refresh` takes in what came since.
    """

    def __init__(self, run_dir: Path) -> None:
        paths = RunPaths(Path(run_dir))
        self._ledger = ActsLedger(paths.root)
        self._older = {
            episode_id: Word(label.success, None, 0, label.by, label.time)
            for episode_id, label in _read(paths.relabelled).items()
        }
        self._new: dict[str, Word] = {}  # not kept yet
        self.words: dict[str, Word] = {}  # by episode id
        self._by_key: dict[int, Word] = {}
        self._take()

    @property
    def path(self) -> Path:
        """The file that keeps them."""
        return self._ledger.path

    @property
    def labels(self) -> dict[str, Label]:
        """The episodes that were called a success or a failure, by id."""
        return {
            episode_id: Label(word.success, word.by, word.time)
            for episode_id, word in self.words.items()
            if word.success is not None
        }

    def refresh(self) -> bool:
        """Look for words said since; True when there are any."""
        return self._ledger.refresh() and self._take()

    def _take(self) -> bool:
        before = self.words
        self.words = self._older | self._ledger.state.words | self._new
        self._by_key = {episode_key(episode_id): word for episode_id, word in self.words.items()}
        return before != self.words

    def add(self, words: Mapping[str, bool], by: str, time: str) -> None:
        """Take these in; a later word replaces an earlier one. `save` keeps them."""
        for episode_id, success in words.items():
            use = self.words.get(episode_id, Word()).use
            self._new[episode_id] = Word(success, use, 0, by, time)
        self._take()

    def save(self) -> None:
        """Keep what was added, all or nothing, on disk when this returns. OSError."""
        for by, time in {(word.by, word.time) for word in self._new.values()}:
            acts = [
                {"act": "verdict", "episode_id": episode_id, "word": "success" if word.success else "failure"}
                for episode_id, word in self._new.items()
                if (word.by, word.time) == (by, time)
            ]
            self._ledger.append(*acts, by=by, time_=time)
        self._new.clear()
        self._take()

    def word_of(self, key: int) -> Word | None:
        """What was said of the ring's episode with this key."""
        return self._by_key.get(key)

    def correct(self, episode: Episode) -> Episode:
        """The episode by what a person said of it: a success or failure as `corrected` has it, or discarded."""
        word = self.words.get(episode.info.episode_id)
        if word is None:
            return episode
        if word.success is not None:
            episode = corrected(episode, word.success, word.by)
        if word.use == "discard":
            episode = replace(episode, outcome=replace(episode.outcome, truncated_by=DISCARD))
        return episode


def corrected(episode: Episode, success: bool, judge: str | None = None) -> Episode:
    """The episode as if a person had pressed the key for success or failure at its last tick.

    A success gets what its rewards lack to 1, so that stages already paid are not paid twice; a failure gets 0. What
    was thrown away at the robot stays so.
    """
    outcome = episode.outcome
    stays = success == outcome.success or outcome.truncated_by == DISCARD
    return replace(
        episode,
        outcome=Outcome(success, "human", outcome.truncated_by if stays else None, judge),
        arrays=as_said(Word(success), outcome.success, episode.arrays)[1],
    )


def as_said(
    word: Word | None, success: bool, arrays: Mapping[str, np.ndarray]
) -> tuple[bool, Mapping[str, np.ndarray]]:
    """An episode's success and its columns (those that are given, of n rows each) by a person's word."""
    if word is None or word.success in (None, success):
        return success, arrays
    reward = np.clip(1 - arrays["next.reward"][:-1].sum(), 0, 1) if word.success else 0
    last = {"next.reward": reward, "next.success": word.success, "next.done": True, "next.truncated": False}
    changed = dict(arrays)
    for key in last.keys() & arrays.keys():
        changed[key] = arrays[key].copy()
        changed[key][-1] = last[key]
    return word.success, changed


def _read(path: Path) -> dict[str, Label]:
    try:
        labels = {episode_id: Label(**row) for episode_id, row in (read_sealed(path) or {}).items()}
        if all(type(label.success) is bool for label in labels.values()):
            return labels
        damage = "a success that is neither true nor false"
    except DamagedFileError as error:
        damage = str(error)
    except TypeError:
        damage = "an entry that is no label"
    raise DamagedFileError(
        f'{path}: expected {{"episode id": {{"success": true | false, "by": …, "time": …}}}}, as '
        f"tools/audit_reward.py --relabel wrote; got something else: {damage}. Mend it, or remove it to take every "
        "label back (mended, it is taken without its crc32)"
    )
