"""The ring: what goes in comes out, whole episodes leave, and a reader in another process never sees a torn frame."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from serl_launcher.replay.ring import Evicted, RingError, RingReader, RingWriter, remove_rings
from serl_launcher.replay.ring_layout import RingLayout

SPEC = SimpleNamespace(
    cameras={"front": (4, 5), "wrist": (3, 3)}, state_names=("x", "y"), action_names=("dx", "dy", "g")
)


def episode_arrays(n: int, stamp: int) -> dict[str, np.ndarray]:
    """n ticks whose every value tells the absolute frame it belongs to: stamp + tick."""
    ticks = np.arange(stamp, stamp + n + 1)
    return {
        "observation.images.front": np.broadcast_to(
            (ticks % 251).astype(np.uint8)[:, None, None, None], (n + 1, 4, 5, 3)
        ),
        "observation.images.wrist": np.broadcast_to(
            (ticks % 241).astype(np.uint8)[:, None, None, None], (n + 1, 3, 3, 3)
        ),
        "observation.state": np.stack([ticks, ticks * 2], 1).astype(np.float32),
        "action": np.stack([ticks[:n]] * 3, 1).astype(np.float32),
        "next.reward": ticks[:n].astype(np.float32),
        "next.done": ticks[:n] == ticks[n - 1],
        "next.truncated": np.zeros(n, bool),
        "next.success": ticks[:n] == ticks[n - 1],
        "intervention": ticks[:n] % 2 == 0,
        "policy_version": ticks[:n].astype(np.int64),
    }


@pytest.fixture
def writer(tmp_path: Path):
    ring = RingWriter(SPEC, capacity_frames=20, run_dir=tmp_path)
    yield ring
    ring.close()


def test_reads_back_what_was_written(writer: RingWriter) -> None:
    writer.append(7, "demo", True, episode_arrays(4, 0))
    reader = RingReader(writer.path)
    (row,) = reader.episodes()
    assert (row.ordinal, row.first_frame, row.n_ticks, row.mode, row.success) == (7, 0, 4, "demo", True)
    got = reader.gather(np.array([[4, 0], [2, 2]]))
    assert got["observation.state"].tolist() == [[[4, 8], [0, 0]], [[2, 4], [2, 4]]]
    assert got["observation.images.front"].shape == (2, 2, 4, 5, 3)
    assert got["observation.images.wrist"][0, 0, 0, 0, 0] == 4
    assert got["action"][0, 1].tolist() == [0, 0, 0]
    assert got["policy_version"][1].tolist() == [2, 2]


def test_gather_copies_and_names_unknown_keys(writer: RingWriter) -> None:
    writer.append(0, "online", False, episode_arrays(3, 0))
    reader = RingReader(writer.path)
    got = reader.gather(np.array([1, 3]), ["observation.state"])
    with pytest.raises(KeyError, match=r"observation\.images\.front"):
        reader.gather(np.array([0]), ["observation.images.top"])
    writer.append(1, "online", False, episode_arrays(19, 50))  # the whole ring
    assert got["observation.state"].tolist() == [[1, 2], [3, 6]]


def test_wraps_and_evicts_whole_episodes(writer: RingWriter) -> None:
    reader = RingReader(writer.path)
    for k in range(3):  # 3 x 6 frames in 20 slots
        writer.append(k, "online", k % 2 == 0, episode_arrays(5, 6 * k))
    assert [row.ordinal for row in reader.episodes()] == [0, 1, 2]
    writer.append(3, "online", False, episode_arrays(5, 18))  # frames 18..23: slots 18, 19, 0..3
    rows = reader.episodes()
    assert [row.ordinal for row in rows] == [1, 2, 3]
    assert [row.ordinal for row in reader.episodes(since_row=3)] == [3]
    frames = np.arange(rows[-1].first_frame, rows[-1].first_frame + 6)
    assert reader.gather(frames, ["observation.state"])["observation.state"][:, 0].tolist() == list(range(18, 24))
    with pytest.raises(Evicted):
        reader.gather(np.array([5, 18]))
    with pytest.raises(IndexError):
        reader.gather(np.array([24]))


def test_a_long_episode_evicts_everything_else(writer: RingWriter) -> None:
    for k in range(3):
        writer.append(k, "online", False, episode_arrays(5, 6 * k))
    writer.append(3, "demo", True, episode_arrays(19, 18))  # 20 frames: the whole ring
    reader = RingReader(writer.path)
    assert [row.ordinal for row in reader.episodes()] == [3]
    assert reader.first_valid == 18


def test_demonstrations_move_to_the_head_instead_of_going(writer: RingWriter) -> None:
    reader = RingReader(writer.path)
    writer.append(0, "demo", True, episode_arrays(4, 100))
    for k in range(1, 9):  # 5 frames each into 20: twice around
        writer.append(k, "online", False, episode_arrays(4, 5 * k))
        rows = reader.episodes()
        assert {row.ordinal for row in rows} == {0, *range(max(1, k - 2), k + 1)}
        (demo,) = [row for row in rows if row.mode == "demo"]
        got = reader.gather(np.arange(demo.first_frame, demo.first_frame + 5))
        assert got["observation.state"][:, 0].tolist() == [100, 101, 102, 103, 104]
        assert got["policy_version"][:4].tolist() == [100, 101, 102, 103]
        assert demo.success
        assert [row.row for row in rows] == sorted({row.row for row in rows})
    assert reader.episodes(since_row=demo.row)[0].ordinal == 0


def test_demonstrations_beyond_half_of_the_ring_leave_oldest_first_and_that_is_said(writer: RingWriter, caplog) -> None:
    reader = RingReader(writer.path)
    for k in range(3):  # 15 of 20 frames
        writer.append(k, "demo", True, episode_arrays(4, 0))
    for k in range(3, 7):
        writer.append(k, "online", True, episode_arrays(4, 0))
    assert sorted(row.ordinal for row in reader.episodes()) == [1, 2, 5, 6]
    assert caplog.text.count("demonstrations fill more than half of the replay ring") == 1
    writer.append(7, "online", True, episode_arrays(14, 0))  # with both of them there is no room for it
    assert sorted(row.ordinal for row in reader.episodes()) == [2, 7]
    for k in range(8, 14):
        writer.append(k, "demo", True, episode_arrays(4, 0))
    assert sorted(row.ordinal for row in reader.episodes()) == [10, 11, 12, 13]


def test_an_oversized_episode_is_refused_by_name(writer: RingWriter) -> None:
    with pytest.raises(RingError, match=r"replay\.capacity_frames"):
        writer.append(0, "online", False, episode_arrays(20, 0))
    assert RingReader(writer.path).episodes() == []


def test_no_room_anywhere_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(RingError, match=r"Lower replay\.capacity_frames"):
        RingWriter(SPEC, capacity_frames=10**12, run_dir=tmp_path)


def test_falls_back_to_the_run_folder(tmp_path: Path) -> None:
    writer = RingWriter(SPEC, 20, tmp_path, shared=tmp_path / "missing")
    assert writer.path.parent == tmp_path
    writer.close()
    assert not writer.path.exists()


def test_rings_of_dead_gateways_are_removed_and_live_ones_kept(tmp_path: Path) -> None:
    shared, runs = tmp_path / "shm", [tmp_path / "run0", tmp_path / "run1"]
    for folder in (shared, *runs):
        folder.mkdir()
    live = RingWriter(SPEC, 20, runs[0], shared)
    dead = RingWriter(SPEC, 20, runs[1], shared)
    dead.close(unlink=False)  # as after kill -9: the file stays, the lock is gone
    (shared / "other.ring").touch()
    remove_rings(tmp_path / "run2", shared)
    assert {path.name for path in shared.iterdir()} == {live.path.name, "other.ring"}
    live.close()


def test_a_new_writer_replaces_the_old_file(tmp_path: Path) -> None:
    old = RingWriter(SPEC, 20, tmp_path)
    old.append(0, "online", False, episode_arrays(3, 0))
    reader = RingReader(old.path)
    old.close(unlink=False)  # killed
    new = RingWriter(SPEC, 20, tmp_path)
    assert new.path != old.path
    assert not old.path.exists()
    assert len(reader.episodes()) == 1  # what was mapped stays readable
    with pytest.raises(RingError, match="replaced"):
        RingReader(old.path)
    new.close()


def test_a_file_that_is_no_ring_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.ring").write_bytes(b"hello, this is text")
    with pytest.raises(RingError, match="no replay ring"):
        RingReader(tmp_path / "x.ring")


def _read_concurrently(path: str, ready, stop, results) -> None:
    """Gather the oldest and newest episodes over and over; every frame must carry one single number throughout."""
    reader, torn, good, evicted, backwards, last = RingReader(path), 0, 0, 0, 0, -1
    ready.set()
    while not stop.is_set():
        rows = reader.episodes()
        ordinals = [row.ordinal for row in rows]
        backwards += ordinals != sorted(ordinals) or (bool(ordinals) and ordinals[-1] < last)
        last = ordinals[-1] if ordinals else last
        for row in rows[:1] + rows[-1:]:
            frames = np.arange(row.first_frame, row.first_frame + row.n_ticks + 1)
            try:
                got = reader.gather(frames)
            except Evicted:
                evicted += 1
                continue
            good += 1
            torn += not np.array_equal(got["observation.state"][:, 0], frames.astype(np.float32))
            front = got["observation.images.front"].reshape(len(frames), -1)
            torn += not np.array_equal(front, np.broadcast_to((frames % 251)[:, None], front.shape))
            torn += not np.array_equal(got["policy_version"][:-1], frames[:-1])
    results.put((torn, good, evicted, backwards))


def test_a_concurrent_reader_process_never_sees_a_torn_episode(writer: RingWriter) -> None:
    context = multiprocessing.get_context("spawn")
    ready, stop, results = context.Event(), context.Event(), context.Queue()
    process = context.Process(target=_read_concurrently, args=(str(writer.path), ready, stop, results))
    process.start()
    assert ready.wait(30)
    rng = np.random.default_rng(0)
    for ordinal in range(20000):
        n = int(rng.integers(1, 8))
        writer.append(ordinal, "online", False, episode_arrays(n, writer.head))
    stop.set()
    torn, good, evicted, backwards = results.get(timeout=30)
    process.join(10)
    assert (torn, backwards) == (0, 0)
    assert good > 0
    assert evicted > 0  # the reader was really overtaken at times


LARGE = SimpleNamespace(**vars(SPEC) | {"cameras": {"front": (40, 50), "wrist": (30, 30)}})


def large_arrays(n: int, stamp: int) -> dict[str, np.ndarray]:
    """`episode_arrays` for LARGE."""
    arrays = episode_arrays(n, stamp)
    for camera, size in LARGE.cameras.items():
        key = f"observation.images.{camera}"
        arrays[key] = np.broadcast_to(arrays[key][:, :1, :1], (n + 1, *size, 3))
    return arrays


def share_for(frames: int) -> float:
    """replay.memory_share by which that many of 20 frames keep their pictures in memory."""
    pictures = (frames + 0.5) * (40 * 50 + 30 * 30) * 3 + 2 * 4096
    return (RingLayout(LARGE.cameras, 2, 3, 20, 0).total_bytes + pictures) / psutil.virtual_memory().total


@pytest.mark.parametrize("hot", [1, 7, 19])
def test_pictures_beyond_the_share_of_memory_come_back_from_the_run_folder(tmp_path: Path, caplog, hot: int) -> None:
    writer = RingWriter(LARGE, 20, tmp_path, memory_share=share_for(hot))
    assert (writer.layout.hot, writer.path.parent) == (hot, Path("/dev/shm"))
    assert f"20 frames, {hot} of them in" in caplog.text
    assert f"the pictures of the other {20 - hot}" in caplog.text
    (cold,) = tmp_path.glob("*.cold")
    reader = RingReader(writer.path)
    writer.append(0, "demo", True, large_arrays(4, 100))
    for k in range(1, 12):  # three times around, with a demonstration that moves each time
        writer.append(k, "online", False, large_arrays(4, 5 * k))
        for row in reader.episodes():
            frames = np.arange(row.first_frame, row.first_frame + 5).reshape(1, 5)[:, ::-1]
            got = reader.gather(frames)
            stamps = got["observation.state"][..., 0]
            for camera, modulus in (("front", 251), ("wrist", 241)):
                pictures = got[f"observation.images.{camera}"]
                assert (pictures == (stamps % modulus)[..., None, None, None]).all()
    assert {row.mode for row in reader.episodes()} == {"demo", "online"}
    writer.close()
    assert not cold.exists()
    assert len(reader.episodes()) == 4  # what was opened stays readable
    assert reader.gather(np.array([reader.head - 1]))["observation.images.front"].any()


def test_pictures_of_a_dead_gateway_s_ring_are_removed_from_the_run_folder_and_a_live_one_s_kept(
    tmp_path: Path,
) -> None:
    dead = RingWriter(LARGE, 20, tmp_path, memory_share=share_for(3))
    dead.close(unlink=False)
    assert len(list(tmp_path.glob("*.cold"))) == 1
    live = RingWriter(LARGE, 20, tmp_path, memory_share=share_for(3))
    assert [path.stem for path in tmp_path.glob("*.cold")] == [live.path.stem]
    remove_rings(tmp_path)
    RingReader(live.path)
    live.close()
    assert not list(tmp_path.iterdir())


def test_a_machine_without_room_for_one_picture_in_memory_keeps_the_whole_ring_on_the_disk(tmp_path: Path) -> None:
    writer = RingWriter(LARGE, 20, tmp_path, memory_share=0.0)
    assert (writer.path.parent, writer.layout.cold) == (tmp_path, {})
    writer.close()
