"""The asking end of the round trip in `transport.py`: medians of bare pyzmq and of `infer`, in turn, in one process.

transport.round_trip ─▶ measure(…)                                on this host: bare, over the line, over TCP
transport.round_trip ─▶ python _round_trip.py '{…}' in a network namespace ─▶ {"bare": ms, "link": ms} on stdout
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zmq

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rows import alternate

from serl_transport import TrainerClient, TrainerConfig
from serl_transport.contract.specs import TaskSpec
from serl_transport.wire import codec
from serl_transport.wire.envelope import Envelope

NEAR_IP, FAR_IP = "10.199.78.1", "10.199.78.2"
LINK = ["rate", "1gbit", "burst", "128kb", "latency", "50ms"]  # of tc's token bucket, in both directions


def measure(
    spec: TaskSpec, ip: str, ports: tuple[int, int], bare_port: int, ways: dict[str, bool], n: int, rounds: int
) -> dict[str, float]:
    """p50 in ms of `bare` and of each way to ask; `ways`: name -> whether a line may be used."""
    images = {camera: np.random.default_rng(0).integers(0, 256, (*hw, 3), np.uint8) for camera, hw in
              spec.cameras.items()}  # fmt: skip
    body = {"observation": {"images": images, "state": np.zeros(14, np.float32)}, "prompt": "p", "min_version": 0,
            "seed": None}  # fmt: skip
    question = [Envelope("infer", "a", "b", 0, 1).to_frame(), *codec.pack(body)]
    config = TrainerConfig(port_number=ports[0], broadcast_port=ports[1])
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.connect(f"tcp://{ip}:{bare_port}")

    def bare() -> None:
        dealer.send_multipart(question, copy=False)
        dealer.recv_multipart(copy=False)

    with contextlib.ExitStack() as stack:
        stack.callback(context.destroy, linger=0)
        clients = {}
        for name, line in ways.items():
            clients[name] = client = TrainerClient(name, ip, config, spec=spec, use_line=line)
            stack.callback(client.stop)
            _settle(client, body, line)
        work = {"bare": lambda: p50_ms(bare, n)}
        for name, client in clients.items():
            work[name] = lambda client=client: p50_ms(lambda: client.infer(body), n)
        return alternate(work, rounds)


def p50_ms(call: Callable[[], Any], n: int) -> float:
    """Median duration of `call` in milliseconds, after a warm-up."""
    for _ in range(10):
        call()
    times = []
    for _ in range(n):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


@contextlib.contextmanager
def namespace() -> Iterator[str | None]:
    """A network namespace at the other end of a 1 Gbit/s cable; None where this user may not make one."""
    name, near, far = f"bench{os.getpid()}", f"bv{os.getpid() % 99999}a", f"bv{os.getpid() % 99999}b"
    steps = (
        ("ip", "netns", "add", name),
        ("ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", name),
        ("ip", "addr", "add", f"{NEAR_IP}/30", "dev", near),
        ("ip", "link", "set", near, "up"),
        ("ip", "-n", name, "addr", "add", f"{FAR_IP}/30", "dev", far),
        ("ip", "-n", name, "link", "set", far, "up"),
        ("tc", "qdisc", "add", "dev", near, "root", "tbf", *LINK),
        ("tc", "-n", name, "qdisc", "add", "dev", far, "root", "tbf", *LINK),
    )
    try:
        made = all(_run(*words) for words in steps)
        if not made:
            print("no network namespace with a 1 Gbit/s link can be made here: no row for one", file=sys.stderr)
        yield name if made else None
    finally:
        _run("ip", "link", "del", near)
        _run("ip", "netns", "del", name)


def measure_in(name: str, **options: Any) -> dict[str, float]:
    """`measure` in a network namespace."""
    command = ["ip", "netns", "exec", name, sys.executable, __file__, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return json.loads(done.stdout.splitlines()[-1])


def _settle(client: TrainerClient, body: dict[str, Any], line: bool) -> None:
    """Ask until the question takes the way that is to be measured."""
    deadline = time.monotonic() + 20
    client.infer(body)
    while client.asks_over_line != line:
        if time.monotonic() > deadline:
            raise RuntimeError("the gateway offers no line to an actor of its own host")
        client.infer(body)


def _run(*words: str) -> bool:
    try:
        return subprocess.run(words, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps(measure(**(given | {"spec": TaskSpec.from_dict(given["spec"])}))))
