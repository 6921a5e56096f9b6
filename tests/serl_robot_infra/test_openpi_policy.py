"""An actor that a stock openpi server drives, each a process or a socket of its own; transitions go to the learner."""

import io
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from scripted_learner import RobotPick, ScriptedLearner, actor_config, ticket

from serl_robot_infra.connect import connect_learner
from serl_robot_infra.estop import EmergencyStop
from serl_robot_infra.main import main
from serl_robot_infra.openpi_policy import NO_VERSION, OpenpiPolicy, OpenpiSettings
from serl_robot_infra.pacing import StopSignal
from serl_robot_infra.policy_client import infer_body
from serl_robot_infra.wiring import build_actor, build_env, build_guard
from serl_transport.contract.errors import Internal, NotReady
from serl_transport.contract.schema import Observation
from serl_transport.contract.specs import TaskSpec

STOCK = Path(__file__).parents[1] / "openpi_client" / "stock_openpi.py"
ACTION = [0.0, 0.0, 0.0, -1.0]
LAYOUT = {
    "observation/image": "front",
    "observation/wrist_image": "wrist",
    "observation/joint_position": "state[0:2]",
    "observation/state": "state",
    "prompt": "prompt",
}


class Stock:
    """A stock server as a process."""

    def __init__(self, **options):
        self.options = {"wants": list(LAYOUT), "action": ACTION, **options}
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


@pytest.fixture(scope="module")
def spec():
    env = RobotPick()
    yield env.spec
    env.close()


def config(learner, tmp_path, port, observation=LAYOUT, openpi=(), **rollout):
    cfg = actor_config(learner, tmp_path, policy="openpi", **rollout)
    settings = {"port": port, "observation": observation, **dict(openpi)}
    OmegaConf.update(cfg, "rollout.openpi", settings, force_add=True)
    cfg.task.env = {"_target_": "scripted_learner.RobotPick"}
    return cfg


def test_a_stock_server_drives_and_the_learner_gets_the_transitions(spec, tmp_path):
    with Stock() as stock, ScriptedLearner(spec, [ticket("eval", 1), ticket("online", 2, takeover=False)]) as learner:
        out = io.StringIO()
        assert main(config(learner, tmp_path, stock.port), out) == 0, out.getvalue()
        first, second = learner.episodes()
        seen = json.loads(stock.process.stdout.readline())
    assert learner.infer_bodies == []  # the learner's own policy was not asked
    for episode in (first, second):
        assert episode.n == 60
        assert (episode.arrays["action"] == np.float32(ACTION)).all()
        assert (episode.arrays["policy_version"] == NO_VERSION).all()
        assert not episode.arrays["intervention"].any()
    assert seen == {
        "observation/image": [32, 32, 3],
        "observation/wrist_image": [32, 32, 3],
        "observation/joint_position": [2],
        "observation/state": [len(spec.state_names)],
        "prompt": spec.prompt,
    }
    assert "policy 60" in out.getvalue()


def test_a_server_that_is_killed_is_waited_for_and_the_episode_goes_on(spec, tmp_path):
    with Stock() as stock, ScriptedLearner(spec, [ticket("eval", 1)]) as learner:
        cfg = config(learner, tmp_path, stock.port, rate_hz=40, hold_limit_s=60.0)
        OmegaConf.update(cfg, "rollout.watchdog", {"enabled": False}, force_add=True)  # else it stops the robot first
        RobotPick.last = None

        def kill_and_start():
            deadline = time.monotonic() + 60
            while RobotPick.last is None or len(RobotPick.last.sent) < 6:
                assert time.monotonic() < deadline
                time.sleep(0.005)
            stock.kill()
            time.sleep(0.5)
            stock.start()

        thread = threading.Thread(target=kill_and_start)
        thread.start()
        out = io.StringIO()
        code = main(cfg, out)
        thread.join()
        (episode,) = learner.episodes()
    assert code == 0, out.getvalue()
    assert episode.n == 60
    assert "policy not ready" in out.getvalue()


def test_the_actor_may_come_before_its_server(spec, tmp_path, free_ports):
    with ScriptedLearner(spec, [ticket("eval", 1)]) as learner:
        out = io.StringIO()
        result = []
        cfg = config(learner, tmp_path, free_ports[0])
        with pytest.raises(NotReady, match=r"no policy server at ws://127\.0\.0\.1:\d+ .*rollout\.openpi\.host"):
            policy(spec, port=free_ports[0]).infer({})
        thread = threading.Thread(target=lambda: result.append(main_in_thread(cfg, out)))
        thread.start()
        deadline = time.monotonic() + 60
        while "no policy server at" not in out.getvalue():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with Stock(port=free_ports[0]):
            thread.join()
        assert result == [0], out.getvalue()
        assert learner.episodes()[0].n == 60


