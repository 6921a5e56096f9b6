"""Observers: the console's lines, the videos, and that a failing observer stops nothing."""

import contextlib
import csv
import importlib.util
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from serl_robot_infra.evaluation import EvaluationSummary, wilson
from serl_robot_infra.observers.base import EpisodeReport, Observer, ObserverGroup
from serl_robot_infra.observers.console import ConsoleObserver, Vitals
from serl_robot_infra.observers.status import StatusObserver
from serl_robot_infra.observers.trials import TrialTable
from serl_robot_infra.observers.video import VideoObserver
from serl_transport.contract.schema import EpisodeInfo, Observation, Outcome, TimeStep
from serl_transport.contract.specs import TaskSpec

INFO = EpisodeInfo("e1", "actor-0", "boot", "pick", "do it", "online", "online", 7, 1.5)

LOOKED_AT = TaskSpec(
    name="pick", prompt="do it", control_hz=10.0, max_ticks=100, cameras={"front": (32, 32), "wrist": (24, 40)},
    state_names=tuple("abcde"), state_low=(-1.0,) * 5, state_high=(1.0,) * 5,
    action_names=tuple("wxyz"), action_low=(-1.0,) * 4, action_high=(1.0,) * 4,
)  # fmt: skip


def observation(value=100):
    return Observation({"front": np.full((32, 32, 3), value, np.uint8), "wrist": np.full((24, 40, 3), value, np.uint8)},
                       np.zeros(5, np.float32))  # fmt: skip


def step(intervention):
    return TimeStep(observation(), np.zeros(4, np.float32), 0.0, False, False, False, intervention, 7, 1)


def report(success=True, mode="online", cut=None, **changes):
    values = dict(
        index=12, info=EpisodeInfo(**{**{k: getattr(INFO, k) for k in INFO.__slots__}, "mode": mode, "stage": mode}),
        outcome=Outcome(success, "environment", cut), cut_reason=None, ticks=30, return_=1.0, operator_ticks=9,
        seconds=3.0, policy_version=7,
    )  # fmt: skip
    return EpisodeReport(**{**values, **changes})


def console(stream, **vitals):
    values = {"infer_p50_ms": 14.2, "backlog": 3, "overruns": 0, "refused": 0, **vitals}
    return ConsoleObserver(lambda: Vitals(**values), stream)


def test_one_line_per_episode():
    stream = io.StringIO()
    observer = console(stream)
    observer.episode_started(INFO)
    for _ in range(30):
        observer.tick(step(False))
    observer.episode_ended(report(), observation())
    assert stream.getvalue() == (
        "#12 online · success · return 1.0 · 30 ticks: policy v7 21, operator 9 · 10 Hz · infer 14 ms · backlog 3\n"
    )


def test_a_repeated_message_is_printed_once_while_only_its_numbers_change():
    stream = io.StringIO()
    observer = console(stream)
    for step_number in range(50):
        observer.message(f"waiting: training sft ({step_number}/900)")
    observer.message("learner silent for 3 s; holding")
    assert len(stream.getvalue().splitlines()) == 2


def test_a_terminal_gets_a_live_line():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    observer = console(stream, overruns=2, refused=1)
    observer.episode_started(INFO)
    observer.tick(step(True))
    out = stream.getvalue()
    assert "operator drives" in out
    assert "2 overruns" in out
    assert "1 REFUSED" in out
    assert "\n" not in out


