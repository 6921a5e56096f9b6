"""One actor of the serving suite, a process without torch: asks for actions in a closed loop.

    python _serving_actor.py <run_dir> <port> <broadcast_port> <name>

Reads lines `<begin> <end>` (monotonic seconds of this host) on stdin; answers each with one JSON line: the latencies of
the answers within, in ms, their versions, and errors.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf

from serl_transport import TrainerClient, TrainerConfig
from serl_transport.contract.errors import WireError
from serl_transport.contract.specs import TaskSpec


def ask_until(client: TrainerClient, body: dict, begin: float, end: float) -> dict:
    """Everything asked between the two times."""
    found = {"ms": [], "versions": [], "errors": []}
    while (asked := time.monotonic()) < end:
        try:
            version = client.infer(body, timeout_ms=10_000)["policy_version"]
        except WireError as error:
            found["errors"].append(f"{error.code}: {error.message}")
            continue
        if asked >= begin:
            found["ms"].append((time.monotonic() - asked) * 1e3)
            found["versions"].append(version)
    return found


def main(run_dir: str, port: str, broadcast: str, name: str) -> None:
    """Serve the lines of stdin."""
    cfg = OmegaConf.load(Path(run_dir) / "config.yaml")
    spec = TaskSpec.from_dict(OmegaConf.to_container(cfg.task.spec, resolve=True))
    rng = np.random.default_rng(hash(name) % 2**32)
    images = {camera: rng.integers(0, 256, (*size, 3), dtype=np.uint8) for camera, size in spec.cameras.items()}
    state = np.asarray(spec.state_low, np.float32)
    body = {"observation": {"images": images, "state": state}, "prompt": spec.prompt, "mode": "online"}
    ports = TrainerConfig(port_number=int(port), broadcast_port=int(broadcast))
    client = TrainerClient(name, "127.0.0.1", ports, spec=spec)
    print("ready", flush=True)
    for line in sys.stdin:
        begin, end = map(float, line.split())
        print(json.dumps(ask_until(client, body, begin, end)), flush=True)
    client.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
