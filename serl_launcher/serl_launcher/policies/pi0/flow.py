"""What the flow steps of PI0 and PI0.5 attend to and where their tokens stand; what all steps of a chunk share.

pi0.head calls these. Tokens of the action expert, behind the prefix's:

    PI0     [ state | actions of sample 1 | … | actions of sample n ]     PI0.5 has no state token
    sees      prefix, state      prefix, state, its own sample

The state's token sees no actions, so that its keys and values are the same at every step and for every sample. With
gradient (`velocity`) the samples of an observation stand behind one prefix row, as above, and a mask keeps them apart:
nothing of the prefix is kept several times for the backward pass. Without (`ready`) each has a copy of keys and values:
behind one another's they would be read and masked at every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from serl_launcher.policies.pi0.gemma import KeysValues, Modulation, Rotary


@dataclass(frozen=True, slots=True)
class Flow:
    """What the steps of one chunk share."""

    past: list[KeysValues]  # of each sample: prefix, state, and room that each step's actions are written into
    start: int  # the actions' first token in it
    rope: Rotary  # of the actions
    bias: Tensor  # float[b, 1, 1 or rows · heads, l], of the actions' attention
    time: Sequence[Tensor]  # a step: float32[width], the time as `_embed_time` has it
    norms: Sequence[Sequence[Modulation]]  # a step: of the expert's norms


def positions(pad_mask: Tensor, states: int, horizon: int, n: int) -> Tensor:
    """Places of the expert's tokens, behind those of the prefix that count: int64[b, states + n · horizon]."""
    device = pad_mask.device
    actions = states + torch.arange(horizon, device=device).repeat(n)
    places = torch.cat([torch.arange(states, device=device), actions]) if states else actions
    return pad_mask.sum(-1, keepdim=True) + places


def seen(pad_mask: Tensor, states: int, horizon: int, n: int, rows: slice) -> Tensor:
    """What the expert's tokens of these rows attend to: bool[b, rows, prefix + states + n · horizon], one row where all
    see the same."""
    b, own = len(pad_mask), states + n * horizon
    if n == 1 and rows.start == states:
        return torch.cat([pad_mask, pad_mask.new_ones(b, own)], dim=1)[:, None]
    sample = (torch.arange(own, device=pad_mask.device) - states).div(horizon, rounding_mode="floor")  # −1: the state
    among = (sample == -1) | (sample == sample[rows, None])
    before = pad_mask[:, None].expand(-1, len(among), -1)
    return torch.cat([before, among.expand(b, -1, -1)], dim=2)


def cut(past: Sequence[KeysValues], length: int) -> list[KeysValues]:
    """Keys and values of the first `length` tokens, without their room."""
    return [(keys[:, :, :length], values[:, :, :length]) for keys, values in past]


def repeated(past: Sequence[KeysValues], n: int) -> list[KeysValues]:
    """Keys and values of each row n times, one behind the other."""
    return [(keys.repeat_interleave(n, 0), values.repeat_interleave(n, 0)) for keys, values in past]


def room(past: Sequence[KeysValues], length: int, tokens: int) -> list[KeysValues]:
    """Keys and values with room for `tokens` in all, of which the first `length` are there: the same where it is."""
    return [tuple(_room(x, length, tokens) for x in pair) for pair in past]


def _room(x: Tensor, length: int, tokens: int) -> Tensor:
    if x.shape[2] >= tokens:
        return x
    wide = x.new_empty(*x.shape[:2], tokens, x.shape[3])
    wide[:, :, :length] = x[:, :, :length]
    return wide


def steps_of(norms: Sequence[Modulation], steps: int) -> list[Sequence[Modulation]]:
    """Modulations of all steps, float[steps, width] each, step by step; those of nothing conditioned serve all."""
    if norms[0][1] is None:
        return [norms] * steps
    parts = [tuple(part.unbind() for part in norm) for norm in norms]
    return [[tuple(part[k] for part in norm) for norm in parts] for k in range(steps)]
