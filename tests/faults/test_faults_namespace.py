"""Two network namespaces: a bind beyond loopback, keys on both sides, and a cable that is pulled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import keygen
import pytest
from rig import HERE, environment, p99_ms

HERE_IP, THERE_IP = "10.199.77.1", "10.199.77.2"


def run_ip(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


@pytest.fixture
def namespace():
    """A namespace joined to this one by a virtual cable; skipped where this user may not make one."""
    name, here, there = f"faults{os.getpid()}", f"fv{os.getpid() % 99999}a", f"fv{os.getpid() % 99999}b"
    made = run_ip("netns", "add", name)
    if made.returncode:
        pytest.skip(f"cannot make a network namespace here: {made.stderr.strip()}")
    try:
        for words in (
            ("link", "add", here, "type", "veth", "peer", "name", there, "netns", name),
            ("addr", "add", f"{HERE_IP}/30", "dev", here),
            ("link", "set", here, "up"),
            ("-n", name, "addr", "add", f"{THERE_IP}/30", "dev", there),
            ("-n", name, "link", "set", there, "up"),
            ("-n", name, "link", "set", "lo", "up"),
        ):
            done = run_ip(*words)
            if done.returncode:
                pytest.skip(f"cannot make a virtual cable here: ip {' '.join(words)}: {done.stderr.strip()}")
        yield name, here
    finally:
        run_ip("link", "del", here)
        run_ip("netns", "del", name)


def test_a_pulled_cable_between_two_hosts_with_keys(rig, namespace, figures, tmp_path):
    name, cable = namespace
    keys = tmp_path / "keys"
    assert keygen.main([str(keys), "--actor", "robot-1"]) == 0
    run = rig(bind_host=HERE_IP, security={"keys_dir": str(keys), "allow_list": None})
    run.start_gateway()
    options = {"run": str(run.run), "name": "robot-1", "ip": HERE_IP, "port": run.ports[0],
               "broadcast_port": run.ports[1], "keys_dir": str(keys), "hz": run.hz, "pixels": run.pixels}  # fmt: skip
    actor = subprocess.Popen(
        ["ip", "netns", "exec", name, sys.executable, str(HERE / "fault_actor.py"), json.dumps(options)],
        env=environment(), stderr=(run.run / "robot-1.log").open("w"),
    )  # fmt: skip
    run.actors.append(actor)
    run.await_acknowledged(10, 60)
    time.sleep(3)
    began = time.monotonic()
    run_ip("link", "set", cable, "down")
    time.sleep(6)
    run_ip("link", "set", cable, "up")
    ended = time.monotonic()
    back_s = run.await_acknowledged(1, 30)
    report = run.finish(actor)
    run.stop_gateway()
    counts = run.judge()
    assert counts["items in the journal"] == report["sent"]
    acted = sum(began < at < ended for at, _ in report["periods"])
    ratio = p99_ms(report, began, ended) / p99_ms(report, 0, began)
    figures.row(
        "pulled_cable", "the actor keeps acting, data back within 10 s", back_s <= 10 and acted > 5 * run.hz,
        back_s=round(back_s, 2), period_p99_ratio=round(ratio, 3), ticks=acted,
    )  # fmt: skip
    assert acted > 5 * run.hz
    assert back_s <= 10
