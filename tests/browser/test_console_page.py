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
BY_PERSON = "document.querySelector('.badge')?.innerText === 'Ann drives'"
BY_POLICY = "/policy v.* drives/.test(document.querySelector('.badge')?.innerText)"
EAST, RB, LY = 1, 5, 1  # places in a standard gamepad's buttons and axes
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
            "replay.capacity_frames=8000", "rollout.video_every=1", "exporter.period_s=1",
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
    page.click("Do not imitate", "#episode-acts")  # no reward is learned in this run: the word is a person's alone
    page.wait("document.querySelector('#rows').innerText.includes('no, said Ann (console)')")
    page.wait("document.querySelector('#done').innerText.includes('Ann (console)')")
    start.wait(lambda: start.accepted(row) is False, "the trainer imitates it no longer")


def accept(start, page, row) -> None:
    """A failure that a person calls worth imitating is imitated, and what was said of it can be taken back."""
    assert start.accepted(row) is False
    for word, used in (("Imitate", True), ("Take back", False)):
        page.js(f"document.querySelector('button[aria-label$=\"judge episode {row['ordinal']}\"]').click()")
        page.click(word, "#episode-acts")
        start.wait(lambda used=used: start.accepted(row) is used, f"imitated: {used}")


def change(start, page) -> None:
    """A rate of training and one of the robot, by their controls; a value out of range goes nowhere."""
    for key, value in (("trainer.max_steps_per_tick", 1.5), ("rollout.rate_hz", 8)):
        page.js(f"document.querySelector('[name=\"{key}\"]').closest('details').open = true")
        control = f'#controls form[title="{key}"]'
        page.wait(f"document.querySelector('{control} button').disabled")
        page.fill(f"{control} input", "-3")
        page.click("Set", control)
        page.wait(f"document.querySelector('{control} input').validity.rangeUnderflow")
        assert key not in start.status()["operator"]["settings"]
        page.fill(f"{control} input", str(value))
        page.click("Set", control)
        start.wait(lambda key=key: key in start.status()["operator"]["settings"], f"{key} is in the ledger")
        assert start.status()["operator"]["settings"][key]["value"] == value
        page.wait(f"document.querySelector('{control}').innerText.includes('set by Ann (console)')")
    take(page)
    start.next_row(lambda: page.tap("n"))  # it holds from the next episode on
    page.wait("document.querySelector('.facts').innerText.includes('set by people: rate_hz=8 (Ann (console))')")
    assert start.status()["actors"]["actor-0"]["rollout"] == "rate_hz=8 (Ann (console))"
    assert "rollout.rate_hz=8 from this episode on, by Ann (console)" in start.screen()
    page.wait("document.querySelector('.facts').innerText.includes('8 Hz')")


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


def demonstrate(start, page) -> dict:
    """The first demonstration waits for its person, who drives it from the page and calls it a success."""
    page.wait("document.querySelector('#alarms').innerText.includes('take the keys')", PATIENCE_S)
    assert start.rows() == []
    take(page)
    page.wait(BY_PERSON, PATIENCE_S)
    page.wait("document.querySelectorAll('.tiles img').length === 2")
    page.down("d")
    time.sleep(0.6)
    page.up("d")
    row = start.next_row(lambda: page.tap("y"))
    assert (row["mode"], row["success"], row["interventions"]) == ("demo", True, row["n_ticks"])
    assert (row["drivers"], row["judge"]) == (["Ann"], "Ann")
    return row


def help_by_keys(start, page) -> dict:
    page.wait("document.querySelector('#stage').innerText.includes('online')", PATIENCE_S)
    page.wait(BY_POLICY, PATIENCE_S)
    page.down("a")
    page.wait(BY_PERSON)
    time.sleep(0.5)
    page.up("a")
    page.wait(BY_POLICY)  # untouched for a second
    row = start.next_row(lambda: page.tap("y"))
    assert row["success"]
    assert 0 < row["interventions"] < row["n_ticks"]
    return row


def help_by_pad(start, page) -> dict:
    page.wait(BY_POLICY, PATIENCE_S)
    press(page, RB, True)
    page.js(f"void (window.pad.axes[{LY}] = -1)")  # away
    page.wait(BY_PERSON)
    time.sleep(0.5)
    press(page, RB, False)
    page.wait(BY_POLICY)
    row = start.next_row(lambda: press(page, EAST, True))
    press(page, EAST, False)
    assert not row["success"]
    assert 0 < row["interventions"] < row["n_ticks"]
    return row


