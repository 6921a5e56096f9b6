"""Ranks of a training job as forked processes on this machine, over gloo, as the supervisor starts them."""

import io
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate.state import AcceleratorState


def on_ranks(ranks: int, work: Callable[..., Any], *given: Any) -> list[Any]:
    """`work(*given)` in so many processes of one group; what each returned, in order of the ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("fork")
    queue = context.SimpleQueue()
    children = [context.Process(target=_rank, args=(queue, rank, ranks, port, work, given)) for rank in range(ranks)]
    for child in children:
        child.start()
    found = dict(queue.get() for _ in children)
    for child in children:
        child.join()
    wrong = [said for said in found.values() if isinstance(said, str)]
    assert not wrong, "\n".join(wrong)
    return [torch.load(io.BytesIO(found[rank]), weights_only=False) for rank in range(ranks)]


def _rank(queue: Any, rank: int, ranks: int, port: int, work: Callable[..., Any], given: tuple) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    if ranks > 1:
        os.environ.update({"MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in place.items()}})
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        buffer = io.BytesIO()  # tensors would be shared with a process that is gone
        torch.save(work(*given), buffer)
        queue.put((rank, buffer.getvalue()))
    except BaseException:
        queue.put((rank, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