def test_whoever_takes_over_sees_it_at_once_and_what_is_asked_is_shown_each_time():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    observer = console(stream)
    observer.episode_started(INFO)
    for by_hand in (False, False, True, True, False):
        observer.tick(step(by_hand))
    assert re.findall(r"tick (\d) · (\w+)", stream.getvalue()) == [("1", "policy"), ("3", "operator"), ("5", "policy")]
    plain = io.StringIO()
    observer = console(plain)
    for episode in ("e1", "e2"):
        observer.ask(f"{episode}: set the scene")
        observer.message(f"{episode}: set the scene")
    assert plain.getvalue() == "e1: set the scene\ne2: set the scene\n"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"success": False}, "failure ·"),
        ({"success": False, "cut": "time_limit"}, "failure (time limit)"),
        (
            {"success": False, "cut": "stop", "cut_reason": "episode e1 cut at tick 3: stopped"},
            "cut at tick 3: stopped",
        ),
    ],
)
def test_how_it_ended(changes, words):
    stream = io.StringIO()
    console(stream).episode_ended(report(**changes), observation())
    assert words in stream.getvalue()


def test_video_of_every_kth_episode(tmp_path):
    observer = VideoObserver(tmp_path / "videos", {"online": 2, "eval": 1}, fps=10)
    for index in range(3):
        observer.episode_started(INFO)
        for tick in range(12):
            observer.tick(step(tick >= 6))
        observer.episode_ended(report(success=index == 0, info=replace(INFO, episode_id=f"e{index}")), observation())
    names = sorted(path.name for path in (tmp_path / "videos").iterdir())
    assert names == ["e0-success.mp4", "e2-failure.mp4"]
    with av.open(str(tmp_path / "videos" / names[0])) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == 12 + 10  # ticks, and one second of the outcome
    # The border tells the driver: blue for the policy, orange for the operator, green for success.
    corner = [frame[2, 2].astype(int) for frame in (frames[0], frames[8], frames[-1])]
    assert corner[0].argmax() == 2
    assert corner[1].argmax() == 0
    assert corner[2].argmax() == 1


def test_no_videos_at_zero(tmp_path):
    observer = VideoObserver(tmp_path / "videos", {"online": 0, "eval": 1}, fps=10)
    observer.episode_started(INFO)
    observer.tick(step(False))
    observer.episode_ended(report(), observation())
    assert not (tmp_path / "videos").exists()


def test_a_failing_observer_is_reported_once_and_left_out():
    class Broken(Observer):
        def tick(self, step):
            raise OSError("disk full")

    stream = io.StringIO()
    group = ObserverGroup([Broken(), console(stream)])
    group.episode_started(INFO)
    group.tick(step(False))
    group.tick(step(False))
    assert stream.getvalue() == "Broken failed and is switched off: disk full\n"


def observation_of(height, width):
    return Observation({"front": np.zeros((height, width, 3), np.uint8)}, np.zeros(5, np.float32))


def recording(path):
    """Entity -> rows of a recording, by rerun's own reading; verified by its command."""
    program = Path(importlib.util.find_spec("rerun_cli").origin).with_name("rerun")
    subprocess.run([program, "rrd", "verify", path], check=True, capture_output=True, timeout=60)
    from rerun.experimental import RrdReader

    chunks = RrdReader(path).stream().to_chunks()
    found = Counter()
    for chunk in chunks:
        found[str(chunk.entity_path)] += chunk.num_rows
    return found


def test_rerun_writes_a_recording(tmp_path):
    pytest.importorskip("rerun", reason="rerun-sdk is not installed")
    from serl_robot_infra.observers.rerun_log import RerunObserver

    path = tmp_path / "rerun" / "a.rrd"
    observer = RerunObserver(LOOKED_AT, path)
    observer.episode_started(INFO)
    for tick in range(6):
        if tick == 0:
            observer.planned(np.zeros((8, 4), np.float32))
        observer.tick(step(tick > 3))
    observer.episode_ended(report(), observation())
    observer.close()
    rows = recording(path)
    assert {rows[f"/{name}"] for name in ("camera/front", "camera/wrist", "reward", "return", "operator")} == {6}
    for name in LOOKED_AT.action_names:
        assert (rows[f"/action/{name}"], rows[f"/planned/{name}"]) == (6, 8)
    assert {rows[f"/state/{name}"] for name in LOOKED_AT.state_names} == {6}
    assert rows["/episode"] == 2


