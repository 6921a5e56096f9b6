"""What a piece of work would run on the card: a `Kernel` for each operation that launches one, and the counts.

card.fake makes a `Counts` and shows it every operation. Views, allocations and what runs on the host launch nothing.
Bytes are those of distinct elements read and written (a broadcast dimension is read once; of a table that is indexed,
the rows taken), FLOPs are torch's own formulas (torch.utils.flop_counter).
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

MATMUL = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "_addmm_activation", "addbmm")
ATTENTION = ("_scaled_dot_product", "_flash_attention", "_efficient_attention")
COPIES = ("clone", "copy_", "copy", "_to_copy", "constant_pad_nd", "slice_backward", "select_backward", "repeat")
CONCATENATIONS = ("cat", "stack")
REDUCTIONS = (
    *(
        "sum",
        "mean",
        "amax",
        "amin",
        "max",
        "min",
        "var",
        "std",
        "norm",
        "softmax",
        "logsumexp",
        "cumsum",
        "all",
        "any",
    ),
    *("native_layer_norm", "_softmax", "_fused_rms_norm", "linalg_vector_norm", "argmax", "native_group_norm"),
)
GATHERS = ("index", "index_select", "embedding", "gather", "index_put_", "embedding_dense_backward", "index_add")
RANDOM = ("randn", "rand", "uniform_", "normal_", "native_dropout", "bernoulli_", "randint", "randperm", "exponential_")
NOTHING = ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh")


@dataclass(slots=True)
class Kernel:
    """One operation on the card."""

    name: str  # aten's
    kind: str  # matmul, attention, cast, copy, concatenation, reduction, gather, random, optimizer, elementwise
    part: str  # of the policy, by the last parameter that was read
    layer: int  # of which call of a layer that can be compiled, 0: of none
    flops: int
    half: bool  # computed in bf16
    reads: list[tuple[int, int]]  # (storage, bytes)
    writes: list[tuple[int, int]]
    blocks: int = 0  # of threads that an attention has: less than the card has multiprocessors leaves some idle

    @property
    def bytes(self) -> int:
        """Read and written."""
        return sum(n for _, n in self.reads) + sum(n for _, n in self.writes)


@dataclass(slots=True)
class Attention:
    """One call of fused attention, as the kernel gets it."""

    query: tuple[int, ...]
    keys: tuple[int, ...]
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
    mask: torch.dtype | None


@dataclass(slots=True)
class Counts:
    """What one piece of work ran. parts: storage of a parameter -> part of the policy that it belongs to."""

    parts: dict[int, str] = field(default_factory=dict)
    kernels: list[Kernel] = field(default_factory=list)
    crossings: Counter[str] = field(default_factory=Counter)  # copies between devices, by direction
    crossed_bytes: int = 0
    reads: Counter[str] = field(default_factory=Counter)  # values that the host waited for, by operation
    attention: list[Attention] = field(default_factory=list)
    on_prefix: Counter[str] = field(default_factory=Counter)  # kinds of operations over the prefix's keys and values
    prefix_dtypes: set[torch.dtype] = field(default_factory=set)
    kept: int = 0  # bytes alive that were made inside
    layer: int = 0
    _part: str = "host"
    _names: dict[int, int] = field(default_factory=dict)  # storage -> a number that is never used twice
    _next: int = 0
    _prefix: set[int] = field(default_factory=set)

    @property
    def operations(self) -> int:
        return len(self.kernels)

    def kinds(self) -> dict[str, int]:
        """Operations by kind."""
        return dict(Counter(kernel.kind for kernel in self.kernels).most_common())

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Count what is done with these keys and values from here on."""
        for x in tensors:
            self._prefix.add(_key(x))
            self.prefix_dtypes.add(x.dtype)

    def note(self, function: Any, inputs: list[Tensor], outputs: list[Tensor], arguments: tuple, out: Any) -> None:
        """One operation has run on the card. inputs, outputs: its tensors there."""
        name = function._schema.name.removeprefix("aten::")
        outputs = outputs or _changed(function, arguments[0])
        made = {_key(x) for x in outputs}
        mutates = function._schema.is_mutable
        given = {_key(x) for x in inputs}
        for key in made - given:  # a storage at the address of an older one is another one
            self._names.pop(key, None)
            self._prefix.discard(key)
        self._keep(outputs, given)
        if (
            name in NOTHING
            or function.is_view
            or (made <= given and not mutates)
            or not any(map(Tensor.numel, outputs))
        ):
            return
        kind, keys = _kind(name, inputs, outputs), [_key(x) for x in inputs]
        self._part = next((self.parts[key] for key in keys if key in self.parts), self._part)
        self._note_prefix(kind, keys, outputs)
        done = _flops(function, kind, name, inputs, arguments, out)
        table = kind == "gather" and not mutates
        self.kernels.append(
            Kernel(
                name,
                kind,
                self._part,
                self.layer,
                done,
                any(x.dtype == torch.bfloat16 for x in inputs),
                [
                    (self._named(_key(x)), _bytes(outputs[0]) if table and k == 0 else _bytes(x))
                    for k, x in enumerate(inputs)
                ],
                [(self._named(_key(x)), _bytes(x)) for x in outputs],
                _blocks(name, inputs) if kind == "attention" else 0,
            )
        )

    def crossed(self, direction: str, x: Tensor) -> None:
        """A copy between host and card."""
        self.crossings[direction] += 1
        self.crossed_bytes += x.numel() * x.element_size()

    def _note_prefix(self, kind: str, keys: list[int], outputs: list[Tensor]) -> None:
        if self._prefix and not self._prefix.isdisjoint(keys):
            self.on_prefix[kind] += 1
            if kind in ("cast", "copy"):
                self._prefix.update(_key(x) for x in outputs)

    def _named(self, key: int) -> int:
        if key not in self._names:
            self._next += 1
            self._names[key] = self._next
        return self._names[key]

    def _keep(self, outputs: list[Tensor], given: set[int]) -> None:
        for x in outputs:
            if _key(x) not in given:
                storage = x.untyped_storage()
                size = storage.nbytes()
                self.kept += size
                weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.kept -= size


