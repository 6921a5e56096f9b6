"""One question of an actor, validated: the body of an `infer` message as the engine takes it.

The policy server and the local policy make them; the engine answers them in batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from serl_transport.contract.bounds import INT64, PROMPT_CHARACTERS, check_text, check_whole, shown
from serl_transport.contract.schema import MODES, Observation
from serl_transport.contract.specs import TaskSpec

MAX_SAMPLES = 64


@dataclass(frozen=True, slots=True)
class Query:
    """One observation that wants a chunk, or several."""

    images: dict[str, np.ndarray]  # camera -> uint8[h, w, 3]
    state: np.ndarray  # float32[s], physical units
    prompt: str
    seed: int | None = None  # of the sampling noise; None draws from the engine's generator
    samples: int | None = None  # n chunks from one prefix; None: one chunk, answered without the leading axis
    prefix_actions: np.ndarray | None = None  # float32[k, ad], rest of the running chunk, physical; [0] is this tick's
    inference_delay: int = 0  # d, ticks of it that will have been executed when the answer arrives

    @property
    def rows(self) -> int:
        """Chunks to make."""
        return self.samples or 1


def query_from_body(body: dict[str, Any], spec: TaskSpec) -> Query:
    """Validate an `infer` body. Raises ValueError naming the key, what was expected and what came."""
    observation = body.get("observation")
    if not isinstance(observation, dict) or not isinstance(observation.get("images"), dict):
        raise ValueError("infer: expected observation {images: {camera: uint8[h, w, 3]}, state: float32[s]}")
    checked = Observation(images=observation["images"], state=observation.get("state"))
    spec.check_observation(checked)
    if body.get("mode") not in (None, *MODES):
        raise ValueError(f"infer: mode: expected one of {', '.join(MODES)}, got {shown(body['mode'])}")
    prefix, prompt = _prefix_actions(body.get("prefix_actions"), spec), body.get("prompt")
    return Query(
        images=dict(checked.images),
        state=checked.state,
        prompt=spec.prompt if prompt is None else check_text("infer: prompt", prompt, PROMPT_CHARACTERS),
        seed=_whole(body, "seed", None, 0, INT64),
        samples=_whole(body, "samples", None, 1, MAX_SAMPLES),
        prefix_actions=prefix,
        inference_delay=_whole(body, "inference_delay", 0, 0, 0 if prefix is None else len(prefix)) or 0,
    )


def _prefix_actions(value: Any, spec: TaskSpec) -> np.ndarray | None:
    if value is None:
        return None
    ad = len(spec.action_names)
    if not isinstance(value, np.ndarray) or value.dtype != np.float32 or value.ndim != 2 or value.shape[1] != ad:
        shape = f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
        raise ValueError(f"infer: prefix_actions: expected float32[k, {ad}], got {shape}")
    if not np.isfinite(value).all():
        raise ValueError("infer: prefix_actions: expected finite numbers")
    return value if len(value) else None


def _whole(body: dict[str, Any], key: str, default: int | None, low: int, high: int) -> int | None:
    value = body.get(key)
    return default if value is None else check_whole(f"infer: {key}", value, low, high)
