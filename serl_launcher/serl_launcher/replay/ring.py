"""The replay ring: frames of finished episodes in shared memory, one writer (gateway), many readers (trainer ranks).

    gateway ── append(episode) ─▶ [ evict whole episodes │ write frames │ write table row │ publish ]   RingWriter
    trainer ── episodes() / gather(frames) ◀── committed counters, read before and after each copy      RingReader

No lock: the writer moves `first_valid` past the episodes it is about to overwrite *before* it touches their frames,
and a reader looks at `first_valid` again *after* its copy; what it copied is either whole or it raises Evicted.
Demonstrations stay: when the oldest frames must go, theirs move to the head, as a new row of the table, as long as
they fill no more than half of the ring.
An episode of n ticks takes n+1 consecutive absolute frame numbers; slot = frame modulo capacity. In the last frame
of an episode only the observation means anything. The counters are aligned 8-byte words, written once each.
"""

import contextlib
import fcntl
import hashlib
import logging
import mmap
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from serl_launcher.replay.ring_cold import ColdPictures
from serl_launcher.replay.ring_layout import (
    COUNTERS_OFFSET,
    MEMORY_SHARE,
    ArrayPlace,
    RingError,
    RingLayout,
    place_ring,
)
from serl_launcher.replay.warm import WarmMemory
from serl_transport.contract.schema import MODES
from serl_transport.contract.specs import TaskSpec

log = logging.getLogger("replay")

# Counters, int64 each: absolute frame numbers, then absolute row numbers of the episode table.
HEAD, FIRST_VALID, ROWS, FIRST_ROW = range(4)
PREFIX = "flowserl-"


class Evicted(RuntimeError):  # noqa: N818  (the architecture's name: it is an event of normal operation)
    """The writer overtook the reader: the frames are gone; list the episodes again and sample anew."""


@dataclass(frozen=True, slots=True)
class EpisodeRow:
    """One committed episode."""

    ordinal: int  # journal ordinal, stable over restarts
    first_frame: int  # absolute frame number of the first observation
    n_ticks: int  # ticks; the observations are first_frame .. first_frame + n_ticks
    mode: str  # demo | online
    success: bool
    prompt: str  # what the policy was told
    row: int  # absolute row number of the table: grows with every commit, anew for a demonstration that moved
    key: int = 0  # `episode_key` of its id


class _RingFile:
    """The mapped file and its arrays; base of writer and reader."""

    def __init__(self, path: Path, layout: RingLayout, access: int) -> None:
        self.path = path
        self.layout = layout
        self.capacity = layout.capacity  # observation slots
        flags = os.O_RDWR if access == mmap.ACCESS_WRITE else os.O_RDONLY
        fd = os.open(path, flags)
        try:
            self._map = mmap.mmap(fd, layout.total_bytes, access=access)
        finally:
            os.close(fd)
        self._counters = np.frombuffer(self._map, np.int64, 4, COUNTERS_OFFSET)
        self._arrays = {key: self._view(place) for key, place in layout.arrays.items()}
        self._table = self._view(layout.table)
        self._prompts = self._view(layout.prompts)  # UTF-8, one behind the other; the table says which is whose
        self._cold: ColdPictures | None = None  # where pictures of slots from `layout.hot` on lie

    @property
    def head(self) -> int:
        """Absolute number of the next frame to be written."""
        return int(self._counters[HEAD])

    @property
    def first_valid(self) -> int:
        """Absolute number of the oldest frame that is still whole."""
        return int(self._counters[FIRST_VALID])

    @property
    def rows(self) -> int:
        """Episodes that were ever committed; the row number of the next one."""
        return int(self._counters[ROWS])

    def _row(self, index: int, columns: np.ndarray) -> EpisodeRow:
        ordinal, first, n, mode, success, at, size, key = columns.tolist()
        prompt = self._prompts[at : at + size].tobytes().decode()
        return EpisodeRow(ordinal, first, n, MODES[mode], bool(success), prompt, index, key)

    def _take(self, key: str, slots: np.ndarray) -> np.ndarray:
        """Copies of slots, in the shape of `slots`; of pictures wherever they lie."""
        array, hot = self._arrays[key], self.layout.hot
        result = self._empty(slots.shape + array.shape[1:], array.dtype)
        if self._cold is None or key not in self.layout.cold or not (slots >= hot).any():
            # The slots are in range: clipping them only spares numpy a second copy.
            return np.take(array, slots, axis=0, out=result, mode="clip")
        rows, flat = result.reshape(-1, *array.shape[1:]), slots.ravel()
        near, far = np.flatnonzero(flat < hot), np.flatnonzero(flat >= hot)
        for row in near.tolist():  # one copy each; a selection by mask would copy twice
            rows[row] = array[flat[row]]
        self._cold.read(key, flat[far] - hot, rows, far)
        return result

    def _empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        return np.empty(shape, dtype)

    def _view(self, place: ArrayPlace) -> np.ndarray:
        return np.ndarray(place.shape, place.dtype, self._map, place.offset)


