"""Observations of openpi clients in our terms. Called by the openpi server with each decoded message; the
GR00T server takes its pictures and states through here, too.

openpi has no one observation format: each of its robots names its own keys. Where each camera and the state are looked
for, and in which forms images may come, stands in docs/serving.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from openpi_client.image_tools import resize_with_pad
from serl_transport.contract.bounds import LARGEST, check_number, shown
from serl_transport.contract.specs import TaskSpec, check_finite

PASSED_ON = ("seed", "samples", "min_version", "deadline_ms", "prefix_actions", "inference_delay", "mode")


def infer_body(message: Mapping[str, Any], spec: TaskSpec, keys: Mapping[str, str]) -> dict[str, Any]:
    """The `infer` body of an openpi observation. Raises ValueError naming what is missing or misshapen."""
    images = {
        camera: picture(_find(message, _candidates(camera, "images", keys), f"camera {camera!r}"), camera, size)
        for camera, size in spec.cameras.items()
    }
    state = state_vector(_find(message, _candidates("state", "", keys), "state"), spec)
    body: dict[str, Any] = {"observation": {"images": images, "state": state}}
    prompt = message.get("prompt")
    if prompt is not None:
        body["prompt"] = _text(prompt)
    return body | {key: _plain(message[key]) for key in PASSED_ON if message.get(key) is not None}


def largest_message(key: str, megabytes: Any, spec: TaskSpec) -> int:
    """Bytes of one message. auto: the task's observation as float32, a camera of any size up to 640×480 or its own."""
    if megabytes == "auto":
        pixels = sum(max(height * width, 640 * 480) for height, width in spec.cameras.values())
        return (1 << 20) + 4 * (3 * pixels + spec.state_dim)
    return int(check_number(key, megabytes, 0.001, 1024) * (1 << 20))


def _candidates(name: str, folder: str, keys: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Paths into the message where `name` may be found."""
    inside = (folder, name) if folder else (name,)
    flat = [f"observation/{name}", f"observation.{name}"]
    if folder:
        flat += [f"observation/{folder}/{name}", f"observation.{folder}.{name}"]
    named = [(keys[name],)] if name in keys else []
    return [*named, ("observation", *inside), inside, *((key,) for key in flat)]


def _find(message: Mapping[str, Any], paths: list[tuple[str, ...]], what: str) -> np.ndarray:
    for path in paths:
        value: Any = message
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if isinstance(value, np.ndarray):
            return value
    tried = ", ".join("/".join(path) for path in paths)
    raise ValueError(
        f"no array for {what}; tried {tried}; the message has {shown(sorted(map(str, message))[:20], 400)}"
    )


def picture(image: np.ndarray, camera: str, size: tuple[int, int]) -> np.ndarray:
    """A client's picture as the policy reads it: uint8[*size, 3]. ValueError naming the camera."""
    if image.ndim == 3 and image.shape[0] == 3 and image.shape[2] != 3:
        image = np.moveaxis(image, 0, 2)
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"camera {camera!r}: expected [h, w, 3] or [3, h, w], got {list(image.shape)}")
    return resize_with_pad(_pixels(image, camera), *size)


def _pixels(image: np.ndarray, camera: str) -> np.ndarray:
    """uint8[h, w, 3] of uint8, of whole numbers from 0 to 255, or of floats from 0 to 1. ValueError for other values:
    clipped they would be a white or a black picture, and an action would be answered to it."""
    if image.dtype == np.uint8:
        return np.ascontiguousarray(image)
    highest = {"f": 1, "i": 255, "u": 255}.get(image.dtype.kind)
    if highest is None:
        raise ValueError(f"camera {camera!r}: expected uint8 or float in [0, 1], got {image.dtype}")
    low, high = image.min(), image.max()
    if not (low >= 0 and high <= highest):  # NaN is neither
        wanted = "float in [0, 1] (or uint8)" if highest == 1 else "whole numbers in [0, 255]"
        raise ValueError(f"camera {camera!r}: expected {wanted}, got {image.dtype} from {low:g} to {high:g}")
    return np.ascontiguousarray(image * 255 if highest == 1 else image, np.uint8)


def state_vector(state: np.ndarray, spec: TaskSpec) -> np.ndarray:
    """A client's state as float32[s]. ValueError naming what is wrong with it."""
    if state.shape != (len(spec.state_names),):
        raise ValueError(f"state: expected {len(spec.state_names)} numbers, got shape {list(state.shape)}")
    if state.dtype.kind not in "fiu":
        raise ValueError(f"state: expected numbers, got {state.dtype}")
    check_finite("state", state, spec.state_names, LARGEST)  # as it came: a float64 may be beyond float32
    return state.astype(np.float32)


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise ValueError(f"prompt: expected UTF-8 text, got the bytes {shown(value)}") from None
    if not isinstance(value, str):
        raise ValueError(f"prompt: expected a text, got {type(value).__name__}")
    return value


def _plain(value: Any) -> Any:
    """numpy scalars as Python's."""
    return value.item() if isinstance(value, np.generic) else value
