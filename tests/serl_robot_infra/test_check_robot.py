"""tools/check_robot.py: what it says of a robot that is ready, and of each part that is not."""

import copy
import functools
import io
import json
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import check_robot
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checked_robot import CheckedPick
from PIL import Image
from scripted_learner import RobotPick, ScriptedLearner

from flowserl_cli.compose import load_config
from serl_robot_infra.check.looking import CameraWatch, Observed, looker, watch
from serl_robot_infra.check.pictures import check_places
from serl_robot_infra.check.recorded import read_episode
from serl_robot_infra.check.rehearsal import report_passed, through_chain
from serl_robot_infra.check.report import Report
from serl_robot_infra.check.robot import Options, check
from serl_robot_infra.envs.base import StepResult
from serl_robot_infra.envs.pick import PickEnv
from serl_robot_infra.guard import RobotGuard
from serl_robot_infra.safety import SafetyChain
from serl_transport.contract.errors import NotReady
from serl_transport.contract.schema import Observation

SPEC = PickEnv(image_size=32, renderer="ray").spec
BRIEF = Options(seconds=0.3)
WORDS = [
    "actor=true", "ip=null", "run=lab", "task.spec.cameras={front:[32,32],wrist:[32,32]}", "task.rate_hz=null",
    "task.safety={max_speed:{dx:0.2,dy:0.2,dz:0.2}}", "operator=none", "rollout.watchdog.stop_ms=300",
]  # fmt: skip


composed = functools.cache(lambda *words: load_config([*WORDS, *words]))


def config(tmp_path, *words):
    cfg = copy.deepcopy(composed(*words))
    cfg.runs_dir = str(tmp_path)
    return cfg


def look(tmp_path, *words, options=BRIEF, env="checked_robot.CheckedPick", **parts):
    """The report and the screen."""
    cfg = config(tmp_path, *words)
    cfg.task.env = {"_target_": env, **parts}
    screen = io.StringIO()
    return check(cfg, options, screen), screen.getvalue()


def of(report, check_name):
    """The one finding of that name."""
    (finding,) = [finding for finding in report.findings if finding.check == check_name]
    return finding


def test_a_robot_that_is_ready_and_nothing_was_sent(tmp_path):
    report, said = look(tmp_path)
    assert report.exit_code == 0, said
    assert [f.check for f in report.of("warning")] == ["watchdog"]  # it names no stopper
    robot = RobotPick.last
    assert not robot.sent
    assert not robot.resets
    assert robot.stops
    assert robot.holds
    written = json.loads((tmp_path / "lab/check/report.json").read_text())
    assert written["ready"] is True
    assert written["moved"] is False
    assert written["figures"]["loop, Hz"] == pytest.approx(10.0, rel=0.4)
    assert 0 < written["figures"]["e-stop, pressed to stopped, ms"] < 1000
    assert 290 < written["figures"]["silence to stopped, ms"] < 1000
    assert Image.open(tmp_path / "lab/check/wrist.png").size == (32, 32)
    assert not (tmp_path / "lab/estop").exists()


def test_each_part_that_fails_is_named_with_its_fix(tmp_path):
    report, said = look(tmp_path, frozen="wrist", black="front", slow_s=0.15, half=True, deaf=True)
    assert report.exit_code == 1
    for name, says in (
        ("camera wrist", "frozen"),
        ("camera front", "black"),
        ("control rate", "of 10 Hz; observe() alone"),
        ("e-stop", "stop() did not come back"),
    ):
        finding = of(report, name)
        assert finding.level == "FAILURE", said
        assert says in finding.says
        assert f"-> {finding.fix}" in said
    limits = [f.says for f in report.of("FAILURE") if f.check == "robot's limits"]
    assert "dx: action_high 0.025 is above the robot's 0.0125" in limits
    assert not RobotPick.last.sent


def test_a_class_that_disagrees_with_the_yaml_is_a_finding_and_the_rest_is_asked(tmp_path):
    report, said = look(tmp_path, prompt="another")
    assert report.exit_code == 1
    assert "prompt: " in of(report, "robot").says, said


