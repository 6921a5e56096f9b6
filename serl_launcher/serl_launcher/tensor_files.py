"""Safetensors files written tensor by tensor, so that a model is never in memory a second time for its own file.

    {name: Pending} ─▶ write_tensors: the header, then one tensor after another, each let go before the next is made

run.parameters (published versions, checkpoints of the trainer) and policies (a policy as a folder) write by it. The
library's own `save_file` wants every tensor of a file in memory at once: a policy that is exported would need room for
the weights that it holds and for those that it copies from its checkpoint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

DTYPES = {  # as the format spells them
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SPELLED = {dtype: spelled for spelled, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Pending:
    """A tensor of a file that is to be written: its place is known, its values are made when it is its turn."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        """A tensor that is there, on whichever device."""
        return cls(tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(path: Path, tensors: Mapping[str, Pending], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file. OSError when the disk refuses; ValueError naming a tensor that is not as announced."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # keeps every tensor aligned
    with path.open("wb") as file:
        file.write(_header(order, tensors, metadata))
        for name in order:
            file.write(raw_bytes(_made(name, tensors[name])))


def _header(order: list[str], tensors: Mapping[str, Pending], metadata: Mapping[str, str] | None) -> bytes:
    """Its length in eight bytes, then JSON: dtype, shape and place of every tensor; padded to a multiple of eight."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].nbytes
        entries[name] = {
            "dtype": SPELLED[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _made(name: str, pending: Pending) -> Tensor:
    tensor = pending.make().detach().cpu().contiguous()
    if (tensor.dtype, tuple(tensor.shape)) != (pending.dtype, pending.shape):
        got = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise ValueError(f"{name}: expected {pending.dtype} {pending.shape}, got {got}")
    return tensor


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the host, not copied."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; without a second tensor of its size, as `torch.isfinite` would make."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor.detach()))).all())
