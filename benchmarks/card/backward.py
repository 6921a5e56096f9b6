"""Reverse mode in Python over the graph that PyTorch recorded: its engine wants every device to be there.

card.fake puts it in the place of `torch.autograd.backward` and `torch.autograd.grad`. Nodes run in the engine's order,
each is PyTorch's own formula; sums of gradients, and their casts and reductions to the shape of what they are of, are
operations as they would be there. Hooks on tensors and double backward are not known here; none of the code has them.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import GraphExecGroup

Gradients = dict[tuple[Any, int], Tensor]  # (node, place among its inputs) -> gradient


def backward(tensors: Any, grad_tensors: Any = None, *_: Any, **__: Any) -> None:
    """As `torch.autograd.backward`: gradients are added to leaves."""
    for leaf, gradient in _run(_listed(tensors), _listed(grad_tensors), ()).items():
        variable = leaf[0].variable
        variable.grad = gradient if variable.grad is None else variable.grad.add_(gradient)


def grad(outputs: Any, inputs: Any, grad_outputs: Any = None, *_: Any, **__: Any) -> tuple[Tensor | None, ...]:
    """As `torch.autograd.grad`; gradients of other leaves are not made."""
    inputs = _listed(inputs)
    wanted = [_edge(x) for x in inputs]
    found = _run(_listed(outputs), _listed(grad_outputs), wanted)
    return tuple(found.get(edge) for edge in wanted)


def _listed(x: Any) -> list[Any]:
    return [] if x is None else list(x) if isinstance(x, Sequence) else [x]


def _edge(x: Tensor) -> tuple[Any, int]:
    if x.grad_fn is not None:
        return x.grad_fn, x.output_nr
    return x.view_as(x).grad_fn.next_functions[0]  # its AccumulateGrad


@torch.no_grad()
def _run(outputs: list[Tensor], given: list[Tensor | None], wanted: Sequence[tuple[Any, int]]) -> Gradients:
    """Gradients that reached leaves, or with `wanted` those places of the graph alone."""
    given = given or [None] * len(outputs)
    due: Gradients = {}
    for x, gradient in zip(outputs, given, strict=True):
        _add(due, _edge(x), torch.ones_like(x) if gradient is None else gradient)
    needed, waits = _explore([node for node, _ in due], {node for node, _ in wanted})
    with GraphExecGroup():  # one backward pass to activation checkpoints
        return _walk(due, needed, waits, wanted)


def _walk(due: Gradients, needed: set[Any], waits: dict[Any, int], wanted: Sequence[tuple[Any, int]]) -> Gradients:
    order, found = count(), {}
    ready = [(-node._sequence_nr(), next(order), node) for node in {node for node, _ in due} if not waits[node]]
    heapq.heapify(ready)
    while ready:
        node = heapq.heappop(ready)[2]
        arity = len(node._input_metadata)
        gradients = [due.pop((node, k), None) for k in range(arity)]
        found |= {(node, k): x for k, x in enumerate(gradients) if x is not None and _is_kept(node, k, wanted)}
        if _is_leaf(node) or node not in needed:
            continue
        made = node(*gradients) if any(x is not None for x in gradients) else None
        made = made if isinstance(made, tuple) else (made,) * len(node.next_functions)
        for (after, place), gradient in zip(node.next_functions, made, strict=True):
            if after is None or after not in needed:
                continue
            if gradient is not None:
                _add(due, (after, place), gradient)
            waits[after] -= 1
            if not waits[after]:
                heapq.heappush(ready, (-after._sequence_nr(), next(order), after))
    return found


def _is_leaf(node: Any) -> bool:
    return hasattr(node, "variable")


def _is_kept(node: Any, place: int, wanted: Sequence[tuple[Any, int]]) -> bool:
    return (node, place) in wanted if wanted else _is_leaf(node)


def _explore(roots: Sequence[Any], wanted: set[Any]) -> tuple[set[Any], dict[Any, int]]:
    """The nodes that lead to a wanted one (all, where none is named), and how many such gradients each waits for."""
    seen, stack, order = set(roots), list(dict.fromkeys(roots)), []
    while stack:
        node = stack.pop()
        order.append(node)
        for after, _ in node.next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                stack.append(after)
    needed = set(seen)
    if wanted:
        parents: dict[Any, list[Any]] = {}
        for node in order:
            for after, _ in node.next_functions:
                parents.setdefault(after, []).append(node)
        needed, stack = set(wanted & seen), list(wanted & seen)
        while stack:
            fresh = [parent for parent in parents.get(stack.pop(), []) if parent not in needed]
            needed.update(fresh)
            stack += fresh
    waits = dict.fromkeys(seen, 0)
    for node in needed:
        for after, _ in node.next_functions:
            if after in needed:
                waits[after] += 1
    return needed, waits


def _add(due: Gradients, edge: tuple[Any, int], gradient: Tensor) -> None:
    """One more gradient of a place, in the place's type and shape."""
    metadata = edge[0]._input_metadata[edge[1]]
    if gradient.dtype != metadata.dtype:
        gradient = gradient.to(metadata.dtype)
    if gradient.shape != metadata.shape:
        gradient = gradient.sum_to_size(metadata.shape)
    before = due.get(edge)
    due[edge] = gradient if before is None else before + gradient
