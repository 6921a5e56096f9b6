"""Observations of GR00T's clients in our terms, and our chunks in theirs. Called by the GR00T server with each message.

Two generations ask: N1.6 and later with `{observation: {video, state, language}, options}` (or, as their simulations
do, with flat keys in `observation`), N1.5 with the flat observation itself. Each gets its own form of answer. Which
forms and shapes may come stands in docs/serving.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from openpi_client.groot_layout import Layout
from openpi_client.groot_wire import ModalityConfig
from serl_launcher.serving.openpi_keys import picture, state_vector
from serl_transport.contract.bounds import shown
from serl_transport.contract.specs import TaskSpec

ROWS = 16  # observations of one message
_MODALITIES = ("video", "state", "language")
_TEXTS = ("task", "annotation.human.coarse_action")  # what else a client may call the instruction


@dataclass(frozen=True, slots=True)
class Question:
    """One get_action: the `infer` bodies of its observations, and the form that its answer takes."""

    bodies: list[dict[str, Any]]
    prefix: str  # before the parts' names in the answer
    batched: bool  # [b, ticks, dims], else [ticks, dims]
    with_info: bool  # [parts, info], else parts alone

    def answer(self, chunks: list[np.ndarray], info: dict[str, Any], layout: Layout) -> Any:
        """chunks: float32[ticks, ad] of each observation."""
        parts = {}
        for name, (start, end) in layout.action.items():
            part = np.ascontiguousarray(np.stack([chunk[:, start:end] for chunk in chunks]), np.float32)
            parts[self.prefix + name] = part if self.batched else part[0]
        return [parts, info] if self.with_info else parts


def question(data: Any, spec: TaskSpec, layout: Layout) -> Question:
    """Raises ValueError naming what is missing or misshapen."""
    if not isinstance(data, Mapping):
        raise ValueError(f"data: expected a map, got {type(data).__name__}")
    with_info = "observation" in data
    observation = data["observation"] if with_info else data
    if not isinstance(observation, Mapping):
        raise ValueError(f"observation: expected a map, got {type(observation).__name__}")
    nested = isinstance(observation.get("video"), Mapping)
    flat = _flattened(observation) if nested else dict(observation)
    states = {name: _array(flat, f"state.{name}") for name in layout.state}
    videos = {key: _array(flat, f"video.{key}") for key in layout.cameras}
    batched = all(state.ndim == 3 for state in states.values())
    texts = _texts(flat, layout)
    rows = len(next(iter(states.values()))) if batched else 1
    if not 1 <= rows <= ROWS:
        raise ValueError(f"expected 1 to {ROWS} observations in one message, got {rows}")
    row = _Rows(rows, batched)
    bodies = []
    for index in range(rows):
        images = {layout.cameras[key]: row.of(f"video.{key}", video, index, 3) for key, video in videos.items()}
        images = {camera: picture(image, camera, spec.cameras[camera]) for camera, image in images.items()}
        state = np.empty(len(spec.state_names), np.float64)
        for name, (start, end) in layout.state.items():
            state[start:end] = row.part(f"state.{name}", states[name], index, end - start)
        body: dict[str, Any] = {"observation": {"images": images, "state": state_vector(state, spec)}}
        bodies.append(body if texts is None else body | {"prompt": row.text(texts, index)})
    options = data.get("options") if with_info else None
    if isinstance(options, Mapping) and type(options.get("seed")) is int:
        bodies = [body | {"seed": options["seed"] + index} for index, body in enumerate(bodies)]
    return Question(bodies, "" if nested else "action.", batched, with_info)


def modality_configs(layout: Layout, ticks: int, n1_5: bool) -> dict[str, ModalityConfig]:
    """What the policy reads and gives. n1_5: in that generation's form. ticks: of a chunk."""
    keys = {"video": layout.cameras, "state": layout.state, "action": layout.action}
    named = {name: [f"{name}.{key}" if n1_5 else key for key in entries] for name, entries in keys.items()}
    named["language"] = [layout.prompt]
    deltas = {"action": list(range(ticks))}
    return {name: ModalityConfig(deltas.get(name, [0]), entries, n1_5) for name, entries in named.items()}


def _flattened(observation: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name in _MODALITIES:
        section = observation.get(name, {})
        if not isinstance(section, Mapping):
            raise ValueError(f"observation.{name}: expected a map, got {type(section).__name__}")
        start = "" if name == "language" else f"{name}."
        flat |= {f"{start}{key}": value for key, value in section.items()}
    return flat


def _array(flat: Mapping[str, Any], key: str) -> np.ndarray:
    value = flat.get(key)
    if not isinstance(value, np.ndarray):
        raise ValueError(f"no array {key!r}; the observation has {shown(sorted(map(str, flat))[:20], 400)}")
    return value


def _texts(flat: Mapping[str, Any], layout: Layout) -> Any:
    """Texts under whichever key the client gives them; None: the task's own prompt."""
    found = next((flat[key] for key in (layout.prompt, *_TEXTS) if key in flat), None)
    others = [key for key in flat if key.startswith(("annotation.", "language."))]
    return flat[others[0]] if found is None and len(others) == 1 else found


@dataclass(frozen=True, slots=True)
class _Rows:
    """One observation of a message: a leading batch dimension, if there is one, then one tick."""

    rows: int
    batched: bool

    def of(self, key: str, value: np.ndarray, index: int, dims: int) -> np.ndarray:
        """[…dims] of [b, 1, …] or [1, …]."""
        want = (self.rows, 1) if self.batched else (1,)
        if value.ndim != dims + len(want) or value.shape[: len(want)] != want:
            form = "[batch, 1 tick, …]" if self.batched else "[1 tick, …]"
            raise ValueError(f"{key}: expected {form} with {dims} dims behind it, got shape {list(value.shape)}")
        return value[index, 0] if self.batched else value[0]

    def part(self, key: str, value: np.ndarray, index: int, dims: int) -> np.ndarray:
        """Numbers of one part, float[dims]."""
        row = self.of(key, value, index, 1)
        if row.shape != (dims,) or row.dtype.kind not in "fiu":
            raise ValueError(f"{key}: expected {dims} numbers, got {row.dtype}{list(row.shape)}")
        return row

    def text(self, texts: Any, index: int) -> str:
        """The text of [[text]], [text] or text."""
        found = texts
        if isinstance(found, list) and self.batched and len(found) == self.rows:
            found = found[index]
        while isinstance(found, list) and len(found) == 1:
            found = found[0]
        if not isinstance(found, str):
            raise ValueError(f"language: expected one text for each of {self.rows} observations, got {shown(texts)}")
        return found
