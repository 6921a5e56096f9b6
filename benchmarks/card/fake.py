"""The card: `with FakeCard() as card:` runs code on `cuda:0` as shapes alone, with or without a card in the machine.

Tensors on the card are torch's FakeTensors (shapes, types and the device's rules, no numbers), those on the host are
real. Autocast, the promotion of types and the errors of mixed devices are PyTorch's own for CUDA. Stood in for: the
choice of fused attention (below), the backward engine (card.backward), pinned memory and streams, and the values that
the host reads back: True, 0 and 1.0.

Fused attention is what CUDA takes: flash without a mask, the memory-efficient kernel with one. A bool mask costs two
kernels before it (a fill, a `where`), one whose rows are not aligned a copy: aten/native/transformers/attention.cpp.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Self
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
    unset_fake_temporarily,
)
from torch.nn import functional as F
from torch.optim import optimizer
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from card import backward
from card.count import Attention, Counts
from serl_launcher.policies.compiling import CompiledLayer

DEVICE = torch.device("cuda:0")
READ_BACK = {"_local_scalar_dense", "equal", "is_nonzero"}
ALIGNED = 8  # elements that a row of the mask must be a multiple of
ATEN = torch.ops.aten
PLAIN = {"mm", "addmm", "bmm", "add", "mul", "sub", "pow", "_to_copy", "cat", "gelu", "silu", "neg", "rsqrt", "clone"}
"""Frequent operations whose result lies where the tensors that they are given do."""


class FakeCard(TorchDispatchMode):
    """What runs inside is shown to `counts`, where someone counts."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counts | None = None
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._stack = ExitStack()
        self._layers = 0

    def __enter__(self) -> Self:
        precision = torch.get_float32_matmul_precision()
        self._stack.callback(torch.set_float32_matmul_precision, precision)
        self._stack.callback(forget_tables)
        for target, name, stand_in in self._stand_ins():
            self._stack.enter_context(patch.object(target, name, stand_in))
        self._stack.enter_context(self._fake)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    @contextmanager
    def counting(self, policy: nn.Module) -> Iterator[Counts]:
        """Counts of what runs inside."""
        self.counts = Counts(parts={x.untyped_storage()._cdata: part_of(n) for n, x in policy.named_parameters()})
        try:
            yield self.counts
        finally:
            self.counts = None

    def place(self, module: nn.Module) -> None:
        """Put a module of the meta device on the card: parameters and buffers as shapes there, shared ones shared."""
        placed: dict[int, Tensor] = {}
        for part in module.modules():
            for table in (part._parameters, part._buffers):
                for name, x in table.items():
                    if x is not None:
                        table[name] = placed.setdefault(id(x), self._put(x))

    def _put(self, x: Tensor) -> Tensor:
        there = torch.empty(x.shape, dtype=x.dtype, device=DEVICE)
        return nn.Parameter(there, requires_grad=x.requires_grad) if isinstance(x, nn.Parameter) else there

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = list(_tensors((args, kwargs)))
        there = [x for x in inputs if isinstance(x, FakeTensor)]
        name = function._schema.name.removeprefix("aten::")
        to = kwargs.get("device")
        if not there and (to is None or torch.device(to).type != "cuda"):
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        if name in READ_BACK:
            return self._read(name, there[0])
        if (crossed := self._cross(name, args, kwargs, inputs, there)) is not None:
            return crossed
        plain = (function.is_view or name in PLAIN) and to is None and len(there) == len(inputs)
        out = self._shapes(function, args, kwargs) if plain else function(*args, **kwargs)
        if self.counts is not None:
            self.counts.note(
                function, there, [x for x in _tensors(out) if isinstance(x, FakeTensor)], (args, kwargs), out
            )
        return out

    def _shapes(self, function: Any, args: Any, kwargs: Any) -> Any:
        """The operation's result by its shape function, without FakeTensorMode's questions, which take two thirds of
        the time."""
        with in_kernel_invocation_manager(self._fake):
            out = function(*args, **kwargs)
        return tree_map_only(Tensor, self._wrapped, out)

    def _wrapped(self, x: Tensor) -> Tensor:
        return x if isinstance(x, FakeTensor) else FakeTensor(self._fake, x, DEVICE)

    def _read(self, name: str, x: Tensor) -> Any:
        if self.counts is not None:
            self.counts.reads[name] += 1
        return True if name != "_local_scalar_dense" or x.dtype == torch.bool else 1.0 if x.is_floating_point() else 0

    def _cross(self, name: str, args: Any, kwargs: Any, inputs: list[Tensor], there: list[Tensor]) -> Any:
        """The result of a copy between host and card; None where this is no such copy."""
        if name == "copy_" and len(there) == 1 and inputs[1].ndim:
            return self._crossed("to the card" if there[0] is args[0] else "to the host", inputs[1], args[0], args[2:])
        if name != "_to_copy" or kwargs.get("device") is None:
            return None
        x, to = args[0], torch.device(kwargs["device"])
        if (to.type == "cuda") == isinstance(x, FakeTensor):
            return None
        dtype = kwargs.get("dtype") or x.dtype
        if to.type == "cuda":
            return self._crossed("to the card", x, torch.empty(x.shape, dtype=dtype, device=DEVICE))
        with unset_fake_temporarily():
            return self._crossed("to the host", x, torch.ones(x.shape, dtype=dtype), [kwargs.get("non_blocking")])

    def _crossed(self, direction: str, x: Tensor, result: Tensor, non_blocking: Sequence[bool | None] = ()) -> Tensor:
        if self.counts is not None:
            self.counts.crossed(direction, x)
            if direction == "to the host" and not any(non_blocking):
                self.counts.reads["copy"] += 1
        return result

    def _stand_ins(self) -> Iterator[tuple[Any, str, Any]]:
        """What PyTorch asks of a card that is there: owner, name, what stands in."""
        yield torch.cuda.amp.common, "amp_definitely_not_available", lambda: False
        yield torch.cuda, "is_bf16_supported", lambda *_, **__: True
        for module in (_foreach_utils, optimizer):
            yield module, "_foreach_supported_types", [Tensor, nn.Parameter, FakeTensor]
        yield torch.autograd, "backward", backward.backward
        yield torch.autograd, "grad", backward.grad
        yield Tensor, "pin_memory", lambda x, *_: x
        yield F, "scaled_dot_product_attention", self._attend
        yield CompiledLayer, "__call__", lambda layer, *tensors: self._layer(layer.function, tensors)

    def _layer(self, function: Any, arguments: tuple) -> Any:
        """A layer that may be compiled, run as it is; what it runs is known to be of it."""
        self._layers += 1
        if self.counts is None:
            return function(*arguments)
        self.counts.layer = self._layers
        try:
            return function(*arguments)
        finally:
            self.counts.layer = 0

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """`scaled_dot_product_attention` of four dimensions. RuntimeError for types that differ, as on a card."""
        if torch.is_autocast_enabled("cuda"):
            q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
        dtypes = (q.dtype, k.dtype, v.dtype)
        if self.counts is not None:
            mask = None if attn_mask is None else attn_mask.dtype
            self.counts.attention.append(Attention(tuple(q.shape), tuple(k.shape), dtypes, mask))
        if len(set(dtypes)) > 1:
            raise RuntimeError(f"expected query, key and value of one type, got {dtypes}")
        if attn_mask is None:
            return ATEN._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, False, scale=scale)[0]
        if enable_gqa:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        mask = _additive(attn_mask, q.dtype).expand(*q.shape[:3], k.shape[2])
        keeps = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        return ATEN._scaled_dot_product_efficient_attention(q, k, v, mask, keeps, dropout_p, is_causal, scale=scale)[0]


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as the memory-efficient kernel reads it."""
    if mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, torch.full((), -torch.inf, dtype=dtype, device=mask.device))
    mask = mask.to(dtype)
    if any(stride % ALIGNED for stride in mask.stride()[:-1]) or mask.stride(-1) != 1:
        mask = F.pad(mask, (0, ALIGNED - mask.shape[-1] % ALIGNED))[..., : mask.shape[-1]]
    return mask


def part_of(name: str) -> str:
    """The part of a policy or an agent that a parameter belongs to."""
    name = name.removeprefix("policy.")
    if not name.startswith("core."):
        return "values"
    if any(word in name for word in ("vision_tower", "multi_modal_projector", "visual.", "vision_model", ".mlp1.")):
        return "vision"
    if "language_model" in name or ".vl" in name or "eagle_linear" in name:
        return "language"
    return "flow"


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _tensors(item)
    elif isinstance(tree, dict):
        yield from _tensors(tuple(tree.values()))


def forget_tables() -> None:
    """Drop what the policies' modules keep by device: it is of this card."""
    for name, module in list(sys.modules.items()):
        if name.startswith("serl_launcher.policies"):
            for kept in vars(module).values():
                if hasattr(kept, "cache_clear"):
                    kept.cache_clear()
