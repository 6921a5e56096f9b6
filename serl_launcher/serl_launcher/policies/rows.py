"""Rows of an encoded batch: some observations' prefixes, each as often as wanted, without encoding anything again."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from serl_launcher.policies.base import Prefix


def take(prefix: Prefix, index: Tensor) -> Prefix:
    """The prefix of rows `index` int64[n], repeats allowed."""
    if len(index) == len(prefix) and torch.equal(index, torch.arange(len(prefix), device=index.device)):
        return prefix
    return replace(prefix, **{f.name: _take(getattr(prefix, f.name), index) for f in fields(prefix)})


def _take(value: Any, index: Tensor) -> Any:
    if value is None:
        return None
    if isinstance(value, Tensor):
        return value.index_select(0, index)
    return type(value)(_take(item, index) for item in value)
