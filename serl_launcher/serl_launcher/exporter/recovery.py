"""Finding out what an exported dataset holds, and making it consistent after a kill or a damaged file.

Called by the dataset writer when it opens a folder. Commits are checked in order: a commit counts while its episodes
file, data file and mp4s are whole and continue the one before. The first that does not ends the dataset; it and all
after it are removed, and the exporter takes those episodes from the journal again. The derived files are written anew.

Whole: the episodes file has the checksums of its pages, and the sha256 of the commit's other files in its metadata
(none in those of older releases), so a start reads the dataset once.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from serl_launcher.exporter.features import ORDINAL, dataset_features, image_keys
from serl_launcher.exporter.layout import DATA_PATH, INFO_PATH, VIDEO_PATH, commit_of, place
from serl_launcher.exporter.metadata import DatasetState, Row, write_derived, write_tasks
from serl_launcher.run.files import PART, clear, read_json, sha256_of
from serl_transport.contract.specs import TaskSpec

_log = logging.getLogger(__name__)
SUMS = b"flowserl.sha256"


class UnusableDataset(RuntimeError):  # noqa: N818
    """The folder cannot be continued; it has to be rebuilt from the journal. The message says why."""


def recover(root: Path, spec: TaskSpec, video: bool) -> DatasetState:
    """Make the dataset at `root` consistent and return what it holds; an absent or empty folder is an empty dataset.

    Raises UnusableDataset when its features are not this task's.
    """
    _check_features(root, spec, video)
    state = DatasetState()
    for rows in _whole_commits(root, spec, video):
        state = state.after(rows)  # one commit at a time: the rows of a long run are many
    if state.commits or (root / INFO_PATH).exists():
        write_tasks(root, state.tasks)
        write_derived(root, spec, video, state)
    _remove_from(root, state.commits)
    return state


def _check_features(root: Path, spec: TaskSpec, video: bool) -> None:
    """info.json, unless it is missing or torn, describes this task's columns."""
    found = (read_json(root / INFO_PATH) or {}).get("features")
    wanted = dataset_features(spec, video)
    if isinstance(found, dict) and found != wanted:
        keys = sorted(key for key in found | wanted if found.get(key) != wanted.get(key))
        raise UnusableDataset(f"{root} was written for other features: {', '.join(keys)}")


def _whole_commits(root: Path, spec: TaskSpec, video: bool) -> Iterator[list[Row]]:
    """The episode rows of each commit up to the first that is damaged."""
    last: Row | None = None
    videos = image_keys(spec) if video else []
    for commit, path in enumerate(sorted(root.glob("meta/episodes/chunk-*/file-*.parquet"), key=commit_of)):
        try:
            rows = _read_commit(root, path, commit, videos, last)
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            _log.warning("dataset: commit %d is damaged (%s); keeping the %d before it", commit, error, commit)
            return
        last = rows[-1]
        yield rows


def _read_commit(root: Path, path: Path, commit: int, videos: list[str], before: Row | None) -> list[Row]:
    """The episode rows of one commit, after comparing them with its data file and the last row before it."""
    if commit_of(path) != commit:
        raise ValueError(f"expected commit {commit}, found {path.name}")
    table = pq.read_table(path, page_checksum_verification=True)
    _check_sums(root, table.schema.metadata or {}, _sealed(commit, videos))
    rows = table.to_pylist()
    data = pq.read_table(root / place(DATA_PATH, commit), columns=["index", "episode_index", ORDINAL])
    ordinals = [row["episode_ordinal"] for row in rows]
    lengths = [row["length"] for row in rows]
    newest, episodes, frames = -1, 0, 0
    if before is not None:
        newest, episodes = before["episode_ordinal"], before["episode_index"] + 1
        frames = before["dataset_to_index"]
    if not rows or ordinals != sorted(set(ordinals)) or ordinals[0] <= newest:
        raise ValueError(f"episode ordinals {ordinals} do not continue {newest}")
    expected = {
        "index": frames + np.arange(sum(lengths)),
        "episode_index": episodes + np.repeat(np.arange(len(rows)), lengths),
        ORDINAL: np.repeat(ordinals, lengths),
    }
    for key, values in expected.items():
        if not np.array_equal(data[key].to_numpy(), values):
            raise ValueError(f"column {key} of its data file does not match its episodes")
    for key in videos:
        if not (root / place(VIDEO_PATH, commit, video_key=key)).stat().st_size:
            raise ValueError(f"the video of {key} is empty")
    return rows


def file_sums(root: Path, commit: int, videos: list[str]) -> dict[bytes, bytes]:
    """Metadata for a commit's episodes file: the sha256 of its data file and mp4s, as JSON by relative path."""
    return {SUMS: json.dumps({name: sha256_of(root / name) for name in _sealed(commit, videos)}).encode()}


def _sealed(commit: int, videos: list[str]) -> list[str]:
    return [place(DATA_PATH, commit), *(place(VIDEO_PATH, commit, video_key=key) for key in videos)]


def _check_sums(root: Path, metadata: dict[bytes, bytes], names: list[str]) -> None:
    sums = json.loads(metadata.get(SUMS, b"{}"))
    for name in names if sums else ():
        if sha256_of(root / name) != sums.get(name):
            raise ValueError(f"{name} does not match its sha256")


def _remove_from(root: Path, commit: int) -> None:
    """Delete the files of `commit` and later ones, episodes files first, and everything temporary."""
    for folder in ("meta", "data", "videos"):
        for path in sorted((root / folder).rglob("*")):
            ours = path.name.startswith("file-") and ".damaged-" not in path.name
            if path.name.endswith(PART) or (ours and commit_of(path) >= commit):
                clear(path)  # a folder is put aside: nothing of ours made it
                path.unlink(missing_ok=True)
