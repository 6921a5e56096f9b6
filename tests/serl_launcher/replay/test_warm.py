"""Memory of batches is used again only when nothing looks at it any more."""

import gc

import numpy as np
import torch

from serl_launcher.replay.warm import MOST_IDLE, SMALLEST, WarmMemory

SHAPE, DTYPE = (4, SMALLEST), np.dtype(np.uint8)


def place(array):
    return array.__array_interface__["data"][0]


def test_a_block_comes_back_when_its_array_is_gone_and_not_before():
    memory = WarmMemory()
    first = memory.empty(SHAPE, DTYPE)
    first[:] = 7
    at = place(first)
    assert place(memory.empty(SHAPE, DTYPE)) != at
    del first
    gc.collect()
    found = [memory.empty(SHAPE, DTYPE) for _ in range(2)]
    assert at in map(place, found)


def test_a_view_a_tensor_and_their_views_keep_it():
    memory = WarmMemory()
    array = memory.empty(SHAPE, DTYPE)
    array[:] = 3
    tensor, view = torch.as_tensor(array)[1:3].view(-1), array[2:].reshape(-1)[5:]
    del array
    others = [memory.empty(SHAPE, DTYPE) for _ in range(3)]
    for other in others:
        other[:] = 9
    assert (tensor == 3).all()
    assert (view == 3).all()
    at = tensor.data_ptr() - SMALLEST
    del view
    assert all(place(memory.empty(SHAPE, DTYPE)) != at for _ in range(2))
    del tensor, others, other
    gc.collect()
    assert at in [place(x) for x in [memory.empty(SHAPE, DTYPE) for _ in range(8)]]


def test_other_sizes_and_dtypes_are_as_asked_for_and_idle_memory_is_bounded():
    memory = WarmMemory()
    floats = memory.empty((3, SMALLEST), np.dtype(np.float32))
    assert (floats.shape, floats.dtype) == ((3, SMALLEST), np.float32)
    floats[:] = 0.5
    assert memory.empty((2, 3), np.dtype(bool)).shape == (2, 3)
    many = [memory.empty(SHAPE, DTYPE) for _ in range(MOST_IDLE + 5)]
    del many
    gc.collect()
    assert len(memory._idle[4 * SMALLEST]) == MOST_IDLE