def test_swapped_cameras_are_known_by_their_saved_pictures(tmp_path):
    def compare(remember=False, **parts):
        robot = CheckedPick(**parts)
        observed = Observed(10.0, {name: CameraWatch() for name in robot.spec.cameras})
        watch(robot.observe, robot.spec, 100.0, 0.05, observed)
        report = Report(io.StringIO())
        check_places(report, observed, tmp_path / "known", tmp_path, remember)
        return {f.check: (f.level, f.says) for f in report.findings}

    assert compare()["right cameras"][0] == "skipped"  # the first time they are kept, and that is said
    assert {level for level, _ in compare().values()} == {"ok"}
    level, says = compare(swapped=True)["place of front"]
    assert (level, "it shows what wrist showed" in says) == ("FAILURE", True)
    assert compare(black="front")["place of front"][0] == "warning"
    compare(remember=True, swapped=True)
    assert {level for level, _ in compare(swapped=True).values()} == {"ok"}


def test_a_latched_estop_a_missing_learner_and_no_watchdog_are_failures(tmp_path, free_ports, monkeypatch):
    monkeypatch.setattr("serl_robot_infra.check.learner.WAIT_S", 0.2)
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab/estop").write_text("ann\n")
    words = (
        "ip=127.0.0.1",
        f"port={free_ports[0]}",
        f"broadcast_port={free_ports[1]}",
        "rollout.watchdog.enabled=false",
    )
    report, said = look(tmp_path, *words)
    assert {f.check for f in report.of("FAILURE")} == {"e-stop's latch", "learner", "watchdog"}, said
    assert "nobody answers at 127.0.0.1" in said
    assert "--reset" in of(report, "e-stop's latch").fix
    assert (tmp_path / "lab/estop").exists()  # a person removes it


def test_without_observe_only_a_motion_shows_the_cameras(tmp_path):
    report, said = look(tmp_path, env="scripted_learner.RobotPick")
    assert "has no observe()" in of(report, "cameras, rate").says, said
    assert not RobotPick.last.resets
    moved, said = look(tmp_path, env="scripted_learner.RobotPick", options=Options(seconds=0.5, move=True))
    assert of(moved, "control rate").level == "ok", said
    assert len(RobotPick.last.resets) == 1
    sent = np.array([action for _, action in RobotPick.last.sent])
    assert len(sent) >= 4
    assert not sent[:, :3].any()  # it stays where it is


def test_an_arm_that_sags_is_sent_one_pose_and_not_where_it_sank_to():
    class Sagging:
        spec = replace(
            SPEC, cameras={}, action_names=("j",), action_low=(-1.0,), action_high=(1.0,), targets={"j": "x"}
        )
        sent: ClassVar[list[float]] = []

        def reset(self, seed):
            return self.seen()

        def step(self, action):
            self.sent.append(float(action[0]))
            return StepResult(self.seen(), 0.0, False, False, False)

        def seen(self):
            return Observation({}, np.float32([0.2 - 0.01 * len(self.sent), 0, 0, 0, 0]))

    robot, estop = Sagging(), SimpleNamespace(reason=lambda: None)
    guard = RobotGuard(None, estop, 50.0, None)
    look = looker(robot, guard, {"max_speed": {"j": 5.0}}, move=True)
    for _ in range(5):
        look()
    guard.close()
    assert robot.sent == pytest.approx([0.2] * 5)


@pytest.mark.slow
def test_the_watchdog_process_of_a_robot_that_can_be_reached_twice_is_asked_alone(tmp_path):
    report, said = look(tmp_path, second_way=["touch", str(tmp_path / "stopped")])
    assert of(report, "stopper").level == "ok", said
    assert (tmp_path / "stopped").exists()
    report, said = look(tmp_path, second_way=["false"])
    assert of(report, "stopper").level == "FAILURE", said


def test_the_policy_is_asked_and_what_the_limits_make_of_it_is_shown(tmp_path):
    def fast(body):
        return {"actions": np.tile(np.float32([0.025, 0, 0, 1]), (8, 1)), "policy_version": 4}

    with ScriptedLearner(SPEC, [], infer=fast, answers={"status": {}}) as learner:
        config = learner.server.config
        words = ["ip=127.0.0.1", f"port={config.port_number}", f"broadcast_port={config.broadcast_port}"]
        report, said = look(tmp_path, *words, options=Options(seconds=0.3, dry_run=True))
        assert not learner.batches
    assert report.exit_code == 0, said
    assert of(report, "dry run").says.startswith("20 of 20 actions bent: dx in 20 by up to 0.005")
    assert "tick 0: dx 0.025 -> 0.02" in said
    assert report.figures["policy's answer, median ms"] > 0
    assert report.figures["round trip, median ms"] > 0
    assert not RobotPick.last.sent


