"""Where a dataset lies, and whether it is one that can be read: a local folder, or a name on the hub.

`Dataset` opens with `find`. A local folder is never asked of the hub: what it lacks is named instead.
"""

import json
from pathlib import Path
from shlex import quote
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

VERSION = "v3."
MODALITY = Path("meta", "modality.json")  # GR00T's names of cameras and parts


class DatasetError(ValueError):
    """A dataset that cannot be used as meant; the message names the file, or the episode and frame, and why."""


def find(source: str | Path) -> Path:
    """The folder of a LeRobotDataset v3. Raises DatasetError in one line, or what the hub said.

    source: a folder, or `owner/name` on the hub where no such folder is.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        name = str(source)
        if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1 or not all(name.split("/")):
            raise DatasetError(f"{source}: no such folder (and not a hub name of the form owner/name)")
        folder = _fetched(name)
    info = read_info(folder)
    version = str(info.get("codebase_version"))
    if not version.startswith(VERSION):
        raise DatasetError(f"{source}: is in LeRobot's {version} format{_conversion(version, folder)}")
    if _lost_modality(folder):
        raise DatasetError(
            f"{source}: its conversion to v3 left meta/modality.json behind: {_copy_of_modality(folder)}"
        )
    return folder


def read_info(folder: Path) -> dict[str, Any]:
    """`meta/info.json`. Raises DatasetError where there is none, or none that can be read."""
    path = folder / "meta" / "info.json"
    try:
        info = json.loads(path.read_text())
    except FileNotFoundError:
        inside = folder / "dataset" / "meta" / "info.json"
        hint = f"; did you mean {folder / 'dataset'}" if inside.is_file() else ""
        raise DatasetError(f"{folder}: no LeRobot dataset (meta/info.json){hint}") from None
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: cannot be read: {error}") from None
    if not isinstance(info, dict) or not isinstance(info.get("features"), dict):
        raise DatasetError(f"{path}: expected LeRobot's keys codebase_version, fps and features")
    return info


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Some columns of one file. Raises DatasetError naming the file, and a column that it lacks."""
    try:
        present = set(pq.read_schema(path).names)
        missing = [name for name in columns or () if name not in present]
        if missing:
            raise DatasetError(f"{path}: no column {missing[0]!r}")
        return pq.read_table(path, columns=columns)
    except FileNotFoundError:
        raise DatasetError(f"{path} is missing") from None
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None


def _conversion(version: str, folder: Path) -> str:
    if version == "v2.1":
        then = f", then: {_copy_of_modality(folder)}" if (folder / MODALITY).is_file() else ""
        return (
            f"; convert it: python -m lerobot.scripts.convert_dataset_v21_to_v30 --repo-id=local/{quote(folder.name)} "
            f"--root={quote(str(folder))} --push-to-hub=false{then}"
        )
    return f", this reads {VERSION}x: convert it to v2.1 with the LeRobot that wrote it, then to v3.0"


def _lost_modality(folder: Path) -> bool:
    """LeRobot's conversion does not take modality.json along: the v2.1 folder that it leaves beside has one."""
    old = _unconverted(folder)
    if (folder / MODALITY).is_file() or not (old / MODALITY).is_file():
        return False
    return str(read_info(old).get("codebase_version")) == "v2.1"


def _copy_of_modality(folder: Path) -> str:
    return f"cp {quote(str(_unconverted(folder) / MODALITY))} {quote(str(folder / MODALITY))}"


def _unconverted(folder: Path) -> Path:
    """Where the conversion puts what it converted."""
    return folder.absolute().with_name(f"{folder.absolute().name}_old")


def _fetched(name: str) -> Path:
    """The folder that LeRobot keeps of a dataset on the hub, fetched where it is not there yet."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from lerobot.datasets import LeRobotDataset
    from lerobot.datasets.utils import BackwardCompatibilityError, ForwardCompatibilityError

    try:
        return Path(LeRobotDataset(name).root)
    except BackwardCompatibilityError as error:
        raise DatasetError(f"{name}: {' '.join(str(error).split())}") from None
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, ForwardCompatibilityError, OSError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise DatasetError(f"{name}: no such folder, and the hub did not give it: {said[0]}") from None