def close_in_mid_drive(start, page, second) -> float:
    """The second page is told who drives until the first is closed; time.monotonic() of that."""
    second.wait("document.body.innerText.includes('Ann drives it from a page')")
    assert second.js("document.querySelector('.hand button').disabled")
    page.wait(BY_POLICY, PATIENCE_S)
    page.down("d")
    page.wait(BY_PERSON)
    time.sleep(0.5)
    page.close()
    closed_at = time.monotonic()
    second.wait(BY_POLICY)
    second.wait("document.querySelector('.hand button').textContent === 'Take the keys'")
    return closed_at


def watch_a_video(page) -> None:
    page.wait("document.querySelector('#rows').innerText.includes('▶')")
    page.click("▶", "#rows")
    page.wait("document.querySelector('video').readyState >= 2")
    page.click("close", "#episode")


def make_a_video(start, page, row) -> None:
    """An episode whose video is not in this folder, as of an actor elsewhere: made of the dataset's pictures."""
    (video,) = (start.folder / "videos").glob(f"{row['episode_id']}-*.mp4")
    video.unlink()
    button = f"document.querySelector('button[aria-label=\"judge episode {row['ordinal']}\"]')"
    page.wait(f"Boolean({button})")
    start.wait(lambda: start.status()["exporter"].get("last_ordinal", -1) >= row["ordinal"], "it is in the dataset")
    page.js(f"{button}.click()")
    page.click("Make a video", "#episode")
    page.wait("document.querySelector('video').readyState >= 2")
    page.click("close", "#episode")
    assert video.is_file()


def check_what_was_recorded(start, demonstration, by_keys, by_pad, left, closed_at) -> None:
    """In the journal: what was executed, as help where a person drove, and no more of it once the page was closed."""
    spec = task_spec(read_config(start.folder / "config.yaml", "task.spec"))
    episodes = {episode.info.episode_id: episode for _, episode in journal_episodes(start.folder, spec)}
    action = episodes[demonstration["episode_id"]].arrays["action"]
    assert np.isclose(action[:, 1].min(), -0.0125)  # d: dy decreases by half of its limit
    for row, place in ((by_keys, 1), (by_pad, 0)):
        arrays = episodes[row["episode_id"]].arrays
        assert np.isclose(arrays["action"][arrays["intervention"], place].max(), 0.0125)
    arrays = episodes[left["episode_id"]].arrays
    by_hand, at_s = arrays["intervention"], arrays["time_ns"] / 1e9
    assert (arrays["action"][by_hand, 1] < 0).any()
    assert at_s[by_hand & (at_s < closed_at + 2)].max() - closed_at < RELEASE_S


def test_a_quick_start_is_watched_driven_judged_and_let_go_from_its_page(start, chromium):
    url = start.url()
    stranger = chromium.page()
    stranger.open(url[:-3] + "xyz")
    assert stranger.text().strip() == "open the address that the learner's screen shows; this one lacks its word"
    assert stranger.js("document.querySelectorAll('script, img, link').length") == 0
    page, second = chromium.page(), chromium.page()
    page.call("Page.addScriptToEvaluateOnNewDocument", source=GAMEPAD)
    page.open(url)
    page.wait("location.search === ''")  # the word is out of sight
    page.wait("performance.getEntriesByName('first-contentful-paint').length")
    paint_ms = page.js("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    driven = demonstrate(start, page), help_by_keys(start, page), help_by_pad(start, page)
    second.open(url)
    closed_at = close_in_mid_drive(start, page, second)
    take(second)
    left = start.next_row(lambda: second.tap("n"))
    watch_a_video(second)
    make_a_video(start, second, driven[0])
    judge(start, second, driven[1])
    accept(start, second, driven[2])
    roll_back(start, second)
    change(start, second)
    before, began = start.console_cpu_s(), time.monotonic()
    time.sleep(8.0)
    busy = (start.console_cpu_s() - before) / (time.monotonic() - began)
    assert page.errors == []
    assert [error for error in second.errors if "409 (Conflict)" not in error] == []  # the version that is not there
    assert paint_ms < 1000
    assert busy < 0.06  # a page that drives, 30 frames a second; at rest: test_console_at_rest
    check_what_was_recorded(start, *driven, left, closed_at)
    acts = [json.loads(line) for line in (start.folder / "acts.jsonl").read_text().splitlines()]
    keys = [row["act"] for row in acts if row["by"] == "Ann (console)" and row["act"].endswith("_keys")]
    assert keys[:4] == ["take_keys", "release_keys"] * 2  # the first page, and the second one