class RingWriter(_RingFile):
    """Appends whole episodes. One per ring file; the file is new each time the gateway starts.

    memory_share: of the machine's memory that it may take in shared memory; pictures beyond lie in the run's folder.
    Raises RingError when no folder has room.
    """

    def __init__(
        self,
        spec: TaskSpec,
        capacity_frames: int,
        run_dir: Path,
        shared: Path = Path("/dev/shm"),
        memory_share: float = MEMORY_SHARE,
    ) -> None:
        shape = spec.cameras, len(spec.state_names), len(spec.action_names)
        RingLayout(*shape, capacity_frames)  # what cannot be is said before anything is removed
        remove_rings(run_dir, shared)
        placing = place_ring(shape, capacity_frames, run_dir, shared, memory_share)
        name = f"{_ring_stem(run_dir)}-{os.getpid()}-{os.urandom(3).hex()}"
        beyond = placing.hot < capacity_frames
        cold_path = (run_dir / f"{name}.cold").resolve() if beyond else None
        layout = RingLayout(*shape, capacity_frames, placing.hot, cold_path and str(cold_path))
        cold = cold_path and ColdPictures(cold_path, layout, create=True)
        path = placing.folder / f"{name}.ring"
        try:
            self._lock = _reserve(path, layout)
        except RingError:
            if cold:
                cold.close(unlink=True)
            raise
        super().__init__(path, layout, mmap.ACCESS_WRITE)
        self._cold = cold
        log.log(
            logging.WARNING if beyond or placing.folder == run_dir else logging.INFO, "replay ring: %s", placing.words
        )
        self._places: dict[str, tuple[int, int]] = {}  # prompt -> where it lies: first byte, bytes
        self._demo_frames = 0  # of the demonstrations in the ring, the one that is being appended included
        self._told = False

    def append(
        self,
        ordinal: int,
        mode: str,
        success: bool,
        arrays: Mapping[str, np.ndarray],
        prompt: str = "",
        episode_id: str = "",
    ) -> EpisodeRow:
        """Copy one finished episode in and publish it, evicting the oldest ones it displaces, demonstrations last.

        arrays: the schema's keys; observations [n+1, ...], everything else [n, ...]. RingError when it, or one more
        prompt, cannot fit.
        """
        n = len(arrays["action"])
        if n + 1 > self.capacity:
            raise RingError(
                f"episode {ordinal} has {n} ticks and needs {n + 1} frames, the ring holds {self.capacity}: "
                "raise replay.capacity_frames"
            )
        place = self._place(prompt)
        if mode == "demo":
            self._demo_frames += n + 1
        self._make_room(n + 1)
        return self._write((ordinal, n, mode, bool(success), *place, episode_key(episode_id)), arrays)

    def _place(self, prompt: str) -> tuple[int, int]:
        """Where a prompt lies among the prompts; put there when it is new."""
        if prompt not in self._places:
            text = np.frombuffer(prompt.encode(), np.uint8)
            first = sum(size for _, size in self._places.values())
            if first + len(text) > len(self._prompts):
                raise RingError(f"{len(self._places)} different prompts fill the {len(self._prompts)} bytes for them")
            self._prompts[first : first + len(text)] = text
            self._places[prompt] = (first, len(text))
        return self._places[prompt]

    def _write(self, of: tuple[int, int, str, bool, int, int, int], arrays: Mapping[str, np.ndarray]) -> EpisodeRow:
        """Into free slots at the head. of: what the table says of the episode, without where it lies."""
        ordinal, n, mode, success, *place = of
        first, index = self.head, int(self._counters[ROWS])
        slots = np.arange(first, first + n + 1) % self.capacity
        for key, array in self._arrays.items():
            rows = slots if key.startswith("observation.") else slots[:n]
            near = rows < len(array)
            array[rows[near]] = arrays[key][near]
            if self._cold is not None and not near.all():
                self._cold.write(key, rows[~near] - len(array), arrays[key][~near])
        self._table[index % self.layout.episode_rows] = (ordinal, first, n, MODES.index(mode), int(success), *place)
        self._counters[HEAD] = first + n + 1
        self._counters[ROWS] = index + 1  # last: this publishes the episode
        return self._row(index, self._table[index % self.layout.episode_rows])

    def close(self, unlink: bool = True) -> None:
        """Forget the file. Readers that mapped it keep their view until they let go."""
        if unlink:
            self.path.unlink(missing_ok=True)
        if self._cold is not None:
            self._cold.close(unlink)
        os.close(self._lock)

    def _make_room(self, frames: int) -> None:
        """Drop the oldest episodes until there are free slots for this many frames; demonstrations move to the head.

        A move frees nothing and costs a copy, once for each time the ring goes round.
        """
        while self.head + frames > self.first_valid + self.capacity:
            index = int(self._counters[FIRST_ROW])
            ordinal, first, n, mode, success, *place = self._table[index % self.layout.episode_rows].tolist()
            demo, moved = MODES[mode] == "demo", None
            if demo and self._demo_frames <= self.capacity // 2 and self._demo_frames + frames <= self.capacity:
                moved = self._copy(first, n)
            elif demo:
                self._demo_frames -= n + 1
                self._say_that_demonstrations_leave()
            self._counters[FIRST_ROW] = index + 1
            self._counters[FIRST_VALID] = first + n + 1
            if moved is not None:
                self._write((ordinal, n, "demo", bool(success), *place), moved)

    def _copy(self, first: int, n: int) -> dict[str, np.ndarray]:
        slots = np.arange(first, first + n + 1) % self.capacity
        return {key: self._take(key, slots if key.startswith("observation.") else slots[:n]) for key in self._arrays}

    def _say_that_demonstrations_leave(self) -> None:
        if not self._told:
            self._told = True
            log.warning(
                "demonstrations fill more than half of the replay ring: the oldest leave it, and are trained on no "
                "longer; raise replay.capacity_frames (%d) to keep them",
                self.capacity,
            )


