"""Code of a driver, an operator or a reward that fails or hangs: one line, at once, here and at the learner."""

import io
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
from scripted_learner import RobotPick, ScriptedLearner, actor_config, ticket

from serl_robot_infra.envs.pick import PickEnv
from serl_robot_infra.interventions.base import NOTHING_SAID
from serl_robot_infra.main import main
from serl_robot_infra.observers import call_watch
from serl_robot_infra.rewards.environment import EnvironmentReward
from serl_transport.contract.errors import NotReady

KINDS = {"RuntimeError": RuntimeError, "OSError": OSError, "ValueError": ValueError}
HANGS_S = 1.2
closed: list[str] = []  # parts that were closed
hung: list[tuple[float, float]] = []  # from when to when a simulation did not come back


class Failing:
    """Fails at the third call of one method, or at the one named."""

    def __init__(self, at: str, kind: str = "RuntimeError", call: int = 3):
        self._at, self._kind, self._call, self._calls = at, KINDS[kind], call, 0

    def look(self, method):
        self._calls += method == self._at
        if method == self._at and self._calls == self._call:
            raise self._kind("no such device")

    def close(self):
        closed.append(type(self).__name__)
        self.look("close")


class FailingOperator(Failing):
    vocabulary = ("success",)

    def __init__(self, at, kind="RuntimeError", call=3, env=None):
        super().__init__(at, kind, call)

    def reset(self, rng, *, from_start):
        pass

    def act(self, observation, propose, tick):
        self.look("act")
        return propose(), False

    def words(self):
        self.look("words")
        return NOTHING_SAID

    def missing(self):
        self.look("missing")

    def absent(self):
        return None

    def describe(self):
        return ()


class FailingReward(Failing, EnvironmentReward):
    def judge(self, result):
        self.look("judge")
        return result


class FailsAtClose(PickEnv):
    """Its cable is out when it is let go."""

    def __init__(self):
        super().__init__(image_size=32, renderer="ray")

    def close(self):
        super().close()
        raise OSError("the port is gone")


class SlowPick(PickEnv):
    """A simulation that does not come back from a call for a while, once."""

    def __init__(self, at):
        super().__init__(image_size=32, renderer="ray")
        self._at, self._calls = at, 0

    def reset(self, seed, *, actuator_noise=0.0):
        self._hang("reset")
        return super().reset(seed, actuator_noise=actuator_noise)

    def step(self, action):
        result = super().step(action)
        self._hang("step")
        return result

    def _hang(self, method):
        self._calls += method == self._at
        if method == self._at and self._calls == 2:
            begun = time.monotonic()
            time.sleep(HANGS_S)
            hung.append((begun, time.monotonic()))


class SlowRobot(RobotPick):
    """Its fourth step hangs, and moves nothing more."""

    def step(self, action):
        result = replace(super().step(action), terminated=False, truncated=False)
        if len(self.sent) == 4:
            time.sleep(0.7)
        return result


class Screen(io.StringIO):
    """What the actor prints, and when."""

    def __init__(self):
        super().__init__()
        self._said = []

    def write(self, text):
        self._said.append((time.monotonic(), text))
        return super().write(text)

    def said_at(self, words):
        times = [at for at, text in self._said if words in text]
        assert times, f"never said: {words}; {self.getvalue()}"
        return times[0]


@pytest.fixture(scope="module")
def spec():
    env = PickEnv(image_size=32, renderer="ray")
    yield env.spec
    env.close()


@contextmanager
def learner_of(spec, *tickets, infer=None):
    """A learner that keeps what actors say of themselves: (time.monotonic(), trouble) and why they leave; `over` is
    what it says of its run."""
    with ScriptedLearner(spec, tickets, infer) as learner:
        learner.troubles, learner.left, learner.over = [], [], None
        answer = learner.server.heartbeat_reply

        def beat(peer, envelope, body):
            learner.troubles.append((time.monotonic(), body.get("trouble")))
            return answer() | {"over": learner.over}

        def leave(peer, envelope, body):
            if envelope.target == "leave":
                learner.left.append(body["reason"])
                return {}
            return learner._request(envelope.target, body)

        learner.server.handle("heartbeat", beat)
        learner.server.handle("request", leave)
        yield learner


@pytest.mark.parametrize(
    ("part", "at", "call", "kind", "code", "words"),
    [
        ("Operator", "act", 3, "RuntimeError", 1, "FailingOperator.act failed: RuntimeError: no such device (/"),
        ("Operator", "words", 3, "OSError", 1, "FailingOperator.words failed: OSError: no such device (/"),
        ("Operator", "act", 3, "ValueError", 1, "FailingOperator.act failed: ValueError: no such device (/"),
        ("Operator", "act", 1, "ValueError", 2, "no such device\n"),
        ("Reward", "judge", 3, "RuntimeError", 1, "FailingReward.judge failed: RuntimeError: no such device (/"),
        ("Reward", "judge", 3, "ValueError", 1, "FailingReward.judge failed: ValueError: no such device (/"),
        ("Reward", "judge", 1, "ValueError", 2, "no such device\n"),
    ],
)
def test_what_an_operator_or_a_reward_raises_is_one_line_and_ends_the_actor(
    spec, tmp_path, part, at, call, kind, code, words
):
    closed.clear()
    with learner_of(spec, ticket("online", 1)) as learner:
        config = actor_config(learner, tmp_path)
        node = {"_target_": f"test_parts_that_fail.Failing{part}", "at": at, "kind": kind, "call": call}
        if part == "Operator":
            config.task.operator = node
        else:
            config.reward = node
        stream = io.StringIO()
        assert main(config, stream) == code, stream.getvalue()
        assert f"actor: error: {words}" in stream.getvalue()
        assert "Traceback" not in stream.getvalue()
        assert [reason.startswith(words.strip()) for reason in learner.left] == [True]
    assert closed == [f"Failing{part}"]


