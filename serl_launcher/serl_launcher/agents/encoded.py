"""Transitions as a frozen backbone and a frozen flow have encoded them, and a memory of the newest ones.

DSRL owns a `Memory`: what a frozen flow made of a transition stays true, so that one costly pass serves many samples of
the small networks.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from serl_launcher.agents import shares


@dataclass(frozen=True, slots=True)
class Encoded:
    """b transitions on the device, without gradient; names as in `replay.transitions.TransitionBatch`."""

    features: Tensor  # float32[b, f], pooled
    chunk: Tensor  # float32[b, h, robot dims], executed, the model's units
    is_pad: Tensor  # bool[b, h]
    reward: Tensor  # float32[b]
    discount: Tensor  # float32[b]
    bootstrap: Tensor  # bool[b]
    value_lower_bound: Tensor  # float32[b]
    next_features: Tensor  # float32[b, f]
    next_chunk: Tensor  # float32[b, h, robot dims], what the policy of that moment would do next
    w: Tensor  # float32[b, rows, ad], a noise
    w_chunk: Tensor  # float32[b, h, robot dims], what the flow makes of it

    def __len__(self) -> int:
        return len(self.features)

    def take(self, rows: Tensor | slice) -> "Encoded":
        """Some of the rows."""
        return Encoded(*(getattr(self, f.name)[rows] for f in fields(self)))

    def join(self, other: "Encoded") -> "Encoded":
        """These rows, then the other's."""
        return Encoded(*(torch.cat([getattr(self, f.name), getattr(other, f.name)]) for f in fields(self)))


class Memory:
    """The newest `size` encoded transitions, of all ranks: each holds them all, and draws its share of a batch."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._rows: Encoded | None = None

    def __len__(self) -> int:
        return 0 if self._rows is None else len(self._rows)

    def add(self, rows: Encoded) -> None:
        """The oldest make room. rows: this rank's."""
        rows = Encoded(*(shares.everyones(getattr(rows, f.name)) for f in fields(rows)))
        kept = rows if self._rows is None else self._rows.join(rows)
        self._rows = kept.take(slice(-self._size, None))

    def draw(self, n: int) -> "Encoded":
        """n of them, with replacement, over all ranks: this rank's share. ValueError where it is no equal one."""
        return self._rows.take(shares.mine(torch.randint(len(self), (n,), device=self._rows.features.device)))

    def clear(self) -> None:
        """Forget everything."""
        self._rows = None