def test_a_viewer_that_is_too_slow_loses_ticks_and_holds_none_up(tmp_path):
    pytest.importorskip("rerun", reason="rerun-sdk is not installed")
    from serl_robot_infra.observers.rerun_log import QUEUE, RerunObserver

    said, big = [], replace(step(False), observation=observation_of(480, 640))
    observer = RerunObserver(LOOKED_AT, tmp_path / "a.rrd", said.append)
    os.kill(observer._process.pid, signal.SIGSTOP)  # reads nothing more, as of a viewer that does not
    observer.episode_started(INFO)
    began = time.monotonic()
    for _ in range(QUEUE + 50):
        observer.tick(big)
    assert time.monotonic() - began < 0.5
    observer.episode_ended(report(ticks=QUEUE + 50), observation())
    os.kill(observer._process.pid, signal.SIGCONT)
    observer.close()
    (line,) = said
    assert re.search(rf"the viewer is slow, (4\d|5[012]) of {QUEUE + 50} ticks were not sent", line)
    assert abs(recording(tmp_path / "a.rrd")["/reward"] - QUEUE) < 10


def test_what_the_thread_fails_with_is_told_of_and_ends_the_streaming(tmp_path):
    pytest.importorskip("rerun", reason="rerun-sdk is not installed")
    from serl_robot_infra.observers.rerun_log import RerunObserver

    stream = io.StringIO()
    group = ObserverGroup([RerunObserver(LOOKED_AT, tmp_path / "a.rrd"), console(stream)])
    group.episode_started(INFO)
    os.kill(group._observers[0]._process.pid, signal.SIGKILL)
    for _ in range(200):
        group.tick(step(False))
        time.sleep(0.005)
        if stream.getvalue():
            break
    assert "RerunObserver failed and is switched off" in stream.getvalue()


STALLED = """
import socket, sys, time
sys.path.insert(0, sys.argv[1])
from test_observers import *
from serl_robot_infra.observers.rerun_log import RerunObserver

with socket.create_server(("127.0.0.1", 0)) as viewer:
    spec = replace(LOOKED_AT, cameras={"front": (480, 640)})
    observer = RerunObserver(spec, f"127.0.0.1:{viewer.getsockname()[1]}", print)
    noise = np.random.default_rng(0).integers(0, 255, (480, 640, 3), np.uint8)
    seen = replace(step(False), observation=Observation({"front": noise}, np.zeros(5, np.float32)))
    observer.episode_started(INFO)
    slowest, deadline = 0.0, time.monotonic() + 60
    while observer._lost < 2000 and time.monotonic() < deadline:
        began = time.monotonic()
        observer.tick(seen)
        slowest = max(slowest, time.monotonic() - began)
        time.sleep(0.004)
    observer.close()
    print("slowest", slowest, flush=True)
"""


@pytest.mark.slow
def test_a_viewer_that_never_reads_holds_up_neither_a_tick_nor_the_exit():
    words = [sys.executable, "-c", STALLED, str(Path(__file__).parent)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=90, check=True)
    assert "the viewer does not read" in done.stdout
    assert float(done.stdout.rpartition("slowest")[2]) < 0.1


@pytest.mark.slow
def test_a_browser_and_a_viewer_elsewhere_see_an_actor_through_a_served_viewer(tmp_path, free_ports):
    """`rerun --serve-web` on the robot host: the actor streams into it, others look."""
    pytest.importorskip("rerun", reason="rerun-sdk is not installed")
    from serl_robot_infra.observers.rerun_log import connected

    program = Path(importlib.util.find_spec("rerun_cli").origin).with_name("rerun")
    stream, web = free_ports
    words = ["--serve-web", "--bind", "127.0.0.1", "--port", str(stream), "--web-viewer-port", str(web)]
    with subprocess.Popen([program, *words]) as server:
        try:
            page = wait_for_page(f"http://127.0.0.1:{web}/")
            observer = connected(LOOKED_AT, f"127.0.0.1:{stream}", print)
            observer.episode_started(INFO)
            for _ in range(5):
                observer.tick(step(False))
            observer.close()
            afar = tmp_path / "afar.rrd"
            command = [program, f"rerun+http://127.0.0.1:{stream}/proxy", "--port", "auto", "--save", str(afar)]
            with subprocess.Popen(command) as viewer:
                deadline = time.monotonic() + 20
                while not (afar.exists() and b"camera/front" in afar.read_bytes()) and time.monotonic() < deadline:
                    time.sleep(0.1)
                viewer.terminate()
        finally:
            server.terminate()
    assert b"<html" in page.lower()
    assert b"camera/front" in afar.read_bytes()


