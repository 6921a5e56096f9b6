"""Prompt tokenizers. The tiny policies use one that needs no vocabulary file; the full ones load their own."""

from __future__ import annotations

import logging
import zlib
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from serl_launcher.policies.hub import is_offline
from serl_transport.contract.bounds import shown

log = logging.getLogger("policy")
MULTIPLE = 16  # tokens that a prompt is padded to a multiple of


class Tokenizer(Protocol):
    """What every tokenizer answers."""

    length: int  # tokens that the policy reads of a prompt

    def __call__(self, prompts: list[str], least: int = 0) -> tuple[Tensor, Tensor]:
        """Token ids int64[b, l] and mask bool[b, l]; a longer prompt loses its tail, and the log says so once.

        least: tokens that are padded up to in any case, so that prompts of one form have one length.
        """
        ...

    def count(self, prompt: str) -> int:
        """Tokens of the whole prompt."""
        ...


def within(tokenizer: Tokenizer, before: str, text: str, behind: str) -> str:
    """`text`, cut by whole words so that the prompt `before + text + behind` loses nothing else. The log says so once.

    ValueError when the prompt is too long without any text.
    """
    words = text.split(" ")
    if tokenizer.count(before + text + behind) <= tokenizer.length:
        return text
    fits = [n for n in range(len(words)) if tokenizer.count(before + " ".join(words[:n]) + behind) <= tokenizer.length]
    if not fits:
        raise ValueError(
            f"prompt: {tokenizer.count(before + behind)} tokens before any task text (the state is in it), the policy "
            f"reads {tokenizer.length}: a policy of more prompt tokens is needed (policy.size.prompt_tokens)"
        )
    kept = " ".join(words[: fits[-1]])
    _tell_cut(text, tokenizer.count(before + text + behind), tokenizer.length, kept)
    return kept


@lru_cache(4096)
def _tell_cut(text: str, tokens: int, length: int, kept: str | None = None) -> None:
    """Once per text: a warning of what the policy does not read."""
    rest = "its tail is cut off"
    if kept is not None:
        rest = f"the text behind {shown(kept[-40:])} is cut off, the state is read whole"
    log.warning(
        "prompt of %d tokens, the policy reads %d: %s (%s); say it shorter, or set policy.size.prompt_tokens where "
        "weights begin at random", tokens, length, rest, shown(text),
    )  # fmt: skip


class WordHashTokenizer:
    """Each word of a prompt to one of `vocab − 2` ids by its CRC-32: stable over processes, nothing to download.

    Id 0 is padding; the last id stays free for PaliGemma's image token.
    """

    def __init__(self, vocab: int, length: int) -> None:
        self.vocab, self.length = vocab, length

    def __call__(self, prompts: list[str], least: int = 0) -> tuple[Tensor, Tensor]:
        """As `Tokenizer`; every prompt is padded to `length`."""
        ids = torch.zeros(len(prompts), self.length, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            words = prompt.lower().split()
            if len(words) > self.length:
                _tell_cut(prompt, len(words), self.length)
            for column, word in enumerate(words[: self.length]):
                ids[row, column] = self._id(word)
        return ids, ids != 0

    def count(self, prompt: str) -> int:
        return len(prompt.split())

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

    Padding goes to the longest prompt of a batch, rounded up to MULTIPLE: masked tokens change nothing but the time.
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

    def __call__(self, prompts: list[str], least: int = 0) -> tuple[Tensor, Tensor]:
        """As `Tokenizer`."""
        out = self._encode(prompts)
        counts = out["attention_mask"].sum(1).tolist()
        if max(counts) > self.length:
            for prompt, tokens in zip(prompts, counts, strict=True):
                if tokens > self.length:
                    _tell_cut(prompt, tokens, self.length)
            out = self._encode(prompts, max_length=self.length, truncation=True)
        ids, mask = out["input_ids"], out["attention_mask"]
        if (missing := -(-least // MULTIPLE) * MULTIPLE - ids.shape[1]) > 0:
            ids, mask = F.pad(ids, (0, missing), value=self.tokenizer.pad_token_id), F.pad(mask, (0, missing))
        return ids[:, : self.length], mask[:, : self.length].bool()

    def count(self, prompt: str) -> int:
        return len(self.tokenizer(prompt)["input_ids"])

    def _encode(self, prompts: list[str], **cut: Any) -> Any:
        shape = dict(padding="longest", pad_to_multiple_of=min(MULTIPLE, self.length), padding_side="right")
        return self.tokenizer(prompts, return_tensors="pt", **shape, **cut)
