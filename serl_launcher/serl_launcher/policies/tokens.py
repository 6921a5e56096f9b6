"""Prompt tokenizers. The tiny policies use one that needs no vocabulary file; the full ones load their own."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import torch
from torch import Tensor


class WordHashTokenizer:
    """Each word of a prompt to one of `vocab − 2` ids by its CRC-32: stable over processes, nothing to download.

    Id 0 is padding; the last id stays free for PaliGemma's image token.
    """

    def __init__(self, vocab: int, length: int) -> None:
        self.vocab, self.length = vocab, length

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids int64[b, l] and mask bool[b, l]; longer prompts lose their tail."""
        ids = torch.zeros(len(prompts), self.length, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            words = prompt.lower().split()[: self.length]
            for column, word in enumerate(words):
                ids[row, column] = self._id(word)
        return ids, ids != 0

    def _id(self, word: str) -> int:
        return 1 + zlib.crc32(word.encode()) % (self.vocab - 2)


class StateWordTokenizer(WordHashTokenizer):
    """For prompts that carry a state as numbers: 0 … 255 keep an id of their own, other words are hashed above them."""

    def __init__(self, vocab: int, length: int) -> None:
        if vocab < 300:
            raise ValueError(f"policy.size.vocabulary: expected at least 300 (256 state bins and words), got {vocab}")
        super().__init__(vocab, length)

    def _id(self, word: str) -> int:
        word = word.strip(":;,")
        if word.isdigit() and int(word) < 256:
            return 1 + int(word)
        return 257 + zlib.crc32(word.encode()) % (self.vocab - 258)


class HubTokenizer:
    """A Hugging Face tokenizer from a local folder or the local hub cache, padded on the right.

    Padding goes to the longest prompt of a batch, rounded up to 16: masked tokens change nothing but the time.
    """

    def __init__(self, source: str, length: int) -> None:
        from transformers import AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(
                source, local_files_only=is_offline(source), trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"policy.tokenizer={source}: cannot be loaded ({str(error).splitlines()[0]}); "
                "name a folder that holds tokenizer.json and tokenizer_config.json"
            ) from None
        self.source, self.length = source, length

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids int64[b, l] and mask bool[b, l]; longer prompts lose their tail, as in training."""
        out = self.tokenizer(
            prompts,
            max_length=self.length,
            truncation=True,
            padding="longest",
            pad_to_multiple_of=min(16, self.length),
            padding_side="right",
            return_tensors="pt",
        )
        return out["input_ids"][:, : self.length], out["attention_mask"][:, : self.length].bool()


def is_offline(source: str) -> bool:
    """Whether `source` must be found on this machine: a path, or HF_HUB_OFFLINE is set."""
    return Path(source).exists() or os.environ.get("HF_HUB_OFFLINE") == "1"
