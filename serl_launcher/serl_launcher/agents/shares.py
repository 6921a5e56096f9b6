"""A step's batch in equal shares, one a rank: what a loss draws or averages over the whole batch. Agents call it.

Every rank's generator stands at the same place. What belongs to rows of the batch is drawn for the rows of all ranks,
and each takes its own: n ranks draw what one would for the same batch. A mean of means over equal shares is the mean,
so a loss that is a plain mean needs nothing more; what divides by a mean, or remembers rows, asks here for everyone's.

    rank 0   [ rows 0 … b−1 ]         the shares stand one behind the other, in the order of the ranks
    rank 1   [ rows b … 2b−1 ]

With one rank, and outside `sharing`, each function is the plain draw.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.distributed as dist
from torch import Tensor

from serl_launcher.policies.base import sample_times

_SHARE: ContextVar[tuple[int, int]] = ContextVar("share", default=(0, 1))  # rank, ranks


@contextmanager
def sharing(rank: int, ranks: int) -> Iterator[None]:
    """Inside, batches are the share of this rank among so many; the learner's step opens it."""
    token = _SHARE.set((rank, ranks))
    try:
        yield
    finally:
        _SHARE.reset(token)


def mine(everyones: Tensor, axis: int = 0) -> Tensor:
    """This rank's share of what is given for all rows. ValueError where the rows cannot be shared equally."""
    rank, ranks = _SHARE.get()
    rows = everyones.shape[axis]
    if rows % ranks:
        raise ValueError(f"{rows} rows cannot be shared equally by {ranks} ranks")
    return everyones.narrow(axis, rank * (rows // ranks), rows // ranks) if ranks > 1 else everyones


def rows_of_all(mine: int) -> int:
    """Rows of the whole batch, of which this rank has so many."""
    return mine * _SHARE.get()[1]


def normal(shape: Sequence[int], device: torch.device, axis: int = 0) -> Tensor:
    """Standard normal float32[shape]; `axis` is that of the batch's rows."""
    return mine(torch.randn(_whole(shape, axis), device=device), axis)


def uniform(shape: Sequence[int], device: torch.device) -> Tensor:
    """Between 0 and 1, float32[shape], rows first."""
    return mine(torch.rand(_whole(shape, 0), device=device))


def times(b: int, device: torch.device) -> Tensor:
    """Flow times as `policies.base.sample_times`: float32[b]."""
    return mine(sample_times(rows_of_all(b), device=device))


@torch.no_grad()
def mean_of_all(mean: Tensor) -> Tensor:
    """The mean over the whole batch from that over this rank's share, a scalar without gradient."""
    _, ranks = _SHARE.get()
    return mean if ranks == 1 else everyones(mean.detach().reshape(1)).mean()


@torch.no_grad()
def everyones(mine: Tensor) -> Tensor:
    """The rows of all ranks, from this rank's: [b, …] to [ranks · b, …]."""
    _, ranks = _SHARE.get()
    if ranks == 1:
        return mine
    sent = mine.contiguous()
    sent = sent.view(torch.uint8) if sent.dtype == torch.bool else sent
    found = [torch.empty_like(sent) for _ in range(ranks)]
    dist.all_gather(found, sent)
    return torch.cat(found).view(mine.dtype)


def _whole(shape: Sequence[int], axis: int) -> list[int]:
    return [n * _SHARE.get()[1] if k == axis else n for k, n in enumerate(shape)]
