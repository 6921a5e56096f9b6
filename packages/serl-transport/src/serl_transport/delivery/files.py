"""Writing many buffers to a file without joining them first. Spool and journal use it."""

import os
from collections.abc import Sequence
from typing import Any

_MAX_BUFFERS = 1024  # IOV_MAX of Linux


def write_buffers(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
    """Write flat buffers one after the other at `offset`; their total size. OSError may leave a part written."""
    start = offset
    rest = [view for view in map(memoryview, buffers) if view.nbytes]
    while rest:
        group = rest[:_MAX_BUFFERS]
        written = os.pwritev(descriptor, group, offset)
        offset += written
        # A full disk or a signal may cut a write short: go on with what is left until all is written or it raises.
        done = 0
        while done < len(group) and written >= group[done].nbytes:
            written -= group[done].nbytes
            done += 1
        rest = rest[done:]
        if written:
            rest[0] = rest[0][written:]
    return offset - start
