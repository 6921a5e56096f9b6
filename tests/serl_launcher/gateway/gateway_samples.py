"""A real gateway in a thread and real clients against it, on free ports."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from replay_samples import SPEC

from serl_launcher.gateway.app import Gateway
from serl_launcher.gateway.settings import GatewaySettings
from serl_launcher.run.paths import RunPaths
from serl_transport.client import TrainerClient
from serl_transport.config import TrainerConfig

STAGES = [
    {"name": "demos", "mode": "demo", "episodes": 2},
    {"name": "sft", "mode": "train", "steps": 10},
    {"name": "before", "mode": "eval", "episodes": 2},
    {"name": "online", "mode": "online", "steps": 5},
]


def config(**changes: Any) -> dict[str, Any]:
    """A whole config; keys with dots go deep."""
    cfg: dict[str, Any] = {
        "run": "t",
        "seed": 0,
        "port": 0,
        "broadcast_port": 0,
        "bind_host": "127.0.0.1",
        "insecure": False,
        "task": {"spec": SPEC.to_dict()},
        "schedule": {"stages": STAGES},
        "replay": {"capacity_frames": 400},
        "journal": {"segment_mb": 1},
        "gateway": {"dead_actor_s": 30.0, "unticketed": "auto"},
    }
    for key, value in changes.items():
        node, parts = cfg, key.split("__")
        for part in parts[:-1]:
            node = node[part]
        node[parts[-1]] = value
    return cfg


@contextmanager
def serving(run_dir: Path, **changes: Any) -> Iterator[Gateway]:
    """A gateway that serves in a thread."""
    run_dir.mkdir(exist_ok=True)
    gateway = Gateway(GatewaySettings.of(config(**changes)), RunPaths(run_dir))
    thread = threading.Thread(target=gateway.run)
    thread.start()
    try:
        yield gateway
    finally:
        gateway.stop()
        thread.join(10)
        assert not thread.is_alive()


@contextmanager
def connected(gateway: Gateway, name: str = "a", **options: Any) -> Iterator[TrainerClient]:
    """A client of that gateway."""
    ports = TrainerConfig(port_number=gateway.port, broadcast_port=gateway.broadcast_port)
    client = TrainerClient(name, "127.0.0.1", ports, spec=SPEC, wait_for_server=False, **options)
    try:
        yield client
    finally:
        client.stop()
