"""What the console costs while somebody only looks: four pictures five times a second, in a real Chromium.

`bash test.sh -m browser`. The gateway, the console's process and the browser are real; the actor is a client that sends
the same pictures again and again.
"""

import io
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest
from chromium import Chromium, find
from gateway_samples import config, connected, serving
from omegaconf import OmegaConf
from PIL import Image, ImageFilter

from serl_launcher.run.console import lay_out
from serl_launcher.run.paths import RunPaths

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(find() is None, reason="no Chromium here: apt-get install chromium"),
]
CONSOLE = {"port": "auto", "host": "127.0.0.1", "hosts": [], "name": "console", "tls_cert": None, "tls_key": None}
LOOK_S, SHARE = 15.0, 0.02


def pictures(n):
    """JPEGs of 160 x 120 pixels with as much in them as a camera's."""
    rng = np.random.default_rng(0)
    for _ in range(n):
        image = Image.fromarray(rng.integers(0, 255, (120, 160, 3), np.uint8)).filter(ImageFilter.GaussianBlur(2))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=60)
        yield file.getvalue()


def sending(actor, ended):
    shots = list(pictures(12))
    views = [dict(zip(("front", "side", "wrist", "top"), shots[k : k + 4], strict=True)) for k in (0, 4, 8)]
    count = 0
    while not ended.wait(0.2):
        count += 1
        actor.request("live", {"pictures": views[count % 3], "driver": "policy", "tick": count, "stage": "online"})


def test_four_tiles_at_five_hertz_cost_two_percent_of_a_core_and_the_first_paint_a_second(tmp_path):
    paths = RunPaths(tmp_path / "run")
    ended = threading.Event()
    with serving(paths.root) as gateway, connected(gateway) as actor:
        ports = {"port": gateway.port, "broadcast_port": gateway.broadcast_port, "console": CONSOLE}
        cfg = OmegaConf.create(config() | ports)
        OmegaConf.save(cfg, paths.config)
        place = lay_out(cfg, paths)
        role = subprocess.Popen([sys.executable, "-m", "serl_launcher.console", str(paths.root)])
        chromium = Chromium(tmp_path / "profile")
        sender = threading.Thread(target=sending, args=(actor, ended))
        sender.start()
        try:
            page = chromium.page(390, 844)
            deadline = time.monotonic() + 30
            while True:
                page.open(place.url)
                if page.js("location.protocol") == "http:":
                    break
                assert time.monotonic() < deadline
                time.sleep(0.2)
            page.wait("document.querySelectorAll('.tiles img').length === 4")
            shown = page.js("document.querySelector('.tiles img').src")
            page.wait(f"document.querySelector('.tiles img').src !== {shown!r}")  # they move
            before, began = cpu_s(role.pid), time.monotonic()
            time.sleep(LOOK_S)
            busy = (cpu_s(role.pid) - before) / (time.monotonic() - began)
            paint_ms = page.js("performance.getEntriesByName('first-contentful-paint')[0].startTime")
            print(f"busy {busy:.4f} of a core, first paint {paint_ms:.0f} ms")
            assert page.errors == []
            page.close()
            time.sleep(4.0)
            assert not actor.watched  # nobody looks: nothing is sent
            before, began = cpu_s(role.pid), time.monotonic()
            time.sleep(5.0)
            alone = (cpu_s(role.pid) - before) / (time.monotonic() - began)
        finally:
            ended.set()
            sender.join()
            chromium.close()
            role.terminate()
            assert role.wait(10) == 0
    assert busy < SHARE
    assert alone < 0.005
    assert paint_ms < 1000


def cpu_s(pid):
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system
