"""The console in a real Chromium: a small quick start is watched, driven and judged from its page, then let go.

`bash test.sh -m browser`. Every process is real: start.sh, its roles, the actor, the browser.
"""

import json
import os
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from chromium import Chromium, find

from serl_launcher.replay.episodes import journal_episodes
from serl_launcher.run.config import read_config, task_spec

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(find() is None, reason="no Chromium here: apt-get install chromium"),
    pytest.mark.timeout(600),
]
ROOT = Path(__file__).parents[2]
PATIENCE_S = 240.0
RELEASE_S = 0.3
BADGE = "document.querySelector('.badge')?.innerText"
# A standard gamepad that no hand holds: window.pad is what its buttons and sticks are.
GAMEPAD = """
window.pad = { connected: true, mapping: "standard", axes: [0, 0, 0, 0],
               buttons: Array.from({ length: 17 }, () => ({ pressed: false })) };
navigator.getGamepads = () => [window.pad];
"""


class QuickStart:
    """`start.sh operator=browser` in small, with an online stage that does not end by itself."""

    def __init__(self, folder: Path, ports: tuple[int, int]) -> None:
        self.folder = folder / "hands"
        words = [
            "run=hands", f"runs_dir={folder}", f"port={ports[0]}", f"broadcast_port={ports[1]}", "operator=browser",
            "task.spec.max_ticks=300", "schedule.stages.0.episodes=1", "schedule.stages.1.steps=10",
            "schedule.stages.2.episodes=1", "schedule.stages.3.steps=100000", "trainer.publish_period=10",
            "replay.capacity_frames=8000", "rollout.video_every=1",
        ]  # fmt: skip
        self._log = (folder / "start.log").open("w+")
        self.process = subprocess.Popen(
            ["bash", "start.sh", "--no-tmux", *words], cwd=ROOT, stdout=self._log, stderr=subprocess.STDOUT,
            start_new_session=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip

    def screen(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def url(self) -> str:
        """As the learner prints it."""
        self.wait(lambda: "console: http" in self.screen(), "the learner prints the console's address")
        url = self.screen().split("console: ", 1)[1].split()[0]
        log = self.folder / "logs/console.log"
        self.wait(lambda: log.exists() and "console at" in log.read_text(), "the console serves")
        return url

    def rows(self) -> list[dict]:
        """Closed episodes."""
        try:
            return [json.loads(line) for line in (self.folder / "episodes.jsonl").read_text().splitlines()]
        except FileNotFoundError:
            return []

    def status(self) -> dict:
        return json.loads((self.folder / "status.json").read_text())

    def accepted(self, row: dict) -> bool | None:
        """Is that episode imitated, by the newest verdict? None: it is not judged yet."""
        verdicts = [json.loads(line) for line in (self.folder / "acceptance.jsonl").read_text().splitlines()]
        return next((v["accepted"] for v in reversed(verdicts) if v["ordinal"] == row["ordinal"]), None)

    def wait(self, condition, what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, f"never: {what}; {self.screen()[-3000:]}"
            assert self.process.poll() is None, f"it ended; {self.screen()[-3000:]}"
            time.sleep(0.02)

    def next_row(self, end) -> dict:
        """The episode that `end()` ends, once it is in the ledger."""
        before = len(self.rows())
        end()
        self.wait(lambda: len(self.rows()) > before, "the episode is in the ledger")
        return self.rows()[-1]

    def console_cpu_s(self) -> float:
        """CPU time of the console's process so far."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            if "serl_launcher.console" in process.cmdline():
                times = process.cpu_times()
                return times.user + times.system
        raise AssertionError("no console runs")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(120)
        self._log.close()


@pytest.fixture
def start(tmp_path, free_ports):
    run = QuickStart(tmp_path, free_ports)
    yield run
    run.stop()


@pytest.fixture
def chromium(tmp_path):
    browser = Chromium(tmp_path / "profile")
    yield browser
    browser.close()


def take(page) -> None:
    page.fill("#person", "Ann")
    page.click("Take the keys")
    page.wait("document.querySelector('.latency').innerText.includes('to the robot and back')")


def press(page, button: int, down: bool) -> None:
    page.js(f"void (window.pad.buttons[{button}].pressed = {str(down).lower()})")


def judge(start, page, row) -> None:
    """A person's word on an episode from its line on the page; the trainer imitates it no longer."""
    start.wait(lambda: start.accepted(row) is True, "the trainer imitates the episode")
    page.js(f"document.querySelector('button[aria-label$=\"judge episode {row['ordinal']}\"]').click()")
    page.click("Do not imitate", "#episode-acts")
    page.wait("document.querySelector('#rows').innerText.includes('no, said Ann (console)')")
    page.wait("document.querySelector('#done').innerText.includes('Ann (console)')")
    start.wait(lambda: start.accepted(row) is False, "the trainer imitates it no longer")


def roll_back(start, page) -> None:
    """An older version is served and pinned from the page, then the newest again; what is not there is refused."""
    page.fill("#forms input[name=version]", "99999")
    page.click("Serve this version", "#forms")
    page.wait("document.querySelector('#said').innerText.includes('version 99999 is not on disk')")
    newest = start.status()["serving"]["version"]
    version = min(int(path.name[1:7]) for path in (start.folder / "params").glob("v*.json"))
    assert version < newest
    page.fill("#forms input[name=version]", str(version))
    page.click("Serve this version", "#forms")
    start.wait(lambda: start.status()["serving"]["version"] == version, "the older version is served")
    page.wait(f"document.querySelector('#stage').innerText.includes('version {version} is pinned')")
    page.click("Serve the newest", "#acts")
    start.wait(lambda: start.status()["serving"]["version"] >= newest, "the newest version is served")


def test_a_quick_start_is_watched_driven_and_let_go_from_its_page(start, chromium):
    url = start.url()
    stranger = chromium.page()
    stranger.open(url[:-3] + "xyz")
    assert stranger.text().strip() == "open the address that the learner's screen shows; this one lacks its word"
    assert stranger.js("document.querySelectorAll('script, img, link').length") == 0
    page = chromium.page()
    page.call("Page.addScriptToEvaluateOnNewDocument", source=GAMEPAD)
    page.open(url)
    page.wait("location.search === ''")  # the word is out of sight
    page.wait("performance.getEntriesByName('first-contentful-paint').length")
    paint_ms = page.js("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    page.wait("document.querySelector('#alarms').innerText.includes('take the keys')", PATIENCE_S)
    assert start.rows() == []  # a demonstration waits for its person

    take(page)
    page.wait(f"{BADGE} === 'a person drives'", PATIENCE_S)
    page.wait("document.querySelectorAll('.tiles img').length === 2")
    page.down("d")
    time.sleep(0.6)
    page.up("d")
    demonstration = start.next_row(lambda: page.tap("y"))
    assert (demonstration["mode"], demonstration["success"]) == ("demo", True)
    assert demonstration["interventions"] == demonstration["n_ticks"]

    page.wait(f"/policy v.* drives/.test({BADGE})", PATIENCE_S)
    page.wait("document.querySelector('#stage').innerText.includes('online')", PATIENCE_S)
    page.wait(f"/policy v.* drives/.test({BADGE})", PATIENCE_S)
    page.down("a")
    page.wait(f"{BADGE} === 'a person drives'")
    time.sleep(0.5)
    page.up("a")
    page.wait(f"/policy v.* drives/.test({BADGE})")  # untouched for a second
    by_keys = start.next_row(lambda: page.tap("y"))
    assert by_keys["success"]
    assert 0 < by_keys["interventions"] < by_keys["n_ticks"]

    page.wait(f"/policy v.* drives/.test({BADGE})", PATIENCE_S)
    press(page, 5, True)  # RB
    page.js("void (window.pad.axes[1] = -1)")  # LY, away
    page.wait(f"{BADGE} === 'a person drives'")
    time.sleep(0.5)
    press(page, 5, False)
    page.wait(f"/policy v.* drives/.test({BADGE})")
    by_pad = start.next_row(lambda: press(page, 1, True))  # east
    assert not by_pad["success"]
    assert 0 < by_pad["interventions"] < by_pad["n_ticks"]
    press(page, 1, False)

    second = chromium.page()
    second.open(url)
    second.wait("document.body.innerText.includes('Ann drives it from a page')")
    assert second.js("document.querySelector('.hand button').disabled")
    page.wait(f"/policy v.* drives/.test({BADGE})", PATIENCE_S)
    page.down("d")
    page.wait(f"{BADGE} === 'a person drives'")
    time.sleep(0.5)
    errors = page.errors
    page.close()
    closed_at = time.monotonic()
    second.wait(f"/policy v.* drives/.test({BADGE})")
    second.wait("document.querySelector('.hand button').textContent === 'Take the keys'")
    take(second)
    left = start.next_row(lambda: second.tap("n"))
    second.wait("document.querySelectorAll('#rows button').length >= 3")  # videos
    second.click("▶", "#rows")
    second.wait("document.querySelector('video').readyState >= 2")
    second.click("close", "#episode")
    judge(start, second, by_keys)
    roll_back(start, second)
    before, began = start.console_cpu_s(), time.monotonic()
    time.sleep(8.0)
    busy = (start.console_cpu_s() - before) / (time.monotonic() - began)
    assert (errors, second.errors) == ([], [])
    assert paint_ms < 1000
    assert busy < 0.06  # a page that drives, 30 frames a second; at rest: test_at_rest

    spec = task_spec(read_config(start.folder / "config.yaml", "task.spec"))
    episodes = {episode.info.episode_id: episode for _, episode in journal_episodes(start.folder, spec)}
    action = episodes[demonstration["episode_id"]].arrays["action"]
    assert np.isclose(action[:, 1].min(), -0.0125)  # d: dy decreases by half of its limit
    for row, place, value in ((by_keys, 1, 0.0125), (by_pad, 0, 0.0125)):
        arrays = episodes[row["episode_id"]].arrays
        assert np.isclose(arrays["action"][arrays["intervention"], place].max(), value)
    arrays = episodes[left["episode_id"]].arrays
    driven = arrays["time_ns"][arrays["intervention"] & (arrays["time_ns"] < (closed_at + 2) * 1e9)]
    assert (driven.max() / 1e9) - closed_at < RELEASE_S
    moved = arrays["intervention"] & (arrays["action"][:, 1] < 0)
    assert moved.any()
