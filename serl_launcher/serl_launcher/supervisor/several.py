"""The trainer as several processes, a rank each: `python -m serl_launcher.supervisor.several <plan> <module> [args]`.

    supervisor ─▶ this ─┬▶ lifeline ─▶ rank 0      plan: {"here": 2, "world": 2, "first": 0, "threads": 1,
                        └▶ lifeline ─▶ rank 1             "address": null, "port": null} as JSON

They are one for the supervisor: of one process group, so that its signals reach each; rank 0 alone beats and says that
it is up. When one of them fails the others are killed, and this ends as that one did. What ends the training without
a failure is rank 0's to say: SIGTERM goes to it, and the others follow. Torch-free: torchrun would give each rank a
session of its own, out of reach of the supervisor's kill, and half a minute to a rank that hangs.
"""

import contextlib
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from typing import Any

from serl_config.process import free_port
from serl_launcher.run.alive import BEAT_FILE
from serl_launcher.run.ready import STARTING_FILE

LAST_WORDS_S = 1.0  # for the others to write why they cannot go on
SIOCGIFADDR = 0x8915  # of Linux: the address of an interface
FOLLOW_S = 60.0  # for the others to end after rank 0 did


def main(argv: list[str]) -> int:
    """Start the ranks of this host and wait; returns the exit code of the trainer."""
    plan, command = json.loads(argv[0]), [sys.executable, "-m", "serl_launcher.supervisor.lifeline", *argv[1:]]
    port = plan["port"] or free_port()
    ranks = [subprocess.Popen(command, env=_environment(plan, local, port)) for local in range(plan["here"])]
    stops: list[int] = []

    def stop(signum: int, _: object) -> None:
        stops.append(signum)
        _send(ranks[:1], signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    try:
        number, code = _wait(ranks)
        if code:
            print(f"rank {plan['first'] + number} ended ({_cause(code)}): the others end with it", flush=True)
            _end(ranks, FOLLOW_S if stops else LAST_WORDS_S)
            code = 2 if 2 in [rank.returncode for rank in ranks] else code
        else:
            _end(ranks, FOLLOW_S)
    finally:
        _send(ranks, signal.SIGKILL)
    if code < 0:  # end as it did
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    return code


def _environment(plan: dict[str, Any], local: int, port: int) -> dict[str, str]:
    rank = plan["first"] + local
    mine = {
        "RANK": rank,
        "LOCAL_RANK": local,
        "WORLD_SIZE": plan["world"],
        "LOCAL_WORLD_SIZE": plan["here"],
        "GROUP_RANK": plan["first"] // plan["here"],
        "MASTER_ADDR": plan["address"] or "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": plan["threads"],
    }
    if plan["address"] and (interface := _interface_to(plan["address"])):  # else gloo takes what the host's name says
        mine |= {key: os.environ.get(key, interface) for key in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
    silent = {} if local == 0 else {BEAT_FILE: None, STARTING_FILE: None}
    return {k: str(v) for k, v in {**os.environ, **mine, **silent}.items() if v is not None}


def _interface_to(address: str) -> str | None:
    """The network interface by which this machine reaches an address, its own included; None: not known."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # sends nothing
        except OSError:
            return None
        mine = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                asked = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if asked[20:24] == mine:
                    return name
    return None


def _wait(ranks: list[subprocess.Popen]) -> tuple[int, int]:
    """Which rank ended first with a failure, or rank 0 without one, and its exit code."""
    while True:
        codes = [rank.poll() for rank in ranks]
        for number, code in enumerate(codes):
            if code or (code == 0 and number == 0):
                return number, code
        time.sleep(0.05)


def _end(ranks: list[subprocess.Popen], seconds: float) -> None:
    """Wait so long for all of them, then kill."""
    deadline = time.monotonic() + seconds
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
    if late := [str(number) for number, rank in enumerate(ranks) if rank.poll() is None]:
        print(f"killing ranks {', '.join(late)} of this host, which did not end within {seconds:.0f} s", flush=True)
    _send(ranks, signal.SIGKILL)
    for rank in ranks:
        rank.wait()


def _send(ranks: list[subprocess.Popen], signum: signal.Signals) -> None:
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            rank.send_signal(signum)


def _cause(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
