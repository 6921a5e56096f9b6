"""One recorded episode's states and actions, out of a LeRobotDataset v3, which each run folder of a learner has.

Called by `rehearsal` for a replay. Names and sizes are checked against the task here, finite numbers by the
safety chain itself.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from serl_transport.contract.specs import TaskSpec

STATE, ACTION = "observation.state", "action"


@dataclass(frozen=True, slots=True)
class Recorded:
    """An episode."""

    states: np.ndarray  # float32[n, s], before each action
    actions: np.ndarray  # float32[n, ad]


def read_episode(source: str, index: int, spec: TaskSpec) -> Recorded:
    """Episode `index` (negative: from the end) of a run's name or folder, or a dataset's folder.

    ValueError in one line: no dataset there, no such episode, other names or sizes than the task's, no reader.
    """
    root = _find(source)
    info = json.loads((root / "meta/info.json").read_text(encoding="utf-8"))
    total = info["total_episodes"]
    if not -total <= index < total:
        raise ValueError(f"--episode {index}: {root} holds {total} episodes, 0 to {total - 1}")
    for key, names in ((STATE, spec.state_names), (ACTION, spec.action_names)):
        _check_names(root, key, (info.get("features") or {}).get(key), names)
    table = _rows(root, index % total)
    if not len(table[STATE]):
        raise ValueError(f"{root}: episode {index} has no rows in its data files")
    return Recorded(np.array(table[STATE], np.float32), np.array(table[ACTION], np.float32))


def _find(source: str) -> Path:
    places = [Path(source), Path(source) / "dataset", Path("runs") / source / "dataset"]
    for root in places:
        if (root / "meta/info.json").is_file():
            return root
    raise ValueError(
        f"--replay {source}: no dataset at {', '.join(map(str, places))}. It is on the learner's host: "
        f"scp -r <learner>:runs/<run>/dataset . and --replay dataset"
    )


def _check_names(root: Path, key: str, feature: dict | None, names: tuple[str, ...]) -> None:
    if feature is None:
        raise ValueError(f"{root}: it has no {key!r}")
    theirs = feature.get("names")
    theirs = next(iter(theirs.values()), None) if isinstance(theirs, dict) else theirs
    if list(feature["shape"]) != [len(names)] or (theirs is not None and list(theirs) != list(names)):
        raise ValueError(f"{root}: {key} is {theirs or feature['shape']}, the task has {list(names)}")


def _rows(root: Path, index: int) -> dict[str, list]:
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError("--replay reads parquet files: bash tools/bootstrap.sh actor installs pyarrow") from None
    rows: dict[str, list] = {STATE: [], ACTION: []}
    for path in sorted(root.glob("data/*/*.parquet")):
        found = pq.read_table(path, columns=[STATE, ACTION], filters=[("episode_index", "=", index)])
        for key in rows:
            rows[key] += found[key].to_pylist()
    return rows