def main_in_thread(cfg, out):
    """`main` without the signal handlers, which belong to the main thread."""
    link = None
    spec = TaskSpec.from_dict(OmegaConf.to_container(cfg.task.spec))
    stop = StopSignal()
    env = build_env(cfg, spec)
    guard = build_guard(cfg, env, EmergencyStop(Path(cfg.runs_dir) / cfg.run / "estop"))
    try:
        link = connect_learner(cfg, spec, out, stop)
        actor, *_ = build_actor(cfg, env, link, out, stop, guard)
        actor.run()
        return 0 if link.flush(20) else 1
    finally:
        guard.close()
        if link is not None:
            link.stop()
        env.close()


@pytest.mark.parametrize(
    ("stock", "change", "message"),
    [
        ({}, {"observation": {"observation/image": "front"}},
         "KeyError: 'observation/wrist_image'. It was sent observation/image; map what it wants in rollout.openpi.obs"),
        ({"action": [0.0] * 7}, {}, "expected actions [ticks, 4] (dx, dy, dz, grip), got [8, 7]"),
        ({"authorization": "Bearer x"}, {}, "rollout.openpi.token and rollout.openpi.auth"),
        ({"ticks": 3}, {}, "execute_horizon=4 is longer than the chunk, 3 actions"),
        ({}, {"realtime": "rtc"}, "rollout.realtime=rtc: the openpi server at"),
    ],
)  # fmt: skip
def test_what_can_never_work_is_one_message(spec, tmp_path, stock, change, message):
    with Stock(**stock) as server, ScriptedLearner(spec, [ticket("eval", 1)]) as learner:
        out = io.StringIO()
        assert main(config(learner, tmp_path, server.port, **change), out) == 2
    assert message in out.getvalue()
    assert "Traceback" not in out.getvalue()


def policy(spec, guided=False, run="test", **settings):
    return OpenpiPolicy(OpenpiSettings.of(settings, spec), spec, run=run, guided=guided)


def a_body(spec):
    images = {camera: np.zeros((*size, 3), np.uint8) for camera, size in spec.cameras.items()}
    return infer_body(Observation(images, np.arange(len(spec.state_names), dtype=np.float32)), "go", 3, 7)


def test_token_sizes_and_the_default_layout(spec, monkeypatch):
    monkeypatch.setenv("OPENPI_TOKEN", "x")
    with Stock(wants=["images", "state", "prompt"], authorization="Bearer x") as stock:
        asked = policy(
            spec, port=stock.port, token="env:OPENPI_TOKEN", auth="Bearer", image_size=[48, 64], channels_first=True
        )
        assert asked.infer(a_body(spec))["actions"].dtype == np.float32
        asked.close()
        assert asked.infer(a_body(spec))["policy_version"] == NO_VERSION  # connects again
        seen = json.loads(stock.process.stdout.readline())
        asked.close()
    assert set(seen) == {"images", "state", "prompt"}  # nothing that a stock server does not know


def test_a_server_that_fails_later_is_asked_again(spec):
    with Stock(wants=[]) as stock:
        asked = policy(spec, port=stock.port)
        body = a_body(spec)
        asked.infer(body)
        stock.options["wants"] = ["later"]
        stock.kill()
        stock.start()
        with pytest.raises(NotReady, match="closed the connection"):
            asked.infer(body)
        with pytest.raises(Internal, match="failed: KeyError: 'later'"):
            asked.infer(body)
        asked.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hosts": "x"}, r"rollout\.openpi\.hosts: no such key; the keys are host, port"),
        ({"host": "http://x"}, r"rollout\.openpi\.host: expected a name, an address, ws://… or wss://…"),
        ({"auth": "Basic"}, r"rollout\.openpi\.auth: expected Api-Key or Bearer, got 'Basic'"),
        ({"timeout_s": 0}, r"rollout\.openpi\.timeout_s: expected a number above 0"),
        ({"image_size": [224]}, r"rollout\.openpi\.image_size: expected \[h, w\]"),
        ({"observation": {}}, r"rollout\.openpi\.observation: expected a map"),
        ({"observation": {"a": {"b": "frnt"}}}, r"observation\.a\.b: expected a camera \(front, wrist\), .* 'frnt'"),
        ({"observation": {"s": "state[90:99]"}}, r"rollout\.openpi\.observation\.s: expected"),
    ],
)  # fmt: skip
def test_mistakes_in_the_settings_are_named(spec, change, message):
    with pytest.raises(ValueError, match=message):
        OpenpiSettings.of(change, spec)


def test_a_stock_server_is_evaluated_without_a_learner(spec, tmp_path):
    with Stock() as stock:
        cfg = config(None, tmp_path, stock.port, mode="eval", episodes=2)
        cfg.task.spec = spec.to_dict()
        cfg.ip = None
        out = io.StringIO()
        assert main(cfg, out) == 0, out.getvalue()
    assert "2 episodes" in out.getvalue()
