"""The gateway as a process: kill -9 in mid-stream loses and doubles nothing; mistakes are one line; no torch."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import yaml
from gateway_samples import config
from replay_samples import SPEC, batches, info, journal_items, wait_for

from serl_launcher.replay.episodes import journal_episodes
from serl_transport.client import TrainerClient
from serl_transport.config import TrainerConfig


def free_ports() -> tuple[int, int]:
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]


def start(run_dir: Path) -> subprocess.Popen:
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    return subprocess.Popen(
        [sys.executable, "-m", "serl_launcher.gateway", str(run_dir)],
        env=environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def write_config(run_dir: Path, **changes) -> tuple[int, int]:
    ports = free_ports()
    cfg = config(port=ports[0], broadcast_port=ports[1], **changes)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(cfg))
    return ports


def test_kill_9_in_mid_stream_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    port, broadcast = write_config(tmp_path)
    process = start(tmp_path)
    client = TrainerClient(
        "a", "127.0.0.1", TrainerConfig(port_number=port, broadcast_port=broadcast), spec=SPEC,
        ledger_path=tmp_path / "acks.jsonl",
    )  # fmt: skip
    sent = 0
    try:
        for _ in range(3):
            until = time.monotonic() + 0.4
            while time.monotonic() < until:
                for part in batches(info(f"e{sent}", boot=client.boot_id), (3, 3, 2)):
                    client.send_item(part.to_body())
                sent += 1
                time.sleep(0.002)
            process.kill()
            process.communicate()
            process = start(tmp_path)
        assert client.flush(30)
        process.send_signal(signal.SIGTERM)
        stopping = time.monotonic()
        _, log = process.communicate(timeout=10)
        assert process.returncode == 0, log
        assert time.monotonic() - stopping < 5
        assert "Traceback" not in log
    finally:
        client.stop()
        process.kill()
        process.wait()
    acknowledged = (tmp_path / "acks.jsonl").read_text().count("\n")
    assert acknowledged >= 3 * sent
    keys = [item.key for item in journal_items(tmp_path, SPEC)]
    assert sorted(keys) == [("a", client.boot_id, seq) for seq in range(1, 3 * sent + 1)]
    episodes = [episode for _, episode in journal_episodes(tmp_path, SPEC)]
    assert sorted(episode.info.episode_id for episode in episodes) == sorted(f"e{k}" for k in range(sent))
    assert {episode.n for episode in episodes} == {8}
    assert (tmp_path / "episodes.jsonl").read_text().count("\n") == sent


def complaint(run_dir: Path) -> str:
    process = start(run_dir)
    _, text = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "Traceback" not in text
    return text.strip()


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    assert "config.yaml" in complaint(tmp_path)
    write_config(tmp_path, schedule__stages=[{"name": "x", "mode": "evel"}])
    assert complaint(tmp_path).startswith("gateway: schedule.stages.0.mode: expected one of demo, train, eval, online")
    write_config(tmp_path, replay__capacity_frames=10)
    assert "replay.capacity_frames: expected at least 61" in complaint(tmp_path)
    write_config(tmp_path, bind_host="0.0.0.0")
    assert "insecure" in complaint(tmp_path)
    port, _ = write_config(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        assert f"{port}" in complaint(tmp_path)


def test_a_second_gateway_of_the_same_run_is_refused(tmp_path: Path) -> None:
    write_config(tmp_path)
    first = start(tmp_path)
    try:
        wait_for(lambda: (tmp_path / "status.json").exists(), 30)
        write_config(tmp_path)  # other ports: only the folder collides
        assert f"pid {first.pid}" in complaint(tmp_path)
    finally:
        first.terminate()
        first.communicate(timeout=10)
    assert first.returncode == 0


def test_the_gateway_imports_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import serl_launcher.gateway.__main__, serl_launcher.run.internal, serl_launcher.replay.ring\n"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('lerobot', 'transformers', 'jax')]\n"
    )
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