def _changed(function: Any, arguments: Sequence[Any]) -> list[Tensor]:
    """The tensors that an operation without a result writes."""
    written = zip(function._schema.arguments, arguments, strict=False)
    lists = (value if isinstance(value, (list, tuple)) else [value] for given, value in written if given.is_write)
    return [x for listed in lists for x in listed if isinstance(x, Tensor)]


def _key(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _bytes(x: Tensor) -> int:
    """Of distinct elements."""
    n = x.element_size()
    for size, stride in zip(x.shape, x.stride(), strict=True):
        n *= size if stride else 1
    return n


def _blocks(name: str, inputs: list[Tensor]) -> int:
    """Of rows of the queries: 32 in the memory-efficient kernel for heads wider than 128, else 64."""
    q = inputs[1] if "backward" in name else inputs[0]
    rows = 32 if "efficient" in name and q.shape[-1] > 128 else 64
    return math.prod(q.shape[:-2]) * math.ceil(q.shape[-2] / rows)


def _flops(function: Any, kind: str, name: str, inputs: list[Tensor], arguments: tuple, out: Any) -> int:
    if kind == "attention":  # torch's formula knows no grouped heads; backward: 5 products where forward has 2
        q, k = inputs[1:3] if "backward" in name else inputs[:2]
        return (10 if "backward" in name else 4) * q.numel() * k.shape[-2]
    formula = flop_registry.get(function._overloadpacket)
    return 0 if formula is None else formula(*arguments[0], **arguments[1], out_val=out)


def _kind(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> str:
    base = name.rpartition(".")[0] or name
    if base in MATMUL:
        return "matmul"
    if base.startswith(ATTENTION):
        return "attention"
    if base.startswith(("_fused_adam", "_foreach_")):
        return "optimizer"
    if base in COPIES:
        source = inputs[-1] if base == "copy_" else inputs[0]
        return "copy" if source.dtype == outputs[0].dtype else "cast"
    for kind, names in (("concatenation", CONCATENATIONS), ("reduction", REDUCTIONS), ("gather", GATHERS)):
        if base in names:
            return kind
    return "random" if base in RANDOM else "elementwise"
