"""Host arrays to the device without waiting: through pinned memory where the device is a GPU."""

from __future__ import annotations

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
