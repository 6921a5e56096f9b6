"""A published version's file, for a client on the learner's own host: mapped, or copied into the client's memory.

`params.pull` calls it with what the announcement said: path, device and inode of a file that is only ever replaced.
"""

import mmap
import os
import threading
from typing import Any

import numpy as np

PIECE_BYTES = 16 << 20  # a smaller version is copied before a second thread runs
_POPULATED = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)


def from_file(told: dict[str, Any], into: Any) -> memoryview | None:
    """The published file itself, when it is reachable from here and the very one that the learner means.

    Mapped without a copy, or copied once `into` a buffer that was touched before: a small one by the kernel, which
    spares the mapping; of 500 MB the C library's copy, which writes past the cache, takes half the time of `read`.
    """
    where, total = told.get("file"), told.get("total_bytes")
    try:
        file = os.open(where["path"], os.O_RDONLY | os.O_CLOEXEC)  # type: ignore[index]
    except (TypeError, KeyError, ValueError, OSError):
        return None
    try:
        stat = os.fstat(file)
        if (stat.st_dev, stat.st_ino, stat.st_size) != (where.get("dev"), where.get("ino"), total) or not total:
            return None
        if into is None:
            return memoryview(mmap.mmap(file, total, prot=mmap.PROT_READ))
        room = room_in(into, total)
        if total <= PIECE_BYTES:
            return room.data if _read(file, room.data) else None
        _copy(room, np.frombuffer(mmap.mmap(file, total, _POPULATED, mmap.PROT_READ), np.uint8))
        return room.data
    finally:
        os.close(file)


def room_in(into: Any, total: int) -> np.ndarray:
    """The first `total` bytes of the caller's buffer."""
    buffer = np.frombuffer(into, np.uint8)
    if len(buffer) < total or not buffer.flags.writeable:
        raise ValueError(f"into: expected a writable buffer of {total} bytes, got {len(buffer)}")
    return buffer[:total]


def _read(file: int, room: memoryview) -> bool:
    """Fill `room`; False when the file ends before."""
    end = 0
    while end < len(room) and (got := os.preadv(file, [room[end:]], end)):
        end += got
    return end == len(room)


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """memcpy, by two threads where it takes long: under a hypervisor fresh pages of a file are slow to reach for one.

    Whoever is first takes the next piece, so that a helper without a free core delays nothing but its own piece.
    """
    starts = iter(range(0, len(target), PIECE_BYTES))

    def work() -> None:
        for at in starts:
            target[at : at + PIECE_BYTES] = source[at : at + PIECE_BYTES]

    helper = threading.Thread(target=work, name="trainer-client-copy") if len(target) > PIECE_BYTES else None
    if helper is not None:
        helper.start()
    work()
    if helper is not None:
        helper.join()
