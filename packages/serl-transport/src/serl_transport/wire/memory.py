"""Keeps memory that was freed, because the next message of the same size will want it.

glibc gives the end of its heap back to the kernel at every message of a few hundred kB, and gets it again, page fault
by page fault, for the next one: that costs more CPU than sending the message. Server, client and the policy server's
link call this once.
"""

import ctypes
import logging

log = logging.getLogger(__name__)

KEPT_BYTES = 64 << 20  # freed memory that a process keeps at most, per arena
MAPPED_BYTES = 32 << 20  # glibc's most; blocks above this are mapped by themselves and given back when freed
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def keep_freed_memory() -> None:
    """For this process, from now on; without glibc it does nothing."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        log.debug("no mallopt here: freed memory goes back to the system")
        return
    mallopt(_TRIM_THRESHOLD, KEPT_BYTES)
    mallopt(_MMAP_THRESHOLD, MAPPED_BYTES)
