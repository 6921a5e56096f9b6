"""Is a written dataset what its sources said? Read back from disk and compared, before it gets its name.

    every row: bit-equal but for what was renumbered, renamed or judged anew │ every mp4: the same bytes │ frame counts
    our own reader (datasets.dataset) and LeRobotDataset open it and give its first and last rows

Called by tools/edit_dataset.py for every dataset that it writes. DatasetError says the first thing that differs.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from serl_launcher.curation.rows import Renaming, SourceRows, episode_rows
from serl_launcher.curation.sources import EpisodeFacts, Opened
from serl_launcher.curation.statistics import numbers
from serl_launcher.curation.writer import frames_in
from serl_launcher.datasets.dataset import Dataset
from serl_launcher.datasets.folder import DatasetError
from serl_launcher.datasets.pictures import video_backend
from serl_launcher.run.files import sha256_of


def check(out: Path, sources: Sequence[Opened], chosen: Sequence[EpisodeFacts], renaming: Renaming) -> int:
    """Compare everything; how many rows were compared."""
    written = Opened(str(out), 0)
    if [one.n for one in written.episodes] != [one.n for one in chosen]:
        raise DatasetError(f"{out}: the episodes' lengths are not those of the sources")
    before, after = [SourceRows(source) for source in sources], SourceRows(written)
    first, compared = 0, set[tuple[Path, Path]]()
    for new, old in zip(written.episodes, chosen, strict=True):
        source = sources[old.source]
        rows = before[old.source](old)
        expected = episode_rows(rows, old, source.tasks, written.tasks, renaming, new.index, first)
        _compare(out, after(new), expected, new.index)
        for key in written.videos:
            pair = written.video_file(key, new.row), source.video_file(key, old.row)
            if pair not in compared and sha256_of(pair[0]) != sha256_of(pair[1]):
                raise DatasetError(f"{pair[0]} is not {pair[1]}")
            compared.add(pair)
            _check_end(pair[0], new, key, written.fps)
        first += new.n
    _open_with_ours(out, first)
    _open_with_lerobot(out, [new.n for new in written.episodes])
    return first


def _compare(out: Path, found: pa.Table, expected: pa.Table, episode: int) -> None:
    if set(found.schema.names) != set(expected.schema.names):
        raise DatasetError(f"{out}, episode {episode}: columns {sorted(found.schema.names)}, expected others")
    for name in expected.schema.names:
        mine, theirs = found[name], expected[name]
        if pa.types.is_struct(mine.type):  # pictures
            same = mine.to_pylist() == theirs.to_pylist()
        else:
            a, b = numbers(mine), numbers(theirs)
            same = a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        if not same:
            raise DatasetError(f"{out}, episode {episode}: column {name!r} is not the source's")


def _check_end(path: Path, one: EpisodeFacts, key: str, fps: float) -> None:
    """The file has every frame that the episode refers to."""
    end = one.row[f"videos/{key}/to_timestamp"]
    if (there := frames_in(path)) < round(end * fps):
        raise DatasetError(f"{path}, episode {one.index}: it ends at frame {round(end * fps)}, the file has {there}")


def _open_with_ours(out: Path, frames: int) -> None:
    data = Dataset(str(out))
    if len(data.rows(data.spec())) != frames:
        raise DatasetError(f"{out}: our reader finds other rows than were written")


def _open_with_lerobot(out: Path, lengths: Sequence[int]) -> None:
    """Its counts, and the first and last episode with their pictures. What HF datasets caches of them goes again."""
    import datasets
    from lerobot.datasets import LeRobotDataset

    usual = datasets.config.HF_DATASETS_CACHE
    with tempfile.TemporaryDirectory(prefix=".check-", dir=out.parent) as cache:
        datasets.config.HF_DATASETS_CACHE = Path(cache)
        try:
            ends = sorted({0, len(lengths) - 1})
            dataset = LeRobotDataset("local/check", root=out, episodes=ends, video_backend=video_backend())
            found = [dataset.meta.total_episodes, dataset.meta.total_frames, len(dataset)]
            last = [int(dataset[place]["index"]) for place in (0, found[2] - 1)]
        finally:
            datasets.config.HF_DATASETS_CACHE = usual
    if found != [len(lengths), sum(lengths), sum(lengths[k] for k in ends)] or last != [0, sum(lengths) - 1]:
        raise DatasetError(f"{out}: LeRobot finds {found} (episodes, frames, rows of the first and last)")