def wait_for_page(address):
    for _ in range(100):
        try:
            with urllib.request.urlopen(address, timeout=2) as answer:
                return answer.read()
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"no page at {address}")


def test_without_a_viewer_one_line_says_so_and_nothing_is_streamed(free_ports):
    pytest.importorskip("rerun", reason="rerun-sdk is not installed")
    from serl_robot_infra.envs.pick import PickEnv
    from serl_robot_infra.observers.rerun_log import connected

    said = []
    assert connected(PickEnv(cameras=()).spec, f"127.0.0.1:{free_ports[0]}", said.append) is None
    assert len(said) == 1
    assert f"no viewer at 127.0.0.1:{free_ports[0]}" in said[0]
    assert f"rerun --port {free_ports[0]}" in said[0]


def test_a_viewer_that_goes_away_costs_seconds_at_the_end_not_more():
    pytest.importorskip("rerun", reason="rerun-sdk is not installed")
    from serl_robot_infra.envs.pick import PickEnv
    from serl_robot_infra.observers.rerun_log import connected

    with socket.create_server(("127.0.0.1", 0)) as viewer:  # listens, and never says a word
        observer = connected(PickEnv(cameras=()).spec, f"127.0.0.1:{viewer.getsockname()[1]}", lambda text: None)
    observer.episode_started(INFO)
    started = time.monotonic()
    with contextlib.suppress(RuntimeError):  # ObserverGroup reports it
        observer.close()
    assert time.monotonic() - started < 8


@pytest.mark.parametrize("address", ["9876", "127.0.0.1", "127.0.0.1:x", ":9876", "host:99999"])
def test_an_address_that_is_none_is_named(address):
    from serl_robot_infra.observers.rerun_log import read_address

    with pytest.raises(ValueError, match=r"rollout\.rerun_address=.*expected host:port"):
        read_address(address)
    assert read_address("[::1]:9876") == ("::1", 9876)


def test_without_rerun_one_message_says_how_to_install_it(monkeypatch):
    from serl_robot_infra.observers.rerun_log import connected

    monkeypatch.setitem(sys.modules, "rerun", None)
    with pytest.raises(ValueError, match=r"uv pip install rerun-sdk"):
        connected(None, "127.0.0.1:9876", print)


def test_wilson_interval_by_hand():
    # 55 of 60: p = 0.9167, z^2/n = 0.0640, centre = (0.9167 + 0.0320) / 1.0640, half = 1.96 / 1.064 * 0.0390.
    low, high = wilson(55, 60)
    assert low == pytest.approx(0.819, abs=0.001)
    assert high == pytest.approx(0.964, abs=0.001)
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == 1.0


def test_evaluation_counts_whole_evaluation_episodes_only():
    summary = EvaluationSummary()
    summary.add(report(mode="eval", driven_s=2.0))
    summary.add(report(mode="eval", success=False, cut="time_limit", driven_s=6.0))
    summary.add(report(mode="eval", success=False, cut="stop"))
    summary.add(report(mode="online"))
    assert summary.lines() == [
        "evaluation eval: 1/2 = 0.50 [0.09, 0.91], median 2.0 s to success, 16.7 per 1,000 ticks"
    ]
    summary.add(report(mode="eval", driven_s=3.0))
    assert summary.lines()[0].endswith("2/3 = 0.67 [0.21, 0.94], median 2.5 s to success, 22.2 per 1,000 ticks")


