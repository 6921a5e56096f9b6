"""Images and prompts to the tensors of GR00T's backbone (Qwen3-VL): what runs on the host before the first layer.

`QwenInputs` is the released model's: its chat template, its tokenizer, its picture geometry. `HashInputs` needs no
file: the tiny size and random weights use it. Both return input_ids and attention_mask int64[b, l], pixel_values
float32[b·images·patches, 3·2·16²], image_grid_thw int64[b·images, 3] (on the host), images of one sample adjacent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from serl_launcher.policies.groot.prompts import PromptRows, left_padded
from serl_launcher.policies.hub import is_offline
from serl_launcher.policies.tokens import WordHashTokenizer
from serl_launcher.policies.transfer import joined, to_device

PATCH, MERGE = 16, 2
PAD_TO = 16  # tokens; padding is masked, so it changes nothing but the number of shapes


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a camera's picture becomes the model's: letter box, resize, centre crop, resize."""

    target: tuple[int, int] | None = (256, 256)  # h, w of the result; None: as the camera gives it
    crop: tuple[int, int] | None = (230, 230)  # of a picture of the target's size
    crop_fraction: float | None = None  # wins over `crop`
    shortest_edge: int | None = None  # of the first resize; None: the target's height
    letter_box: bool = False  # pad to a square first
    albumentations: bool = False  # the checkpoint was trained through cv2 (INTER_AREA, aspect kept)

    @property
    def on_host(self) -> bool:
        """Whether pictures are cut before they go to the device: cv2 knows no other place."""
        return self.albumentations and self.target is not None

    def apply(self, images: Tensor) -> Tensor:
        """uint8[n, 3, h, w] of one size to uint8[n, 3, h', w']."""
        if self.target is None:
            return images
        if self.albumentations:
            return self._by_cv2(images)
        if self.letter_box:
            images = _squared(images)
        edge = self.shortest_edge or self.target[0]
        images = _bicubic(images, (edge, edge))
        share = self.crop_fraction if self.crop_fraction or not self.crop else self.crop[0] / self.target[0]
        if share and share < 1:
            h, w = (max(1, round(side * share)) for side in images.shape[-2:])
            top, left = (images.shape[-2] - h) // 2, (images.shape[-1] - w) // 2
            images = images[..., top : top + h, left : left + w]
        return _bicubic(images, self.target)

    def _by_cv2(self, images: Tensor) -> Tensor:
        from lerobot.policies.groot.processor_groot import _transform_n1_7_image_for_vlm_albumentations as transform

        options = {
            "image_crop_size": list(self.crop) if self.crop else None,
            "image_target_size": list(self.target),
            "shortest_image_edge": self.shortest_edge,
            "crop_fraction": self.crop_fraction,
            "letter_box_transform": self.letter_box,
        }
        frames = [transform(image, **options) for image in images.permute(0, 2, 3, 1).numpy()]
        return torch.as_tensor(np.stack(frames)).permute(0, 3, 1, 2)


def _squared(images: Tensor) -> Tensor:
    h, w = images.shape[-2:]
    side = max(h, w)
    top, left = (side - h) // 2, (side - w) // 2
    return nn.functional.pad(images, (left, side - w - left, top, side - h - top))


def _bicubic(images: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional

    return functional.resize(images, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True)


@dataclass(frozen=True, slots=True)
class PatchRule:
    """Pictures to patch rows by the numbers of a preprocessor_config.json, as `Qwen2VLImageProcessor` does it."""

    patch: int  # pixels along a patch's side
    merge: int  # patches along a token's side
    frames: int  # a still image is a video of so many
    pixels: tuple[int, int]  # least and most of a picture
    mean: tuple[float, ...]  # in bytes, a channel
    std: tuple[float, ...]

    @staticmethod
    def of(processor: Any, source: str) -> PatchRule:
        """Of the library's processor. Raises ValueError where it leaves out a step."""
        left_out = [step for step in ("do_resize", "do_rescale", "do_normalize") if not getattr(processor, step)]
        if left_out:
            raise ValueError(f"policy.processor={source}: {left_out[0]} is false in preprocessor_config.json, not true")
        scale = 1 / processor.rescale_factor
        mean, std = (tuple(scale * float(x) for x in values) for values in (processor.image_mean, processor.image_std))
        pixels = (int(processor.size["shortest_edge"]), int(processor.size["longest_edge"]))
        return PatchRule(processor.patch_size, processor.merge_size, processor.temporal_patch_size, pixels, mean, std)

    def resize(self, images: Tensor) -> Tensor:
        """uint8[..., 3, h, w] to sides that whole tokens fill, within the least and the most pixels."""
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        least, most = self.pixels
        return _bicubic(images, smart_resize(*images.shape[-2:], self.patch * self.merge, least, most))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of a picture's patches."""
        return height // self.patch, width // self.patch

    def patches(self, images: Tensor) -> Tensor:
        """uint8[..., 3, h, w] to float32[..., h·w / patch², 3·frames·patch²]."""
        mean, std = (_channels(values, images.device) for values in (self.mean, self.std))
        pixels = images.flatten(0, -4).float().sub_(mean).div_(std)
        rows = patches(pixels, self.patch, self.merge, self.frames)
        return rows.view(*images.shape[:-3], -1, rows.shape[-1])


@lru_cache(64)
@torch.inference_mode(False)  # kept for training too
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)[:, None, None]


