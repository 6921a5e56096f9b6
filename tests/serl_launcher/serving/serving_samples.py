"""A real gateway and a real policy server in threads of this process, and clients against them, on free ports."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from tiny import SPEC, tiny_config, tiny_policy

from serl_launcher.gateway.app import Gateway
from serl_launcher.gateway.settings import GatewaySettings
from serl_launcher.policies.base import trainable
from serl_launcher.run.parameters import base_sha256, publish
from serl_launcher.run.paths import RunPaths
from serl_launcher.serving.server import PolicyServer
from serl_transport.client import TrainerClient
from serl_transport.config import TrainerConfig


def put(folder: Path, version: int, shift: float = 0.0, damage: bool = False) -> None:
    """Publish the tiny policy as `version`, its weights moved by `shift`, or with a tensor missing."""
    policy = tiny_policy()
    tensors = {n: p.detach() + shift for n, p in trainable(policy).items()}
    if damage:
        tensors.pop("core.action_out_proj.bias")
    publish(folder, tensors, version=version, step=0, base=base_sha256(policy), policy="t", now=0.0, keep=3)


def body(seed: int = 0, **extra: Any) -> dict[str, Any]:
    """An `infer` body of the tiny task; `seed` draws the observation."""
    rng = np.random.default_rng(seed)
    images = {camera: rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for camera in SPEC.cameras}
    return {"observation": {"images": images, "state": rng.uniform(0, 1, 3).astype(np.float32)}, "seed": 1} | extra


def wait_for(question: Callable[[], Any], seconds: float = 20.0) -> Any:
    """The first true answer."""
    deadline = time.monotonic() + seconds
    while not (answer := question()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)
    return answer


@contextmanager
def running(run_dir: Path, **changes: Any) -> Iterator[tuple[Gateway, PolicyServer]]:
    """Both, serving version 0; `changes` as in `tiny_config`."""
    paths = RunPaths(run_dir)
    put(paths.params, 0)
    cfg = tiny_config(**{"port": 0, "broadcast_port": 0, "replay__capacity_frames": 400, **changes})
    cfg.schedule = {"stages": []}
    gateway = Gateway(GatewaySettings.of(OmegaConf.to_container(cfg)), paths)
    server = PolicyServer(cfg, paths)
    threads = [threading.Thread(target=gateway.run), threading.Thread(target=server.run)]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: gateway.forwarder.to_status()["alive"])
        yield gateway, server
    finally:
        server.stop()
        threads[1].join(20)
        gateway.stop()
        threads[0].join(20)
        assert not any(thread.is_alive() for thread in threads)


@contextmanager
def connected(gateway: Gateway, name: str = "a") -> Iterator[TrainerClient]:
    """An actor's client."""
    ports = TrainerConfig(port_number=gateway.port, broadcast_port=gateway.broadcast_port)
    client = TrainerClient(name, "127.0.0.1", ports, spec=SPEC, wait_for_server=False)
    try:
        yield client
    finally:
        client.stop()
