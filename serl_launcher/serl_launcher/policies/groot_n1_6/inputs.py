"""Pictures and prompts to the tensors of Eagle 3: what runs on the host before the first layer of GR00T N1.6.

`Eagle3Inputs` is the released model's: chat, tokenizer, picture geometry. `Eagle3HashInputs` needs no file: the tiny
size and random weights use it. Both return input_ids and attention_mask int64[b, l] and of camera k, in order,
pixel_values_<k> float32[b, 3, h, w] in [−1, 1], sides multiples of 28. Facts: Isaac-GR00T n1.6,
gr00t/model/gr00t_n1d6/processing_gr00t_n1d6.py, image_augmentations.py and the processor of Eagle-Block2A-2B-v2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from serl_launcher.policies.groot.inputs import PAD_TO
from serl_launcher.policies.groot.prompts import left_padded
from serl_launcher.policies.groot_n1_5.inputs import END, IMAGE, START, SYSTEM, EagleHashInputs, EagleInputs
from serl_launcher.policies.transfer import to_device

UNIT = 28  # pixels along a token's side: 2 patches of 14
LEAST, MOST = 4 * UNIT**2, 4096 * UNIT**2  # pixels of a picture, as Eagle's processor bounds them


@dataclass(frozen=True, slots=True)
class Pictures:
    """How a camera's picture becomes the model's: NVIDIA's evaluation transform (cv2, aspect kept), then Eagle's sides
    of 28. The fields are keys of processor_config.json."""

    shortest_image_edge: int | None = 256
    crop_fraction: float | None = 0.95
    image_target_size: tuple[int, int] | None = None  # its height is the edge, where that is None
    image_crop_size: tuple[int, int] | None = None  # over the target's is the fraction, where that is None

    @staticmethod
    def of(keywords: Mapping[str, Any]) -> Pictures:
        """From `processor_kwargs`, the release's where there are none. Raises ValueError naming what cannot be used."""
        if not keywords:
            return Pictures()
        if not keywords.get("use_albumentations"):
            raise ValueError("processor_config.json: use_albumentations: only true is read, as GR00T N1.6 is released")
        given = {field.name: keywords.get(field.name) for field in fields(Pictures)}
        sizes = {key: tuple(map(int, given[key][:2])) for key in ("image_target_size", "image_crop_size") if given[key]}
        pictures = Pictures(**given | sizes)
        if len(sizes) < 2 and not (pictures.shortest_image_edge and pictures.crop_fraction):
            raise ValueError(f"processor_config.json: no size of pictures can be told from {given}")
        return pictures

    def keywords(self) -> dict[str, Any]:
        """The inverse of `of`."""
        return asdict(self) | {"use_albumentations": True}

    def apply(self, images: np.ndarray) -> np.ndarray:
        """uint8[n, h, w, 3] of one camera to uint8[n, h', w', 3]."""
        from lerobot.policies.groot.processor_groot import _transform_n1_7_image_for_vlm_albumentations as transform

        edge = self.shortest_image_edge or self.image_target_size[0]
        options = {
            "image_crop_size": list(self.image_crop_size) if self.image_crop_size else None,
            "image_target_size": list(self.image_target_size or (edge, edge)),
            "shortest_image_edge": edge,
            "crop_fraction": self.crop_fraction,
        }
        return _to_unit(np.stack([transform(image, **options) for image in images]))


def _to_unit(images: np.ndarray) -> np.ndarray:
    """Sides to the nearest multiple of 28 by PIL's bicubic filter, within the bounds on a picture's pixels."""
    from PIL import Image

    height, width = sides(*images.shape[1:3])
    if images.shape[1:3] == (height, width):
        return images
    return np.stack([np.asarray(Image.fromarray(image).resize((width, height))) for image in images])


def sides(height: int, width: int) -> tuple[int, int]:
    """Height and width that Eagle's processor gives a picture."""
    h, w = (max(UNIT, round(side / UNIT) * UNIT) for side in (height, width))
    if h * w > MOST:
        share = math.sqrt(h * w / MOST)
        return math.floor(h / share / UNIT) * UNIT, math.floor(w / share / UNIT) * UNIT
    if h * w < LEAST:
        share = math.sqrt(LEAST / (height * width))
        return math.ceil(height * share / UNIT) * UNIT, math.ceil(width * share / UNIT) * UNIT
    return h, w


class Eagle3Inputs(EagleInputs):
    """The released model's processor.

    source: folder of the tokenizer's files; cameras: in the checkpoint's order; formalize: lower case and no
    punctuation, as the checkpoint was trained.
    """

    backbone: ClassVar[str] = "Eagle-Block2A-2B-v2"

    def __init__(self, source: str, cameras: tuple[str, ...], pictures: Pictures, formalize: bool = True) -> None:
        super().__init__(source, cameras, pictures)
        self.formalize = formalize

    def __call__(self, images: dict[str, np.ndarray], prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        """images: uint8[b, h, w, 3] per camera."""
        views = [self.pictures.apply(images[camera]) for camera in self.cameras]
        counts = tuple(view.shape[1] * view.shape[2] // UNIT**2 for view in views)
        pixels = [to_device(view, device).permute(0, 3, 1, 2).float().div(127.5).sub(1) for view in views]
        return self._rows(prompts, device, counts) | {f"pixel_values_{k}": view for k, view in enumerate(pixels)}

    def _pad(self, prompts: tuple[str, ...], counts: tuple[int, ...]) -> dict[str, Tensor]:
        return left_padded([self._row(prompt, counts) for prompt in prompts], self.tokenizer.pad_token_id, PAD_TO)

    def _encode(self, prompt: str, counts: tuple[int, ...]) -> list[int]:
        return self.tokenizer(self.text(prompt, counts))["input_ids"]

    def text(self, prompt: str, counts: tuple[int, ...]) -> str:
        """One sample's chat, the words before the pictures. counts: tokens of each picture."""
        from lerobot.policies.groot.utils import prepare_n1_7_language_batch

        (words,) = prepare_n1_7_language_batch([prompt], 1, formalize_language=self.formalize)
        pictures = (f"<image {k}>{START}{IMAGE * count}{END}" for k, count in enumerate(counts, start=1))
        return f"{SYSTEM}<|im_start|>user\n{words}{''.join(pictures)}<|im_end|>\n"

    def describe(self, folder: Path) -> dict[str, Any]:
        """What processor_config.json says of it; the tokenizer's files go into processor/."""
        self.tokenizer.save_pretrained(folder / "processor")
        return self.pictures.keywords() | {"formalize_language": self.formalize}


class Eagle3HashInputs(EagleHashInputs):
    """Square pictures of one size, and hashed words instead of a vocabulary file."""

    patch: ClassVar[int] = UNIT

    def __call__(self, images: dict[str, np.ndarray], prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        """images: uint8[b, h, w, 3] per camera."""
        tensors = super().__call__(images, prompts, device)
        views = tensors.pop("pixel_values").unflatten(0, (len(prompts), len(self.cameras))).unbind(1)
        return tensors | {f"pixel_values_{k}": view for k, view in enumerate(views)}

    def describe(self, folder: Path) -> dict[str, Any]:
        """As of `Eagle3Inputs`: pictures of this size, whole."""
        return Pictures(self.pictures.side, 1.0).keywords()