def test_an_evaluation_without_a_success_tells_no_time():
    summary = EvaluationSummary()
    summary.add(report(mode="eval", success=False, cut="time_limit", driven_s=6.0))
    assert summary.lines() == ["evaluation eval: 0/1 = 0.00 [0.00, 0.79]"]


def trial(stage="eval", episode_id="e1", **changes):
    info = replace(INFO, mode="eval", stage=stage, episode_id=episode_id, prompt='pick, "do" it')
    return report(info=info, **changes)


def rows_of(folder):
    with (folder / "evaluation.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_evaluation_trial_has_a_row_that_names_its_video(tmp_path):
    group = ObserverGroup([VideoObserver(tmp_path / "videos", {"eval": 1}, fps=10), TrialTable(tmp_path)])
    for told in (trial(driven_s=2.25), trial(episode_id="e2", success=False, cut="stop"), report(mode="online")):
        group.episode_started(told.info)
        group.tick(step(False))
        group.episode_ended(told, observation())
    TrialTable(tmp_path).episode_ended(trial("late", "e3"), observation())  # the next start of the actor
    TrialTable(tmp_path).episode_ended(trial(episode_id="e4"), observation())
    rows = rows_of(tmp_path)
    assert [(row["stage"], row["trial"], row["success"], row["truncated_by"]) for row in rows] == [
        ("eval", "1", "1", ""), ("eval", "2", "0", "stop"), ("late", "1", "1", ""), ("eval", "3", "1", ""),
    ]  # fmt: skip
    assert [row["video"] for row in rows] == ["videos/e1-success.mp4", "videos/e2-failure.mp4", "", ""]
    assert (tmp_path / rows[0]["video"]).is_file()
    first = {key: rows[0][key] for key in ("seed", "policy_version", "ticks", "seconds", "actor", "prompt")}
    assert first == {"seed": "7", "policy_version": "7", "ticks": "30", "seconds": "2.250", "actor": "actor-0",
                     "prompt": 'pick, "do" it'}  # fmt: skip


def test_a_row_that_a_power_cut_tore_costs_that_row_alone(tmp_path):
    TrialTable(tmp_path).episode_ended(trial(), observation())
    with (tmp_path / "evaluation.csv").open("a") as file:
        file.write("2026-01-01T00:00:00+0000,eval,8,2,7")
    TrialTable(tmp_path).episode_ended(trial(episode_id="e9"), observation())
    assert [row["episode_id"] for row in rows_of(tmp_path)] == ["e1", None, "e9"]


def test_a_table_of_somebody_elses_is_left_as_it_is(tmp_path):
    (tmp_path / "evaluation.csv").write_text("trial,success\n1,1\n")
    stream = io.StringIO()
    ObserverGroup([TrialTable(tmp_path), console(stream)]).episode_ended(trial(), observation())
    assert "evaluation.csv: expected the columns time, stage, seed" in stream.getvalue()
    assert (tmp_path / "evaluation.csv").read_text() == "trial,success\n1,1\n"


def test_a_trouble_stays_in_the_status_until_another_tick_is_executed():
    said = []
    observer = StatusObserver(lambda **status: said.append(status))
    observer.trouble("e-stop pressed: a key")
    observer.trouble("e-stop pressed: a key")
    observer.episode_ended(report(cut_reason="episode e1 cut at tick 3: camera front: no picture"), None)
    observer.tick(step(False))
    observer.episode_ended(report(), None)
    observer.episode_ended(report(cut_reason="stopped by a person", last=True), None)
    assert said == [
        {"trouble": "e-stop pressed: a key"},
        {"trouble": "episode e1 cut at tick 3: camera front: no picture"},
        {"trouble": None},
        {"policy_version": 7},
    ]
