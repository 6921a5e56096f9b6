"""Pictures of a training batch changed at random on the device: shifted, and in other colours. `trainer.augment`.

    learner.data, learner.fine_tuning: draw rows ─▶ Augment: pictures to the device, changed ─▶ agent.prepare ─▶ step

Each sample, each camera and each of s and s′ has draws of its own, as in DrQ (Kostrikov et al., 2004.13649, section 3:
the target's pictures are augmented independently). All draws are made on the host, for the whole global batch, from the
generator that drew its rows: a resumed run has the same ones, and a rank takes its rows of them. Everything 0, the
default: no draw is made and the batch passes as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from serl_launcher.policies.transfer import to_device
from serl_launcher.replay.learning import LearningBatch

PICTURES = ("images", "next_images")
LUMA = (0.2989, 0.587, 0.114)  # of grey, ITU-R BT.601, as torchvision's


@dataclass(frozen=True, slots=True, kw_only=True)
class Augment:
    """Keys of `trainer.augment`; ValueError names one that is out of range.

    shift: pixels of the camera's picture; a sample moves by up to so many each way, edges repeated (DrQ: pad 4, crop).
    brightness, contrast, saturation: a factor of 1 ± so much; hue: a turn of up to so much of the circle each way.
    Applied in this order; GR00T is fine-tuned with 0.3, 0.4, 0.5 and 0.08.
    """

    shift: int
    brightness: float
    contrast: float
    saturation: float
    hue: float

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "shift":
                good, expected = isinstance(value, int) and value >= 0, "a whole number of pixels of at least 0"
            else:
                most = 0.5 if field.name == "hue" else 1
                good = isinstance(value, int | float) and 0 <= value <= most
                expected = f"a number from 0 to {most}"
            if not good or isinstance(value, bool):
                raise ValueError(f"trainer.augment.{field.name}: expected {expected}, got {value!r}")

    @property
    def on(self) -> bool:
        """Is anything changed at all?"""
        return any(getattr(self, field.name) for field in fields(self))

    def __call__(
        self, batch: Any, rng: np.random.Generator, device: torch.device, share: slice = slice(None), whole: int = 0
    ) -> Any:
        """The batch with its pictures changed, uint8[b, h, w, 3] on the device.

        batch: of chunks, transitions or both. share: the rows of the global batch that it holds; whole: the global
        batch's rows, 0 for the batch's own.
        """
        if not self.on:
            return batch
        if isinstance(batch, LearningBatch):
            given = {"imitation": batch.imitation, "transitions": batch.transitions}
            given = {name: self(part, rng, device, share, whole) for name, part in given.items() if part is not None}
            return replace(batch, **given)
        given = {name: getattr(batch, name) for name in PICTURES if hasattr(batch, name)}
        changed = {
            name: {camera: self._of_a_camera(x, rng, device, share, whole) for camera, x in cameras.items()}
            for name, cameras in given.items()
        }
        return replace(batch, **changed)

    def _of_a_camera(
        self, pictures: np.ndarray, rng: np.random.Generator, device: torch.device, share: slice, whole: int
    ) -> Tensor:
        draws = self._draws(rng, whole or len(pictures))
        return self.change(to_device(pictures, device), {key: x[share] for key, x in draws.items()})

    def _draws(self, rng: np.random.Generator, b: int) -> dict[str, np.ndarray]:
        """What changes b pictures, only what is asked for: shift int64[b, 2]; the colours' float32[b]."""
        found: dict[str, np.ndarray] = {}
        if self.shift:
            found["shift"] = rng.integers(-self.shift, self.shift + 1, (b, 2))
        for key in ("brightness", "contrast", "saturation", "hue"):
            if most := getattr(self, key):
                middle = 0 if key == "hue" else 1
                found[key] = rng.uniform(middle - most, middle + most, b).astype(np.float32)
        return found

    def change(self, pictures: Tensor, draws: Mapping[str, np.ndarray]) -> Tensor:
        """Pictures uint8[b, h, w, 3] by their draws (`_draws`), same shape, dtype and device."""
        given = {key: to_device(x, pictures.device) for key, x in draws.items()}
        if (by := given.pop("shift", None)) is not None:
            pictures = shifted(pictures, by)
        if not given:
            return pictures
        x = pictures.float() / 255
        for key, draw in given.items():
            x = COLOURS[key](x, draw.view(-1, 1, 1, 1))
        return (x * 255).round_().to(torch.uint8)


def shifted(pictures: Tensor, by: Tensor) -> Tensor:
    """Pixel (y, x) of the result is pixel (y + by[0], x + by[1]) of the picture, that of the edge beyond it.

    pictures: [b, h, w, 3]; by: int64[b, 2]. The same as padding with repeated edges and cropping at pad + by.
    """
    b, h, w = pictures.shape[:3]
    rows, columns = (torch.arange(n, device=by.device) for n in (h, w))
    rows, columns = (rows + by[:, :1]).clamp(0, h - 1), (columns + by[:, 1:]).clamp(0, w - 1)
    return pictures[torch.arange(b, device=by.device)[:, None, None], rows[:, :, None], columns[:, None, :]]


def brighter(x: Tensor, factor: Tensor) -> Tensor:
    """float32[b, h, w, 3] in [0, 1], times the factor float32[b, 1, 1, 1]."""
    return (x * factor).clamp_(0, 1)


def contrasted(x: Tensor, factor: Tensor) -> Tensor:
    """Away from the picture's mean grey, or towards it; as `brighter`."""
    return _mixed(x, _grey(x).mean((1, 2, 3), keepdim=True), factor)


def saturated(x: Tensor, factor: Tensor) -> Tensor:
    """Away from each pixel's grey, or towards it; as `brighter`."""
    return _mixed(x, _grey(x), factor)


def turned(x: Tensor, by: Tensor) -> Tensor:
    """Hue turned by a share of the circle, in HSV: channel c of a pixel is v − v·s·max(0, min(k, 4 − k, 1)) with
    k = (n_c + 6·hue) mod 6 and n = 5, 3, 1 for red, green, blue."""
    red, green, blue = x.unbind(-1)
    most, least = x.amax(-1), x.amin(-1)
    chroma = most - least
    safe = torch.where(chroma > 0, chroma, 1)
    sixth = torch.where(
        most == red,
        (green - blue) / safe,
        torch.where(most == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    places = torch.arange(5, 0, -2, device=x.device)
    k = (places + (sixth + 6 * by.squeeze(-1)).unsqueeze(-1)) % 6
    return most.unsqueeze(-1) - chroma.unsqueeze(-1) * torch.minimum(k, 4 - k).clamp(0, 1)


COLOURS = {"brightness": brighter, "contrast": contrasted, "saturation": saturated, "hue": turned}


def _mixed(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (factor * x + (1 - factor) * other).clamp_(0, 1)


def _grey(x: Tensor) -> Tensor:
    return (x * x.new_tensor(LUMA)).sum(-1, keepdim=True)
