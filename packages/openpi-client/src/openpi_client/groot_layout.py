"""How a robot's state, actions and cameras lie in GR00T's keys: `modality.json`, read once for a task.

    modality.json {"state": {"arm": {"start": 0, "end": 5}, …}, "action": …, "video": {"front": {…}}, "annotation": …}

The server of a run (serl_launcher.serving.groot_server) and an actor that a GR00T server drives
(serl_robot_infra.groot_policy) read the same file: the one of the dataset that the policy was trained on.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serl_transport.contract.bounds import shown
from serl_transport.contract.specs import TaskSpec

PROMPT = "annotation.human.task_description"  # where GR00T looks for the instruction, unless a file says otherwise
_IMAGES, _COLUMNS = "observation.images.", {"state": "observation.state", "action": "action"}


@dataclass(frozen=True, slots=True)
class Layout:
    """Names of parts. Slices are half-open: (0, 5) are dims 0 … 4."""

    cameras: Mapping[str, str]  # GR00T's video key -> camera of the task
    state: Mapping[str, tuple[int, int]]  # part -> its dims in the task's state
    action: Mapping[str, tuple[int, int]]
    prompt: str = PROMPT

    @staticmethod
    def read(path: str | None, spec: TaskSpec, key: str) -> "Layout":
        """Of a modality.json; None: the task's own camera names and one part `all`. ValueError in the user's words."""
        if path is None:
            whole = {"all": (0, len(spec.state_names))}, {"all": (0, len(spec.action_names))}
            return Layout({camera: camera for camera in spec.cameras}, *whole)
        try:
            content = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{key}={path}: {error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"{key}={path}: not JSON: {error}") from None
        where = f"{key}={path}"
        prompts = [f"annotation.{name}" for name in _section(content, "annotation", where)]
        return Layout(
            _cameras(_section(content, "video", where), spec),
            _parts(_section(content, "state", where), "state", len(spec.state_names), where),
            _parts(_section(content, "action", where), "action", len(spec.action_names), where),
            prompts[0] if prompts else PROMPT,
        )

    def join_actions(self, parts: Mapping[str, Any]) -> np.ndarray:
        """float32[ticks, ad] of GR00T's parts, with or without `action.` before their names, one observation's.

        A part is [1, ticks, dims], [ticks, dims], or [ticks] where it has one dim. ValueError naming what is missing or
        misshapen.
        """
        found = {name: _chunk(parts, name, end - start) for name, (start, end) in self.action.items()}
        ticks = {len(chunk) for chunk in found.values()}
        if len(ticks) != 1:
            raise ValueError(f"parts of different lengths: { {name: len(chunk) for name, chunk in found.items()} }")
        out = np.empty((ticks.pop(), sum(end - start for start, end in self.action.values())), np.float32)
        for name, (start, end) in self.action.items():
            out[:, start:end] = found[name]
        return out


def _chunk(parts: Mapping[str, Any], name: str, dims: int) -> np.ndarray:
    """One part as [ticks, dims]."""
    chunk = parts.get(name, parts.get(f"action.{name}"))
    if not isinstance(chunk, np.ndarray):
        raise ValueError(f"no part {name!r}; the answer has {shown(sorted(map(str, parts)), 200)}")
    if chunk.ndim == 3 and len(chunk) == 1:
        chunk = chunk[0]
    if chunk.ndim == 1 and dims == 1:
        chunk = chunk[:, None]  # N1.5 squeezes
    if chunk.ndim != 2 or chunk.shape[1] != dims or chunk.dtype.kind not in "fiu":
        raise ValueError(f"part {name!r}: expected numbers [ticks, {dims}], got {chunk.dtype}{list(chunk.shape)}")
    return chunk


def _section(content: Any, name: str, where: str) -> Mapping[str, Any]:
    section = content.get(name, {}) if isinstance(content, Mapping) else None
    if not isinstance(section, Mapping):
        raise ValueError(f"{where}: {name}: expected a map of names, got {shown(section)}")
    return section


def _cameras(section: Mapping[str, Any], spec: TaskSpec) -> dict[str, str]:
    """Those of the task's cameras that the data have; cameras of the data that the task lacks are nobody's until a
    policy wants them."""
    columns = {
        str(name): entry.get("original_key") if isinstance(entry, Mapping) else None for name, entry in section.items()
    }
    cameras = {name: str(column or name).removeprefix(_IMAGES) for name, column in columns.items()}
    return {name: camera for name, camera in cameras.items() if camera in spec.cameras}


def _parts(section: Mapping[str, Any], what: str, dims: int, where: str) -> dict[str, tuple[int, int]]:
    """Parts that divide the task's dims without gap or overlap."""
    parts = {}
    for name, entry in section.items():
        entry = entry if isinstance(entry, Mapping) else {}
        column = entry.get("original_key", _COLUMNS[what])
        start, end = entry.get("start"), entry.get("end")
        if column != _COLUMNS[what] or type(start) is not int or type(end) is not int or not 0 <= start < end <= dims:
            raise ValueError(
                f"{where}: {what}.{name}: expected start and end within the {dims} dims of {_COLUMNS[what]}, got "
                f"{shown(dict(entry))}"
            )
        parts[str(name)] = (start, end)
    covered = sorted(parts.values())
    if [0, *(end for _, end in covered)] != [*(start for start, _ in covered), dims]:
        raise ValueError(f"{where}: {what}: its parts {parts} do not divide the task's {dims} dims among them")
    return parts
