"""The exporter role on a real journal: following, kill -9, rebuilding, foreign datasets, LeRobot's own reader."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from run_samples import SPEC, entries, episode, write_config, write_journal

from serl_launcher.exporter import __main__ as exporter_main
from serl_launcher.exporter.__main__ import main
from serl_launcher.exporter.role import Exporter, ExporterOptions


def exported(run_dir: Path) -> list[int]:
    """Ordinals of the dataset's episodes, checked against its rows."""
    root = run_dir / "dataset"
    rows = [row for path in sorted(root.glob("meta/episodes/*/*.parquet")) for row in pq.read_table(path).to_pylist()]
    data = [pq.read_table(path) for path in sorted(root.glob("data/*/*.parquet"))]
    seen = np.concatenate([table["complementary_info.episode_ordinal"].to_numpy() for table in data])
    assert np.array_equal(seen, np.repeat([r["episode_ordinal"] for r in rows], [r["length"] for r in rows]))
    assert json.loads((root / "meta/info.json").read_text())["total_episodes"] == len(rows)
    return [row["episode_ordinal"] for row in rows]


def exporter(run_dir: Path, **options: object) -> Exporter:
    return Exporter(run_dir, SPEC, ExporterOptions(**options), video=False)


def test_it_follows_a_growing_journal_and_commits_in_batches(tmp_path):
    write_config(tmp_path)
    every = entries([episode(index) for index in range(8)])
    one = exporter(tmp_path, batch_episodes=3, period_s=1000.0)
    one.poll()
    assert not (tmp_path / "dataset").exists()  # nothing to show is no dataset
    write_journal(tmp_path, every[:3])  # one and a half episodes
    one.poll()
    assert exported(tmp_path) == [0]  # the first is shown at once
    write_journal(tmp_path, every[3:7])
    one.poll()
    assert exported(tmp_path) == [0]  # two more wait for a third
    write_journal(tmp_path, every[7:])
    one.poll()
    assert exported(tmp_path) == list(range(7))
    one.poll(flush=True)
    assert exported(tmp_path) == list(range(8))
    status = json.loads((tmp_path / "dataset_status.json").read_text())
    frames = sum(episode(index).n for index in range(8))
    assert status == {"episodes": 8, "frames": frames, "last_ordinal": 7, "quarantined": 0}
    one.close()


def test_an_old_batch_is_committed(tmp_path):
    write_config(tmp_path)
    write_journal(tmp_path, entries([episode(0)]))
    one = exporter(tmp_path, batch_episodes=50, period_s=0.0)
    one.poll()
    write_journal(tmp_path, entries([episode(1)], first_seq=3))
    one.poll()
    assert exported(tmp_path) == [0, 1]
    one.close()


def test_kill_9_again_and_again_then_lerobot_reads_every_episode_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    count = 14
    write_config(tmp_path, batch_episodes=1, period_s=0.0)
    every = entries([episode(index) for index in range(count)])
    write_journal(tmp_path, every[:21])  # ten episodes and a half
    kills = 0
    for attempt in range(4):
        process = subprocess.Popen([sys.executable, "-m", "serl_launcher.exporter", str(tmp_path)])
        deadline = time.monotonic() + 120  # a disk that writes back gigabytes makes each fsync wait
        goal = (attempt + 1) * 2
        while len(list((tmp_path / "dataset").glob("data/*/*.parquet"))) < goal and process.poll() is None:
            assert time.monotonic() < deadline, "the exporter wrote nothing"
            time.sleep(0.002)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert kills >= 2
    write_config(tmp_path, batch_episodes=4)
    write_journal(tmp_path, every[21:])
    (tmp_path / "dataset_status.json").unlink()
    process = subprocess.Popen([sys.executable, "-m", "serl_launcher.exporter", str(tmp_path)])
    while not (tmp_path / "dataset_status.json").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)  # a stop exports what is journalled
    assert process.wait(120) == 0
    assert exported(tmp_path) == list(range(count))
    _check_with_lerobot(tmp_path / "dataset", count)


def _check_with_lerobot(root: Path, count: int) -> None:
    from lerobot.datasets import LeRobotDataset

    dataset = LeRobotDataset("local/toy", root=root)
    assert dataset.num_episodes == count
    row = 0
    for index in range(count):
        item = episode(index)
        for tick in (0, item.n - 1):
            sample = dataset[row + tick]
            assert sample["complementary_info.episode_ordinal"].item() == index
            assert sample["task"] == SPEC.prompt
            assert np.array_equal(sample["action"].numpy(), item.arrays["action"][tick])
            image = (sample["observation.images.front"].numpy() * 255).round().astype(np.uint8).transpose(1, 2, 0)
            assert np.array_equal(image, item.arrays["observation.images.front"][tick])
        row += item.n
    assert len(dataset) == row