def test_the_operators_device_is_let_go_at_an_ordinary_end(spec, tmp_path):
    closed.clear()
    with learner_of(spec, ticket("online", 1)) as learner:
        config = actor_config(learner, tmp_path)
        config.task.operator = {"_target_": "test_parts_that_fail.FailingOperator", "at": "act"}
        config.rollout.operator = False  # it may not drive, and its device is open all the same
        stream = io.StringIO()
        assert main(config, stream) == 0, stream.getvalue()
        assert learner.left == ["the learner says stop: the script is over; 1 episodes"]
    assert closed == ["FailingOperator"]


def test_a_device_that_fails_while_it_is_closed_is_told_and_changes_no_exit_code(spec, tmp_path):
    with learner_of(spec, ticket("online", 1)) as learner:
        config = actor_config(learner, tmp_path)
        config.task.env = {"_target_": "test_parts_that_fail.FailsAtClose"}
        config.reward = {"_target_": "test_parts_that_fail.FailingReward", "at": "close", "kind": "OSError", "call": 1}
        stream = io.StringIO()
        assert main(config, stream) == 0, stream.getvalue()
    assert "actor: FailingReward.close failed: OSError: no such device\n" in stream.getvalue()
    assert "actor: FailsAtClose.close failed: OSError: the port is gone\n" in stream.getvalue()


@pytest.mark.parametrize("at", ["step", "reset"])
def test_a_call_of_a_simulation_that_does_not_come_back_is_told_on_both_screens_while_it_lasts(
    spec, tmp_path, monkeypatch, at
):
    monkeypatch.setattr(call_watch, "RESET_S", 0.5)
    with learner_of(spec, ticket("demo", 1), ticket("demo", 2)) as learner:
        config = actor_config(learner, tmp_path, demo_noise=0.0)
        config.task.env = {"_target_": "test_parts_that_fail.SlowPick", "at": at}
        screen = Screen()
        assert main(config, screen) == 0, screen.getvalue()
        (begun, over) = hung[-1]
        assert begun + 0.4 < screen.said_at(f"SlowPick.{at} has not come back for 0.") < over
        assert over < screen.said_at(f"SlowPick.{at} came back after 1.")
        troubles = [text for _, text in learner.troubles if text]
        assert troubles
        assert all(text.startswith(f"SlowPick.{at} has not come back for ") for text in troubles)
        assert [episode.outcome.success for episode in learner.episodes()] == [True, True]


def test_a_robot_whose_step_hangs_is_stopped_told_of_and_the_next_episode_runs(spec, tmp_path):
    with learner_of(spec, ticket("demo", 1), ticket("demo", 2)) as learner:
        config = actor_config(learner, tmp_path, rate_hz=50.0, episodes=2, demo_noise=0.0)
        config.task.env = {"_target_": "test_parts_that_fail.SlowRobot"}
        config.rollout.watchdog = {"stop_ms": 300}
        screen = Screen()
        assert main(config, screen) == 0, screen.getvalue()
        robot = RobotPick.last
        told = screen.said_at("SlowRobot.step has not come back for 0.")
        assert 0.3 < told - robot.sent[3][0] < 0.3 + 0.02 + 0.35  # the limit, a period, and this machine's load
        assert robot.stops
        first, second = learner.episodes()
        assert (first.n, first.outcome.truncated_by) == (4, "stop")
        assert second.n > 4
        assert "; the robot was told to" in screen.getvalue()
        assert "episode demo-1 cut at tick 4: no action for 3" in screen.getvalue()


class AwayOperator(FailingOperator):
    """Its device is not there for a while."""

    def __init__(self, env=None):
        super().__init__("never")
        self._since = time.monotonic()

    def missing(self):
        return "gamepad: no such device" if time.monotonic() - self._since < HANGS_S else None


def test_a_device_that_is_not_there_is_told_on_both_screens(spec, tmp_path):
    with learner_of(spec, ticket("online", 1)) as learner:
        config = actor_config(learner, tmp_path)
        config.task.operator = {"_target_": "test_parts_that_fail.AwayOperator"}
        stream = io.StringIO()
        assert main(config, stream) == 0, stream.getvalue()
        told = "waiting for the operator: gamepad: no such device"
        assert f"{told}\n" in stream.getvalue()
        assert told in [text for _, text in learner.troubles]
        assert len(learner.episodes()) == 1


def test_an_episode_that_waits_for_its_policy_is_not_begun_once_the_run_is_over(spec, tmp_path):
    def never(body):
        learner.over = "an operator stopped the run"
        raise NotReady("the first version is not there yet")

    with learner_of(spec, ticket("online", 1), infer=never) as learner:
        stream = io.StringIO()
        assert main(actor_config(learner, tmp_path), stream) == 0, stream.getvalue()
        assert "episode online-1 cut at tick 0: not begun: an operator stopped the run\n" in stream.getvalue()
        assert learner.left == ["the learner says stop: the script is over; 0 episodes"]
        assert learner.episodes() == []
