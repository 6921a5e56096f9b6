"""Pictures of a replay ring that memory has no room for: a file in the run folder, a row a picture. Used by `ring.py`.

    slot ≥ layout.hot ─▶ RingWriter: pwrite │ RingReader: the kernel is asked for all rows at once, then pread

What memory is left keeps what was read lately (the page cache). The file is reserved in full when it is made.
"""

import fcntl
import os
from math import prod
from pathlib import Path

import numpy as np

from serl_launcher.replay.ring_layout import ArrayPlace, RingError, RingLayout


class ColdPictures:
    """One open file. `slot` counts from the first one that lies here."""

    def __init__(self, path: Path, layout: RingLayout, create: bool = False) -> None:
        """RingError when it is gone, or has no room. create: make and lock it; the lock says that the writer lives."""
        self.path, self._places, self._closed = path, layout.cold, True
        try:
            self._fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR if create else os.O_RDONLY, 0o600)
        except FileNotFoundError:
            raise RingError(f"no pictures of the replay ring at {path}: the gateway has replaced it") from None
        self._closed = False
        if create:
            self._reserve(layout.cold_bytes)
        else:
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)

    def close(self, unlink: bool) -> None:
        """Let go of the file, and remove it."""
        if unlink:
            self.path.unlink(missing_ok=True)
        self._closed = True
        os.close(self._fd)

    def __del__(self) -> None:  # a reader's, which nobody closes
        if not self._closed:
            os.close(self._fd)

    def write(self, key: str, slots: np.ndarray, pictures: np.ndarray) -> None:
        """pictures: uint8[len(slots), h, w, 3]. RingError when the disk refuses one."""
        place, size = self._place(key)
        for slot, picture in zip(slots.tolist(), pictures, strict=True):
            try:
                written = os.pwrite(self._fd, np.ascontiguousarray(picture), place.offset + slot * size)
            except OSError as error:
                raise RingError(f"cannot write the replay ring's pictures to {self.path}: {error.strerror}") from None
            if written != size:
                raise RingError(f"cannot write the replay ring's pictures to {self.path}: {written} of {size} bytes")

    def read(self, key: str, slots: np.ndarray, into: np.ndarray, rows: np.ndarray) -> None:
        """Fill `into[rows]`, uint8[…, h, w, 3], with the pictures of these slots. RingError when the disk fails."""
        place, size = self._place(key)
        offsets = (place.offset + slots * size).tolist()
        for offset in offsets:  # the disk fetches them side by side while the first are copied
            os.posix_fadvise(self._fd, offset, size, os.POSIX_FADV_WILLNEED)
        for offset, row in zip(offsets, rows.tolist(), strict=True):
            if os.preadv(self._fd, [into[row]], offset) != size:
                raise RingError(f"{self.path} is too short: {size} bytes at {offset} are not there")

    def _place(self, key: str) -> tuple[ArrayPlace, int]:
        return self._places[key], prod(self._places[key].shape[1:])

    def _reserve(self, total_bytes: int) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            os.posix_fallocate(self._fd, 0, total_bytes)
        except OSError as error:
            self.close(unlink=True)
            raise RingError(
                f"cannot reserve {total_bytes / 2**20:.0f} MiB for the replay ring's pictures at {self.path}: "
                f"{error.strerror}. Lower replay.capacity_frames or free some space."
            ) from None