def test_a_dataset_of_other_features_is_built_anew(tmp_path):
    write_config(tmp_path)
    write_journal(tmp_path, entries([episode(index) for index in range(3)]))
    one = Exporter(tmp_path, SPEC, ExporterOptions(), video=True)
    one.poll(flush=True)
    one.close()
    two = exporter(tmp_path)  # exporter.video was changed
    two.poll()
    two.close()
    assert exported(tmp_path) == [0, 1, 2]
    assert not (tmp_path / "dataset/videos").exists()
    assert sorted(path.name for path in tmp_path.glob("dataset*")) == ["dataset", "dataset_status.json"]


def test_a_foreign_dataset_is_kept_aside(tmp_path):
    for name, indices in (("a", (0, 1)), ("b", (5, 6, 7))):
        write_config(tmp_path / name)
        write_journal(tmp_path / name, entries([episode(index) for index in indices]))
        one = exporter(tmp_path / name)
        one.poll(flush=True)
        one.close()
    (tmp_path / "b/dataset").rename(tmp_path / "b/moved")
    (tmp_path / "a/dataset").rename(tmp_path / "b/dataset")
    one = exporter(tmp_path / "b")
    one.poll(flush=True)
    one.close()
    assert exported(tmp_path / "b") == [0, 1, 2]
    (kept,) = (tmp_path / "b").glob("dataset.foreign-*")
    assert len(list(kept.glob("data/*/*.parquet"))) == 1


def test_a_kill_between_the_two_renames_of_a_rebuild(tmp_path):
    write_config(tmp_path)
    write_journal(tmp_path, entries([episode(index) for index in range(3)]))
    one = exporter(tmp_path)
    one.poll(flush=True)
    one.close()
    shutil.copytree(tmp_path / "dataset", tmp_path / "dataset.replaced")
    (tmp_path / "dataset").rename(tmp_path / "dataset.staging")
    two = exporter(tmp_path)
    two.poll()
    two.close()
    assert exported(tmp_path) == [0, 1, 2]
    assert sorted(path.name for path in tmp_path.glob("dataset*")) == ["dataset", "dataset_status.json"]


def test_a_foreign_dataset_in_the_staging_folder_is_not_continued(tmp_path):
    for name, indices in (("a", (0, 1)), ("b", (5, 6, 7))):
        write_config(tmp_path / name)
        write_journal(tmp_path / name, entries([episode(index) for index in indices]))
    one = exporter(tmp_path / "a")
    one.poll(flush=True)
    one.close()
    (tmp_path / "a/dataset").rename(tmp_path / "b/dataset.staging")
    two = exporter(tmp_path / "b")
    two.poll(flush=True)
    two.close()
    assert exported(tmp_path / "b") == [0, 1, 2]
    rows = pq.read_table(tmp_path / "b/dataset/meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [row["episode_id"] for row in rows] == ["episode-5", "episode-6", "episode-7"]


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda run: None, "does not exist: expected a run's folder"),
        (lambda run: run.mkdir(), "config.yaml does not exist"),
        (lambda run: write_config(run, batch_episode=3), "unexpected keyword argument 'batch_episode'"),
        (lambda run: write_config(run, video="maybe"), "expected auto, true or false, got 'maybe'"),
    ],
)
def test_mistakes_end_with_one_line(tmp_path, capsys, prepare, message):
    run = tmp_path / "run"
    prepare(run)
    assert main([str(run), "--once"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_only_one_exporter_per_run(tmp_path):
    write_config(tmp_path)
    command = [sys.executable, "-m", "serl_launcher.exporter", str(tmp_path)]
    first = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "dataset.lock").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        second = subprocess.run([*command, "--once"], capture_output=True, text=True, timeout=60)
    finally:
        first.terminate()
        assert first.wait(30) == 0
    assert second.returncode == 1
    assert "another exporter is at work" in second.stderr


def test_told_to_end_while_it_waits_for_room_it_tries_once_more(tmp_path, monkeypatch):
    """The disk has room again by then: the dataset is whole when it leaves."""
    write_config(tmp_path, batch_episodes=4)
    write_journal(tmp_path, entries([episode(index) for index in range(8)]))
    opened, refused = exporter_main.Exporter, []

    def open_one(*words):
        if not refused:
            refused.append(threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)))
            refused[0].start()
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(*words)

    monkeypatch.setattr(exporter_main, "Exporter", open_one)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        assert main([str(tmp_path)]) == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert exported(tmp_path) == list(range(8))


def test_a_full_disk_is_waited_for(tmp_path):
    """A write that fails (here: a file-size limit, as on a full disk) loses nothing once it works again."""
    write_config(tmp_path, batch_episodes=4)
    write_journal(tmp_path, entries([episode(index) for index in range(8)]))
    code = "import resource, sys, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));"
    code += "from serl_launcher.exporter.__main__ import main; sys.exit(main(sys.argv[1:]))"
    # Coverage's own data file would hit the limit too, and say so in a traceback.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("COVERAGE_")}
    command = [sys.executable, "-c", code, str(tmp_path), "--once"]
    full = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert full.returncode == 1
    assert "File too large" in full.stderr
    assert "Traceback" not in full.stderr
    assert main([str(tmp_path), "--once"]) == 0
    assert exported(tmp_path) == list(range(8))
    assert not list(tmp_path.rglob("*.part"))
