"""Pictures and prompts to the tensors of Eagle 2.5: what runs on the host before the first layer of GR00T N1.5.

`EagleInputs` is the released model's: chat, tokenizer, picture geometry. `EagleHashInputs` needs no file: the tiny size
and random weights use it. Both return input_ids and attention_mask int64[b, l], pixel_values float32[b·images, 3, h, w]
in [−1, 1], images of one sample adjacent. Facts: Isaac-GR00T n1.5, gr00t/model/transforms.py and its Eagle processor.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from serl_launcher.policies.groot.inputs import PAD_TO, SpecialTokens, by_size
from serl_launcher.policies.groot.prompts import PromptRows, left_padded
from serl_launcher.policies.hub import is_offline
from serl_launcher.policies.tokens import WordHashTokenizer

PROCESSOR = "lerobot/eagle2hg-processor-groot-n1p5"  # a hub repository with the backbone's tokenizer
IMAGE, START, END = "<IMG_CONTEXT>", "<img>", "</img>"
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


@dataclass(frozen=True, slots=True)
class Pictures:
    """How a camera's picture becomes the model's."""

    side: int = 224  # pixels of the square result
    crop: float | None = 0.95  # share of height and width that is kept, in the middle; None: all
    bicubic: bool = False  # LeRobot's Eagle processor; else NVIDIA's bilinear

    def apply(self, images: Tensor) -> Tensor:
        """uint8[n, 3, h, w] of one size to float32[n, 3, side, side] in [−1, 1]."""
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional

        side = [self.side, self.side]
        if self.bicubic:
            images = functional.resize(images, side, interpolation=InterpolationMode.BICUBIC, antialias=True)
        else:  # theirs goes through floats and cuts off what is behind the last bit
            shares = images.float() / 255
            if self.crop:
                shares = functional.center_crop(shares, [int(length * self.crop) for length in images.shape[-2:]])
            shares = functional.resize(shares, side, interpolation=InterpolationMode.BILINEAR, antialias=True)
            images = (shares * 255).to(torch.uint8)
        return images.float().div(127.5).sub(1)


class EagleInputs:
    """The released model's processor.

    source: folder or hub name of the tokenizer's files; cameras: in the checkpoint's order; tokens: of a picture;
    quoted: the prompt stands as `['…']`, as LeRobot trained it (NVIDIA's fine-tuning has the bare text).
    """

    backbone: ClassVar[str] = "Eagle 2.5"

    def __init__(
        self, source: str, cameras: tuple[str, ...], pictures: Pictures, tokens: int = 256, quoted: bool = False
    ) -> None:
        from transformers import AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(
                source, local_files_only=is_offline(source), trust_remote_code=False, padding_side="left"
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"policy.processor={source}: cannot be loaded ({str(error).splitlines()[0]}); name a folder that holds "
                f"the tokenizer's files of {self.backbone} (vocab.json, merges.txt, tokenizer_config.json, "
                "added_tokens.json)"
            ) from None
        if self.tokenizer.pad_token_id is None:
            raise ValueError(f"policy.processor={source}: its tokenizer has no padding token")
        missing = [word for word in (IMAGE, START, END) if len(self._ids(word)) != 1]
        if missing:
            raise ValueError(
                f"policy.processor={source}: its tokenizer has no token {missing[0]}; it is not {self.backbone}'s"
            )
        self.source, self.cameras, self.pictures = source, cameras, pictures
        self.tokens, self.quoted = tokens, quoted  # tokens of a picture
        self._row, self._rows = lru_cache(4096)(self._encode), PromptRows(self._pad)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def expect_image_token(self, image_token: int) -> None:
        """Raise ValueError unless the tokenizer's picture token is the model's."""
        if self._ids(IMAGE) != [image_token]:
            got = self._ids(IMAGE)[0]
            raise ValueError(f"policy.processor={self.source}: its {IMAGE} is {got}, the checkpoint's is {image_token}")

    def __call__(self, images: dict[str, np.ndarray], prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        """images: uint8[b, h, w, 3] per camera. `device`: where pictures are worked on."""
        views = by_size(images, self.cameras, device, self.pictures.apply)
        return self._rows(prompts, device) | {"pixel_values": torch.stack(views, dim=1).flatten(0, 1)}

    def _pad(self, prompts: tuple[str, ...]) -> dict[str, Tensor]:
        return left_padded([self._row(prompt) for prompt in prompts], self.tokenizer.pad_token_id, PAD_TO)

    def _encode(self, prompt: str) -> list[int]:
        return self.tokenizer(self.text(prompt))["input_ids"]

    def text(self, prompt: str) -> str:
        """One sample's chat, as the model was trained."""
        pictures = (f"<image {k}>{START}{IMAGE * self.tokens}{END}" for k in range(1, len(self.cameras) + 1))
        words = str([prompt]) if self.quoted else prompt
        return f"{SYSTEM}<|im_start|>user\n{''.join(pictures)}{words}<|im_end|>\n<|im_start|>assistant\n"


class EagleHashInputs:
    """Square pictures of one size, and hashed words instead of a vocabulary file."""

    patch: ClassVar[int] = 14

    def __init__(self, cameras: tuple[str, ...], image_size: int, prompt_tokens: int, tokens: SpecialTokens) -> None:
        self.cameras, self.tokens = cameras, tokens
        self.pictures = Pictures(image_size, crop=None)
        self.tokenizer = WordHashTokenizer(tokens.words, prompt_tokens)
        self._rows = PromptRows(self._make)

    def __call__(self, images: dict[str, np.ndarray], prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        """images: uint8[b, h, w, 3] per camera."""
        views = by_size(images, self.cameras, device, self.pictures.apply)
        return self._rows(prompts, device) | {"pixel_values": torch.stack(views, dim=1).flatten(0, 1)}

    def _make(self, prompts: tuple[str, ...]) -> dict[str, Tensor]:
        words, mask = self.tokenizer(list(prompts))
        one = [self.tokens.start, *[self.tokens.image] * (self.pictures.side // self.patch) ** 2, self.tokens.end]
        ids = torch.tensor(one * len(self.cameras)).expand(len(prompts), -1)
        return {
            "input_ids": torch.cat([ids, words], dim=1),
            "attention_mask": torch.cat([torch.ones_like(ids), mask.long()], dim=1),
        }
