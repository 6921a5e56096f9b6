"""Images and prompts to the tensors of GR00T's backbone (Qwen3-VL): what runs on the host before the first layer.

`QwenInputs` is the released model's: its chat template, its tokenizer, its picture geometry. `HashInputs` needs no
file: the tiny size and random weights use it. Both return input_ids and attention_mask int64[b, l], pixel_values
float32[b·images·patches, 3·2·16²], image_grid_thw int64[b·images, 3] (on the host), images of one sample adjacent.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from serl_launcher.policies.hub import is_offline
from serl_launcher.policies.tokens import WordHashTokenizer
from serl_launcher.policies.transfer import to_device

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

    def apply(self, images: Tensor) -> Tensor:
        """uint8[n, 3, h, w] of one camera to uint8[n, 3, h', w']."""
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
        frames = [transform(image, **options) for image in images.permute(0, 2, 3, 1).cpu().numpy()]
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
        if not self.tokenizer.chat_template:
            raise ValueError(f"policy.processor={source}: its tokenizer has no chat template")
        self.tokenizer.padding_side = "left"
        self.source, self.cameras, self.geometry = source, cameras, geometry
        self.formalize, self.frames = formalize, frames

    def __call__(self, images: dict[str, np.ndarray], prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        """images: uint8[b, h, w, 3] per camera. `device`: where pictures are worked on."""
        per_camera = [
            list(self.geometry.apply(to_device(images[camera], device).permute(0, 3, 1, 2))) for camera in self.cameras
        ]
        pictures = [views[b] for b in range(len(prompts)) for _ in range(self.frames) for views in per_camera]
        seen = self.pictures(images=pictures, return_tensors="pt", device=str(device))
        grid = seen["image_grid_thw"].cpu()
        each = (grid.prod(-1) // self.pictures.merge_size**2).view(len(prompts), -1).tolist()
        words = self.tokenizer(
            [self._text(prompt, counts) for prompt, counts in zip(prompts, each, strict=True)],
            padding=True,
            pad_to_multiple_of=PAD_TO,
            return_tensors="pt",
        )
        tokens = {name: words[name] for name in ("input_ids", "attention_mask")}
        return tokens | {"pixel_values": seen["pixel_values"], "image_grid_thw": grid}

    def _text(self, prompt: str, counts: list[int]) -> str:
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

    def __call__(self, images: dict[str, np.ndarray], prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        """images: uint8[b, h, w, 3] per camera."""
        pixels = torch.stack([self._resize(to_device(images[c], device)) for c in self.cameras], dim=1).flatten(0, 1)
        grid = self.image_size // PATCH
        words, mask = self.tokenizer(prompts)
        one = [self.tokens.start, *[self.tokens.image] * (grid // MERGE) ** 2, self.tokens.end]
        pictures = torch.tensor(one * len(self.cameras)).expand(len(prompts), -1)
        return {
            "input_ids": torch.cat([pictures, words], dim=1),
            "attention_mask": torch.cat([torch.ones_like(pictures), mask.long()], dim=1),
            "pixel_values": patches(pixels),
            "image_grid_thw": torch.tensor([[1, grid, grid]]).expand(len(prompts) * len(self.cameras), -1),
        }

    def _resize(self, images: Tensor) -> Tensor:
        pixels = images.permute(0, 3, 1, 2).float().div(127.5).sub(1)
        side = (self.image_size, self.image_size)
        if pixels.shape[-2:] != side:
            pixels = nn.functional.interpolate(pixels, side, mode="bilinear", antialias=True, align_corners=False)
        return pixels


def patches(pixels: Tensor) -> Tensor:
    """float32[n, 3, h, w] to Qwen-VL's patch rows float32[n·h/16·w/16, 3·2·16·16]: blocks of 2 × 2 patches adjacent,
    each frame twice along time (a still image is a video of two frames there)."""
    n, c, h, w = pixels.shape
    x = pixels.view(n, c, h // (PATCH * MERGE), MERGE, PATCH, w // (PATCH * MERGE), MERGE, PATCH)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)  # n, gh, gw, mh, mw, c, ph, pw
    x = x.unsqueeze(6).expand(*x.shape[:6], 2, *x.shape[6:])  # time beside the channel
    return x.reshape(-1, c * 2 * PATCH * PATCH)


def has_processor(folder: Path) -> bool:
    """Whether a folder holds what `QwenInputs` needs."""
    return (folder / "preprocessor_config.json").is_file() and (folder / "tokenizer_config.json").is_file()