@pytest.mark.slow
def test_a_policy_that_is_not_there_yet_is_a_warning(tmp_path):
    def later(body):
        raise NotReady("no policy server is running yet")

    with ScriptedLearner(SPEC, [], infer=later, answers={"status": {}}) as learner:
        config = learner.server.config
        words = ["ip=127.0.0.1", f"port={config.port_number}", f"broadcast_port={config.broadcast_port}"]
        report, said = look(tmp_path, *words, options=Options(seconds=0.1, dry_run=True))
    assert report.exit_code == 0, said
    assert {f.check for f in report.of("warning")} >= {"policy's answer", "dry run"}


def dataset(folder, actions):
    """A dataset of the pick task with one episode, as far as a replay reads it."""
    n = len(actions)
    rows = {
        "observation.state": np.tile(np.float32([0, 0, 0.2, 0.5, 0]), (n, 1)).tolist(),
        "action": np.float32(actions).tolist(),
        "episode_index": [0] * n,
    }
    (folder / "data/chunk-000").mkdir(parents=True)
    (folder / "meta").mkdir()
    pq.write_table(pa.table(rows), folder / "data/chunk-000/file-000.parquet")
    names = {"observation.state": SPEC.state_names, "action": SPEC.action_names}
    features = {key: {"dtype": "float32", "shape": [len(value)], "names": list(value)} for key, value in names.items()}
    (folder / "meta/info.json").write_text(json.dumps({"total_episodes": 1, "features": features}))
    return folder


def test_a_recorded_episode_goes_through_the_limits_dry_and_for_real(tmp_path):
    source = str(dataset(tmp_path / "d", [[0.01, 0, 0, 0], [0.025, 0, 0, 0], [0.0, -0.025, 0, 0]]))
    report, said = look(tmp_path, options=Options(seconds=0.1, replay=source, move=True))
    assert of(report, "replay, dry").says == "2 of 3 actions bent: dx in 1 by up to 0.005; dy in 1 by up to 0.005", said
    assert of(report, "replay, moved").says == of(report, "replay, dry").says
    assert np.allclose([action[0] for _, action in RobotPick.last.sent[-3:]], [0.01, 0.02, 0.0])


def test_a_recording_that_cannot_be_replayed_is_refused_or_a_failure(tmp_path):
    source = str(dataset(tmp_path / "d", [[0.01, 0, 0, 0], [np.nan, 0, 0, 0]]))
    episode, report = read_episode(source, -1, SPEC), Report(io.StringIO())
    passed = through_chain(SafetyChain.of(SPEC, None), episode.states, episode.actions)
    report_passed(report, "replay, dry", passed, SPEC, report.stream)
    assert of(report, "replay, dry").level == "FAILURE"
    assert "tick 1: recorded: action" in report.stream.getvalue()
    with pytest.raises(ValueError, match="holds 1 episodes"):
        read_episode(source, 3, SPEC)
    with pytest.raises(ValueError, match="no dataset at"):
        read_episode("nowhere", 0, SPEC)
    with pytest.raises(ValueError, match=r"action is .* the task has"):
        read_episode(source, 0, replace(SPEC, action_names=("a", "b", "c", "d")))


def test_the_keys_are_pressed_one_after_the_other(tmp_path, typist, monkeypatch):
    monkeypatch.setattr("serl_robot_infra.check.keys.PATIENCE_S", 5.0)
    screen = typist.screen

    def hands():
        for asked, key in (
            ("press success", b"y"),
            ("press failure", b"n"),
            ("press discard", b"x"),
            ("press ready", b"\n"),
            ("press stop", b"q"),
            ("take over and move it", b"w"),
            ("press space", b" "),
        ):
            screen.wait_for(asked)
            typist.type(key)

    thread = threading.Thread(target=hands, daemon=True)
    thread.start()
    cfg = config(tmp_path, "operator=keyboard")
    cfg.task.env = {"_target_": "checked_robot.CheckedPick"}
    report = check(cfg, Options(seconds=0.2, attended=True), screen)
    said = screen.getvalue()
    heard = {f.check for f in report.of("ok")}
    keys = {f"key {what}" for what in ("success", "failure", "discard", "ready", "stop", "take over")}
    assert heard >= {*keys, "e-stop's key"}, said


def test_the_command_checks_a_simulation_and_refuses_a_wrong_word(tmp_path, capsys):
    words = ["ip=null", "run=sim", f"runs_dir={tmp_path}"]
    assert check_robot.main([*words, "--seconds", "0.2", "--unattended"]) == 0
    assert "ready (" in capsys.readouterr().out
    assert check_robot.main([*words, "task=pik"]) == 2
    assert capsys.readouterr().err.startswith("check_robot: no task is called 'pik'")
    assert check_robot.main([*words, "--seconds", "0"]) == 2
