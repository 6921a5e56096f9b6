"""An actor that a stock GR00T server drives, N1.7's and N1.5's, each a process; transitions go to the learner."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from scripted_learner import RobotPick, ScriptedLearner, actor_config, ticket

from openpi_client.groot_layout import Layout
from serl_robot_infra.groot_policy import NO_VERSION, GrootPolicy, GrootSettings
from serl_robot_infra.main import main
from serl_robot_infra.policy_client import MeasuredPolicy, infer_body
from serl_transport.contract.errors import Internal, NotReady
from serl_transport.contract.schema import Observation

STOCK = Path(__file__).parents[1] / "openpi_client" / "stock_groot.py"
PROMPT = "annotation.human.task_description"


@pytest.fixture(scope="module")
def spec():
    env = RobotPick()
    yield env.spec
    env.close()


@pytest.fixture(scope="module")
def modality(spec, tmp_path_factory):
    """A dataset's modality.json: state and action in two parts, the cameras under GR00T's names."""
    s = len(spec.state_names)
    content = {
        "state": {"arm": {"start": 0, "end": s - 1}, "gripper": {"start": s - 1, "end": s}},
        "action": {"arm": {"start": 0, "end": 3}, "gripper": {"start": 3, "end": 4}},
        "video": {"ego_view": {"original_key": "observation.images.front"}, "wrist": {}},
        "annotation": {"human.task_description": {"original_key": "task_index"}},
    }
    path = tmp_path_factory.mktemp("data") / "modality.json"
    path.write_text(json.dumps(content))
    return path


class Stock:
    """A stock server as a process; it prints what it was asked."""

    def __init__(self, spec, **options):
        s = len(spec.state_names)
        given = {
            "video": ["ego_view", "wrist"],
            "state": {"arm": s - 1, "gripper": 1},
            "action": {"arm": 3, "gripper": 1},
        }
        self.options = {**given, "language": PROMPT, "n1_5": False, "value": -0.5, **options}
        self.port = self.options.get("port")
        self.start()

    def start(self):
        options = json.dumps(self.options | ({"port": self.port} if self.port else {}))
        self.process = subprocess.Popen([sys.executable, str(STOCK), options], stdout=subprocess.PIPE, text=True)
        self.port = int(self.process.stdout.readline())

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.kill()


def policy(spec, guided=False, **settings):
    return GrootPolicy(GrootSettings.of(settings, spec), spec, guided)


def a_body(spec):
    images = {camera: np.zeros((*size, 3), np.uint8) for camera, size in spec.cameras.items()}
    return infer_body(Observation(images, np.arange(len(spec.state_names), dtype=np.float32)), "go", 3, 7)


@pytest.mark.parametrize("n1_5", [False, True])
def test_a_stock_server_drives_and_the_learner_gets_the_transitions(spec, modality, tmp_path, n1_5):
    with Stock(spec, n1_5=n1_5) as stock, ScriptedLearner(spec, [ticket("eval", 1)]) as learner:
        cfg = actor_config(learner, tmp_path, policy="groot")
        OmegaConf.update(cfg, "rollout.groot", {"port": stock.port, "modality": str(modality)}, force_add=True)
        cfg.task.env = {"_target_": "scripted_learner.RobotPick"}
        out = io.StringIO()
        assert main(cfg, out) == 0, out.getvalue()
        (episode,) = learner.episodes()
        lines = [json.loads(stock.process.stdout.readline()) for _ in range(2)]
    assert learner.infer_bodies == []  # the learner's own policy was not asked
    assert episode.n == 60
    assert (episode.arrays["action"] == np.clip(-0.5, spec.action_low, spec.action_high).astype(np.float32)).all()
    assert (episode.arrays["policy_version"] == NO_VERSION).all()
    if not n1_5:
        assert lines.pop(0) == "reset"  # an episode begins
    s = len(spec.state_names)
    shapes = {
        "video": {"ego_view": [1, 1, 32, 32, 3], "wrist": [1, 1, 32, 32, 3]},
        "state": {"arm": [1, 1, s - 1], "gripper": [1, 1, 1]},
        "language": {PROMPT: [[spec.prompt]]},
    }
    assert lines[0] == shapes


def test_a_server_that_is_killed_is_told_and_its_successor_goes_on(spec, modality):
    with Stock(spec) as stock:
        asked = policy(spec, port=stock.port, modality=str(modality))
        body = a_body(spec)
        first = asked.infer(body)
        assert first["actions"].shape == (8, 4)
        assert first["actions"].dtype == np.float32
        stock.kill()
        with pytest.raises(NotReady, match=r"closed the connection|nothing listens on port \d+ of 127\.0\.0\.1"):
            asked.infer(body)
        stock.start()
        assert (asked.infer(body)["actions"] == np.float32(-0.5)).all()
        asked.close()


def test_a_server_that_is_away_is_told_at_the_start_with_the_keys(spec, free_ports, caplog):
    away = policy(spec, port=free_ports[0])
    assert "it is waited for where an action is wanted" in caplog.text
    with pytest.raises(
        NotReady, match=r"no GR00T policy server at tcp://.*nothing listens.*\(rollout\.groot\.host, roll"
    ):
        away.infer(a_body(spec))


def test_token_and_the_server_s_own_failure(spec, modality, monkeypatch):
    monkeypatch.setenv("GROOT_TOKEN", "s3cret")
    with Stock(spec, token="s3cret") as stock:
        with pytest.raises(ValueError, match=r"does not accept our token .*: rollout\.groot\.token"):
            policy(spec, port=stock.port, modality=str(modality))
        asked = policy(spec, port=stock.port, modality=str(modality), token="env:GROOT_TOKEN")
        asked.infer(a_body(spec))
        stock.options["fail"] = "later"
        stock.kill()
        stock.start()
        with pytest.raises(NotReady):
            asked.infer(a_body(spec))
        with pytest.raises(Internal, match="failed on the observation: 'later'"):
            asked.infer(a_body(spec))
        fresh = policy(spec, port=stock.port, modality=str(modality), token="env:GROOT_TOKEN")
        with pytest.raises(ValueError, match=r"'later'\. Does rollout\.groot\.modality describe the data"):
            fresh.infer(a_body(spec))
        for one in (asked, fresh):
            one.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"video": ["ego_view", "side"]},
            r"has video 'side', this robot ego_view, wrist: name it in rollout\.groot\.mod",
        ),
        ({"state": {"arm": 2, "hand": 1}}, r"has state 'hand', this robot arm, gripper"),
        ({"action": {"arm": 3}}, r"gives no action 'gripper', which moves this robot \(dx, dy, dz, grip\)"),
        ({"deltas": [-1, 0]}, r"wants state of ticks \[-1, 0\]; only the present one \(0\) is sent"),
    ],
)
def test_a_server_of_another_robot_is_told_before_anything_moves(spec, modality, options, message):
    with Stock(spec, **options) as stock, pytest.raises(ValueError, match=message):
        policy(spec, port=stock.port, modality=str(modality))


def test_a_camera_of_the_data_that_neither_has_is_nobody_s(spec, modality, tmp_path):
    content = json.loads(modality.read_text())
    content["video"]["side"] = {"original_key": "observation.images.side"}
    path = tmp_path / "modality.json"
    path.write_text(json.dumps(content))
    with Stock(spec) as stock:
        asked = policy(spec, port=stock.port, modality=str(path))
        assert asked.infer(a_body(spec))["actions"].shape == (8, 4)
        asked.close()


def test_actions_of_another_robot_are_refused(spec, modality):
    with Stock(spec, action={"arm": 5, "gripper": 1}) as stock:
        asked = policy(spec, port=stock.port, modality=str(modality))
        with pytest.raises(
            ValueError, match=r"does not drive this robot: part 'arm': expected numbers \[ticks, 3\], got fl"
        ):
            asked.infer(a_body(spec))
        asked.close()


def test_the_start_of_an_episode_reaches_a_policy_through_what_measures_it():
    class Remembers(GrootPolicy):
        def __init__(self):
            self.resets = 0

        def reset(self):
            self.resets += 1

    policy = Remembers()
    MeasuredPolicy(policy).reset()
    assert policy.resets == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hosts": "x"}, r"rollout\.groot\.hosts: no such key; the keys are modality, host, port"),
        ({"host": "h:5555"}, r"rollout\.groot\.host: expected a name or an address \(port: rollout\.groot\.port\)"),
        ({"port": None}, r"rollout\.groot\.port: expected a whole number from 1 to 65535, got None"),
        ({"timeout_s": 0}, r"rollout\.groot\.timeout_s: expected a number from 0\.1 to 600, got 0"),
        ({"modality": "/nowhere.json"}, r"rollout\.groot\.modality=/nowhere\.json: No such file"),
    ],
)
def test_mistakes_in_the_settings_are_named(spec, change, message):
    with pytest.raises(ValueError, match=message):
        GrootSettings.of(change, spec)


def test_realtime_guidance_is_refused(spec):
    with pytest.raises(ValueError, match=r"rollout\.realtime=rtc: GR00T's protocol cannot guide a chunk"):
        policy(spec, guided=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": {"arm": {"start": 0, "end": 2}}}, r"state: its parts .* do not divide the task's \d+ dims"),
        (
            {"action": {"arm": {"start": 0, "end": 9}}},
            r"action\.arm: expected start and end within the 4 dims of action",
        ),
        ({"action": {"arm": {"start": 0}}}, r"action\.arm: expected start and end"),
        ({"video": ["front"]}, r"video: expected a map of names, got \['front'\]"),
    ],
)
def test_a_modality_json_that_does_not_fit_the_task_is_refused(spec, modality, tmp_path, change, message):
    path = tmp_path / "modality.json"
    path.write_text(json.dumps(json.loads(modality.read_text()) | change))
    with pytest.raises(ValueError, match=f"a={path}: {message}"):
        Layout.read(str(path), spec, "a")
