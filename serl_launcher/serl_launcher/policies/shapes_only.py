"""What a pass over tensors without numbers would do to memory: autocast's casts, and the bytes alive at every moment.

policies.estimate runs a policy on torch's meta device inside `LiveBytes`; policies.precision puts `ShapeRules` in the
place of `torch.autocast` there, which knows no such device. Rules are those of a CPU (torch's autocast list, its fused
attention); a GPU's differ in norms and softmax, which it keeps in fp32.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

HALF = {  # what autocast computes in bf16
    *("linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm"),
    *("conv1d", "conv2d", "conv3d", "scaled_dot_product_attention"),
}
FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class ShapeRules(TorchFunctionMode):
    """Casts as autocast does where `half`, and fused attention: unfused, it would keep its l × l weights."""

    _entered: ClassVar[list[ShapeRules]] = []  # the innermost rules, which alone hold

    def __init__(self, half: bool) -> None:
        super().__init__()
        self.half = half
        self._casts: dict[int, Tensor] = {}  # of parameters, one each as autocast keeps them

    def __enter__(self) -> ShapeRules:
        self._entered.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._entered.pop()
        self._casts.clear()
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if self is self._entered[-1]:
            if self.half and name in HALF:
                args, kwargs = tree_map(self._cast, (args, kwargs))
            if name == "scaled_dot_product_attention":
                return _attend(*args, **kwargs)
        return func(*args, **kwargs)

    def _cast(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype != torch.float32:
            return x
        if not (x.requires_grad and x.is_leaf):
            return x.to(torch.bfloat16)
        if id(x) not in self._casts:
            self._casts[id(x)] = x.to(torch.bfloat16)
        return self._casts[id(x)]


def computed_again() -> tuple[AbstractContextManager, AbstractContextManager]:
    """For torch.utils.checkpoint: what a layer runs in at first, and when it is computed again. The rules that hold now
    hold then, as torch itself has it for autocast."""
    now = ShapeRules._entered
    return nullcontext(), ShapeRules(now[-1].half) if now else nullcontext()


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` by the fused kernel of a CPU: it keeps inputs, output and a row of sums."""
    mask = attn_mask.to(q.dtype) if attn_mask is not None and attn_mask.dtype == torch.bool else attn_mask
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return FUSED(q, k, v, dropout_p, is_causal, attn_mask=mask, scale=scale)[0]


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors on the meta device that were made inside and are alive, and the most there were at once.

    held: tensors of before, which are not counted, nor their views.
    """

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._held = {x.untyped_storage()._cdata for x in held}
        self._known: dict[int, int] = {}  # storage -> bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.is_meta:
                self._note(leaf.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known or key in self._held:
            return
        self._known[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._known.pop(key)
