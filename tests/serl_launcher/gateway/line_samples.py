"""Policies, clients and memory counts for the tests of lines between actors and a gateway on one host."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from replay_samples import wait_for

from serl_launcher.run.internal import PolicyLink
from serl_transport.client import TrainerClient
from serl_transport.contract.errors import NotReady

IMAGE = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)
Answer = Callable[[dict[str, Any]], Any]


def echo(body: dict[str, Any]) -> Any:
    return {"sum": int(body["image"].sum(dtype=np.int64)), "actions": np.zeros((50, 32), np.float32)}


@contextmanager
def policy(run_dir: Path, answer: Answer = echo) -> Iterator[list[dict[str, Any]]]:
    """A policy server in a thread; the bodies it has seen. `answer` may return None: no answer."""
    seen: list[dict[str, Any]] = []
    stop = threading.Event()
    link = PolicyLink(run_dir)

    def run() -> None:
        told = 0.0
        while not stop.is_set():
            if time.monotonic() - told > 0.2:
                link.serving(version=1)
                told = time.monotonic()
            request = link.receive(0.05)
            if request is not None:
                seen.append(
                    {key: value for key, value in request.body.items() if key != "image"}
                )  # a view of the memory
                result = answer(request.body)
                if result is not None:
                    link.reply(request.token, result)
            del request

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()
        link.close()


def over_line(client: TrainerClient, body: dict[str, Any] | None = None) -> TrainerClient:
    """Ask until questions go over the line."""

    def ask() -> bool:
        try:
            client.infer(body or {"image": IMAGE})
        except NotReady:
            return False
        return client.asks_over_line

    wait_for(ask)
    return client


def memories() -> int:
    """Descriptors and mappings of lines' memory in this process, which is client, gateway and policy server at once."""
    names = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue
    return sum("flowserl-line" in name for name in [*names, *Path("/proc/self/maps").read_text().splitlines()])
