"""Host arrays to the device without waiting: through pinned memory where the device is a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def to_device(x: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`, same dtype. A copy to a GPU is queued, the host goes on (the pinned block is kept by
    torch's allocator until the copy is done)."""
    tensor = torch.as_tensor(x)
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def joined(pictures: Sequence[np.ndarray | Tensor], device: torch.device) -> Tensor:
    """Pictures [b, h, w, 3] of several cameras one behind the other on `device`, in one copy: [cameras·b, h, w, 3].

    Those that are tensors were changed there (learner.augment).
    """
    if any(isinstance(x, Tensor) for x in pictures):
        return torch.cat([to_device(x, device) for x in pictures])
    return to_device(np.concatenate(pictures), device)