class RingReader(_RingFile):
    """Read-only view of a ring by its path (the status document names it); make a new one when that path changes.

    until: rows of the table that `episodes` goes to, for readers that must all see the same; None: all there are.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        layout = RingLayout.read(path)
        super().__init__(path, layout, mmap.ACCESS_READ)
        self.until: int | None = None
        self._memory = WarmMemory()
        if layout.cold_path is not None:
            self._cold = ColdPictures(layout.cold_path, layout)

    def reach(self, rows: int) -> None:
        """`episodes` goes to this row from now on."""
        self.until = rows

    def episodes(self, since_row: int = 0) -> list[EpisodeRow]:
        """Committed episodes whose row number is at least since_row, oldest commit first."""
        rows = self.rows if self.until is None else min(self.rows, self.until)
        indices = np.arange(max(since_row, int(self._counters[FIRST_ROW])), rows)
        table = self._table[indices % self.layout.episode_rows].copy()
        still = indices >= int(self._counters[FIRST_ROW])  # read after the copy: older rows may be half overwritten
        return [self._row(int(index), columns) for index, columns in zip(indices[still], table[still], strict=True)]

    def gather(self, frames: np.ndarray, keys: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        """Copy slots: key -> array[len(frames), ...] (or frames' own shape in place of len(frames)).

        frames: int64[...] absolute frame numbers; keys: all when None. Raises Evicted when any of the frames was
        overwritten before or during the copy; IndexError when one was never written.
        """
        frames = np.asarray(frames, np.int64)
        if frames.size:
            self._check_live(frames)
        slots = frames % self.capacity
        result = {key: self._take(self._known(key), slots) for key in (self._arrays if keys is None else keys)}
        if frames.size and int(frames.min()) < self.first_valid:
            raise Evicted(f"frame {int(frames.min())} was overwritten during the copy (oldest is {self.first_valid})")
        return result

    def _empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        return self._memory.empty(shape, dtype)

    def _check_live(self, frames: np.ndarray) -> None:
        low, high = int(frames.min()), int(frames.max())
        if low < self.first_valid:
            raise Evicted(f"frame {low} is gone (oldest is {self.first_valid})")
        if high >= self.head:
            raise IndexError(f"frame {high} was never written (next is {self.head})")

    def _known(self, key: str) -> str:
        if key not in self._arrays:
            raise KeyError(f"the ring holds no {key!r}; it holds {', '.join(self._arrays)}")
        return key


def episode_key(episode_id: str) -> int:
    """What the table knows an episode by, so that a person's word on it finds it: 63 bits of a digest of its id."""
    return int.from_bytes(hashlib.sha256(episode_id.encode()).digest()[:8], "little") >> 1


def remove_rings(run_dir: Path, shared: Path = Path("/dev/shm")) -> None:
    """Unlink the ring files of gateways that are gone (kill -9 leaves them, and they are memory).

    In shared memory those of every run: a run that is never started again would keep its ring for ever. A live writer
    holds a lock on its file.
    """
    own = _ring_stem(run_dir)
    for folder, pattern in ((shared, f"{PREFIX}*.ring"), (run_dir, f"{own}-*.ring"), (run_dir, f"{own}-*.cold")):
        for path in folder.glob(pattern) if folder.is_dir() else ():
            with contextlib.suppress(OSError):  # another user's, or gone meanwhile
                _unlink_unlocked(path)


def _unlink_unlocked(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    finally:
        os.close(fd)


def _ring_stem(run_dir: Path) -> str:
    return PREFIX + hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:12]


def _reserve(path: Path, layout: RingLayout) -> int:
    """Create the file with every byte reserved (a later SIGBUS on a full filesystem is then impossible).

    Returns the descriptor whose lock says that the writer lives.
    """
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        os.posix_fallocate(fd, 0, layout.total_bytes)
        os.pwrite(fd, layout.header, 0)
    except OSError as error:
        os.close(fd)
        path.unlink(missing_ok=True)
        raise RingError(
            f"cannot reserve {layout.total_bytes / 2**20:.0f} MiB for the replay ring at {path}: {error.strerror}. "
            "Lower replay.capacity_frames or free some space."
        ) from None
    return fd