def by_size(
    images: Mapping[str, np.ndarray], cameras: Sequence[str], device: torch.device, change: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """`change` of every camera's pictures, cameras of one size as one batch: [b, ...] each, in the cameras' order.

    images: uint8[b, h, w, 3] per camera; change: of uint8[n, 3, h, w] on the device, n rows to n rows.
    """
    out: dict[str, Tensor] = {}
    sizes = {camera: images[camera].shape for camera in cameras}
    for _, group in groupby(sorted(cameras, key=sizes.__getitem__), sizes.__getitem__):
        names = list(group)
        changed = change(joined([images[name] for name in names], device).permute(0, 3, 1, 2))
        out |= zip(names, changed.split(len(images[names[0]])), strict=True)
    return [out[camera] for camera in cameras]


class QwenInputs:
    """The released model's processor.

    source: folder or hub name with the tokenizer's files and preprocessor_config.json; cameras: in the checkpoint's
    order; formalize: lower case and no punctuation, as the checkpoint was trained; frames: pictures a camera, the same
    one repeated where the checkpoint saw a history.
    """

    def __init__(
        self, source: str, cameras: tuple[str, ...], geometry: Geometry, formalize: bool = True, frames: int = 1
    ) -> None:
        from transformers import AutoTokenizer, Qwen2VLImageProcessor

        offline = is_offline(source)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=offline, trust_remote_code=False)
            self.pictures = Qwen2VLImageProcessor.from_pretrained(source, local_files_only=offline)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"policy.processor={source}: cannot be loaded ({str(error).splitlines()[0]}); name a folder that holds "
                "tokenizer.json, tokenizer_config.json and preprocessor_config.json of the backbone"
            ) from None
        if not self.tokenizer.chat_template or self.tokenizer.pad_token_id is None:
            lacks = "padding token" if self.tokenizer.chat_template else "chat template"
            raise ValueError(f"policy.processor={source}: its tokenizer has no {lacks}")
        self.tokenizer.padding_side = "left"
        self.source, self.cameras, self.geometry = source, cameras, geometry
        self.formalize, self.frames = formalize, frames
        self.rule = PatchRule.of(self.pictures, source)
        self._ids, self._rows = lru_cache(4096)(self._encode), PromptRows(self._pad)

    def __call__(self, images: dict[str, np.ndarray], prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        """images: uint8[b, h, w, 3] per camera. `device`: where pictures are worked on."""
        host = torch.device("cpu") if self.geometry.on_host else device
        cut = by_size(images, self.cameras, host, self.geometry.apply)
        seen = [self.rule.resize(to_device(pictures, device)) for pictures in cut]
        order = list(range(len(self.cameras))) * self.frames
        grids = [self.rule.grid(*seen[k].shape[-2:]) for k in order]
        tokens = tuple(rows * columns // self.rule.merge**2 for rows, columns in grids)
        return self._rows(prompts, device, tokens) | {
            "pixel_values": self._patches(seen, order),
            "image_grid_thw": torch.tensor([[1, *grid] for grid in grids] * len(prompts)),
        }

    def _patches(self, seen: list[Tensor], order: list[int]) -> Tensor:
        """The patch rows of all pictures, those of one sample adjacent."""
        if len({pictures.shape for pictures in seen}) == 1:
            return self.rule.patches(torch.stack([seen[k] for k in order], dim=1).flatten(0, 1)).flatten(0, 1)
        rows = [self.rule.patches(pictures) for pictures in seen]
        return torch.cat([rows[k] for k in order], dim=1).flatten(0, 1)

    def _pad(self, prompts: tuple[str, ...], counts: tuple[int, ...]) -> dict[str, Tensor]:
        return left_padded([self._ids(prompt, counts) for prompt in prompts], self.tokenizer.pad_token_id, PAD_TO)

    def _encode(self, prompt: str, counts: tuple[int, ...]) -> list[int]:
        return self.tokenizer(self._text(prompt, counts))["input_ids"]

    def _text(self, prompt: str, counts: tuple[int, ...]) -> str:
        """One sample's chat, every picture's token repeated as often as the picture has tokens."""
        from lerobot.policies.groot.utils import prepare_n1_7_language_batch

        (words,) = prepare_n1_7_language_batch([prompt], 1, formalize_language=self.formalize)
        content = [{"type": "image"} for _ in counts] + [{"type": "text", "text": words}]
        text = self.tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        token = getattr(self.tokenizer, "image_token", "<|image_pad|>")
        pieces = text.split(token)
        if len(pieces) != len(counts) + 1:
            found = len(pieces) - 1
            raise ValueError(f"policy.processor={self.source}: its chat template has {found} of {len(counts)} pictures")
        return "".join(piece + token * n for piece, n in zip(pieces, [*counts, 0], strict=True))


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Ids of Qwen3-VL's tokens around a picture."""

    image: int
    start: int
    end: int
    words: int  # ids below it may stand for words


class HashInputs:
    """Square pictures of one size, and hashed words instead of a vocabulary file."""

    def __init__(self, cameras: tuple[str, ...], image_size: int, prompt_tokens: int, tokens: SpecialTokens) -> None:
        self.cameras, self.image_size, self.tokens = cameras, image_size, tokens
        self.tokenizer = WordHashTokenizer(tokens.words, prompt_tokens)
        self._rows = PromptRows(self._make)

    def __call__(self, images: dict[str, np.ndarray], prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        """images: uint8[b, h, w, 3] per camera."""
        views = by_size(images, self.cameras, device, self._resize)
        grid = self.image_size // PATCH
        return self._rows(prompts, device) | {
            "pixel_values": patches(torch.stack(views, dim=1).flatten(0, 1)).flatten(0, 1),
            "image_grid_thw": torch.tensor([[1, grid, grid]] * (len(prompts) * len(self.cameras))),
        }

    def _make(self, prompts: tuple[str, ...]) -> dict[str, Tensor]:
        words, mask = self.tokenizer(list(prompts))
        one = [self.tokens.start, *[self.tokens.image] * (self.image_size // PATCH // MERGE) ** 2, self.tokens.end]
        pictures = torch.tensor(one * len(self.cameras)).expand(len(prompts), -1)
        return {
            "input_ids": torch.cat([pictures, words], dim=1),
            "attention_mask": torch.cat([torch.ones_like(pictures), mask.long()], dim=1),
        }

    def _resize(self, images: Tensor) -> Tensor:
        pixels = images.float().div_(127.5).sub_(1)
        side = (self.image_size, self.image_size)
        if pixels.shape[-2:] != side:
            pixels = nn.functional.interpolate(pixels, side, mode="bilinear", antialias=True, align_corners=False)
        return pixels


def patches(pixels: Tensor, patch: int = PATCH, merge: int = MERGE, frames: int = 2) -> Tensor:
    """float32[n, 3, h, w] to Qwen-VL's patch rows float32[n, h·w / patch², 3·frames·patch²]: the merge × merge patches
    of a token adjacent, each picture as so many equal frames along time."""
    n, c, h, w = pixels.shape
    x = pixels.reshape(n, c, h // (patch * merge), merge, patch, w // (patch * merge), merge, patch)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)  # n, gh, gw, mh, mw, c, ph, pw
    x = x.unsqueeze(6).expand(*x.shape[:6], frames, *x.shape[6:])  # time beside the channel
    return x.reshape(n, -1, c * frames * patch * patch)


def has_processor(folder: Path) -> bool:
    """Whether a folder holds what `QwenInputs` needs."""
    return (folder / "preprocessor_config.json").is_file() and (folder / "tokenizer_config.json").is_file()
