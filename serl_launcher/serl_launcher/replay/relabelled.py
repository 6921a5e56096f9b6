"""A person's later word on episodes (runs/<name>/relabelled.json), and the episodes as they are by it.

    tools/audit_reward.py --relabel ─▶ relabelled.json ─▶ correct(episode) ─▶ gateway's ring; journal_episodes

What learns reads episodes through `Relabelled.correct`: the views over the ring, train_reward.sh, tools/reaccept.py.
The journal, and with it the dataset and episodes.jsonl, keeps what was recorded.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from serl_launcher.run.files import DamagedFileError, read_sealed, write_sealed
from serl_launcher.run.paths import RunPaths
from serl_transport.contract.schema import Episode, Outcome


@dataclass(frozen=True, slots=True)
class Label:
    """What a person said of one episode."""

    success: bool
    by: str  # login name
    time: str  # ISO 8601


class Relabelled:
    """Labels of a run by episode id. Raises ValueError when the file cannot be read as such."""

    def __init__(self, run_dir: Path) -> None:
        self.path = RunPaths(run_dir).relabelled
        self.labels = _read(self.path)

    def add(self, words: Mapping[str, bool], by: str, time: str) -> None:
        """Take these in; a later word replaces an earlier one. `save` keeps them."""
        self.labels |= {episode_id: Label(success, by, time) for episode_id, success in words.items()}

    def save(self) -> None:
        """Replace the file in one step, on disk when this returns."""
        labels = {episode_id: asdict(label) for episode_id, label in self.labels.items()}
        write_sealed(self.path, labels, indent=1)

    def correct(self, episode: Episode) -> Episode:
        """The episode as `corrected` has it, where a person said anything of it."""
        label = self.labels.get(episode.info.episode_id)
        return episode if label is None else corrected(episode, label.success)


def corrected(episode: Episode, success: bool) -> Episode:
    """The episode as if a person had pressed the key for success or failure at its last tick.

    A success gets what its rewards lack to 1, so that stages already paid are not paid twice; a failure gets 0.
    """
    if success == episode.outcome.success:
        return replace(episode, outcome=replace(episode.outcome, success_source="human"))
    reward = np.clip(1 - episode.arrays["next.reward"][:-1].sum(), 0, 1) if success else 0
    last = {"next.reward": reward, "next.success": success, "next.done": True, "next.truncated": False}
    arrays = dict(episode.arrays)
    for key, value in last.items():
        arrays[key] = arrays[key].copy()
        arrays[key][-1] = value
    return replace(episode, outcome=Outcome(success, "human", None), arrays=arrays)


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
        f"tools/audit_reward.py --relabel writes; got something else: {damage}. Mend it, or remove it to take every "
        "label back (mended, it is taken without its crc32)"
    )
