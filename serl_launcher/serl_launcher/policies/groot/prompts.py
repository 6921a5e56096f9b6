"""Token ids of prompts, made once: a robot says the same sentence at every tick.

groot.inputs and groot_n1_5.inputs own one `PromptRows` each. A batch of one prompt costs no tokenizer and no transfer
from its second time on; a batch of several is made anew of ids that are kept a prompt each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

Make = Callable[..., dict[str, Tensor]]
KEPT = 256  # prompts whose tensors stay on a device


class PromptRows:
    """`make(prompts, *layout)` for batches of prompts. make: tuples to int64[b, l] each, on the host; layout: whatever
    else decides them, hashable."""

    def __init__(self, make: Make) -> None:
        self._make, self._kept = make, lru_cache(KEPT)(self._keep)

    def __call__(self, prompts: Sequence[str], device: torch.device, *layout: Any) -> dict[str, Tensor]:
        """A row a prompt: on the device where all prompts are one, else on the host. Nobody writes into them."""
        if len(set(prompts)) > 1:
            return self._make(tuple(prompts), *layout)
        kept = self._kept(prompts[0], device, *layout)
        return {name: row.expand(len(prompts), -1) for name, row in kept.items()}

    @torch.inference_mode(False)  # kept for training and guidance, too
    def _keep(self, prompt: str, device: torch.device, *layout: Any) -> dict[str, Tensor]:
        # A copy that is waited for: whichever stream reads it later finds it whole.
        return {name: row.to(device) for name, row in self._make((prompt,), *layout).items()}


def left_padded(rows: Sequence[Sequence[int]], pad: int, multiple: int) -> dict[str, Tensor]:
    """input_ids and attention_mask int64[b, l]; l: the longest row's, rounded up to a multiple."""
    length = -(-max(len(row) for row in rows) // multiple) * multiple
    lines = [[pad] * (length - len(row)) + list(row) for row in rows]
    masks = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(lines), "attention_mask": torch.tensor(masks)}
