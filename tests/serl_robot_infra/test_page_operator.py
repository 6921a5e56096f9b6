"""operator=browser: what a page sends drives, judges and is let go, by the age of each frame and nobody's clock."""

import functools
import time

import numpy as np
import pytest
from omegaconf import OmegaConf

from flowserl_cli.compose import load_config
from serl_robot_infra.envs.pick import PickEnv
from serl_robot_infra.interventions.base import OperatorGoneError
from serl_robot_infra.interventions.page_hold import PageHold
from serl_robot_infra.interventions.page_keys import PageKeys
from serl_robot_infra.operators import build_operator, is_person
from serl_transport.contract.errors import ServerSilent
from serl_transport.contract.hands import HandFrame
from serl_transport.contract.schema import Observation

PROPOSAL = np.float32([0.001, 0, 0, -0.5])
SEEN = Observation({}, np.zeros(5, np.float32))
LIMIT_S = 0.25


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def hold():
    clock = Clock()
    made = PageHold(LIMIT_S, clock)
    made.clock = clock
    return made


def frame(seq, echo, held=(), taps=(), page="p1", **axes):
    return HandFrame(page, seq, echo, frozenset(held), axes, tuple(taps), "ann")


def test_a_frame_is_as_old_as_the_beat_that_it_names(hold):
    beat = hold.beat()["beat"]
    hold.clock.now += LIMIT_S - 0.01
    hold.take(frame(1, beat, ["w"]))
    assert (hold.pressed()[0], hold.person) == ({"w"}, "ann")
    hold.clock.now += 0.02  # the beat is too old now: a page that sees no newer one is cut off
    hold.take(frame(2, beat, ["w", "r"], [(1, "t")]))
    assert hold.pressed()[0] == {"w"}
    assert hold.beat()["stale"] == 1
    for unknown in (0, beat + 1000):
        hold.take(frame(3, unknown, ["w", "r"]))
    assert (hold.pressed()[0], hold.beat()["stale"], hold.taps()) == ({"w"}, 3, [])


def test_silence_lets_go_and_so_does_the_page_itself(hold):
    hold.take(frame(1, hold.beat()["beat"], ["w"], LX=0.5))
    hold.clock.now += LIMIT_S - 0.01
    assert hold.pressed() == ({"w"}, {"LX": 0.5})
    hold.clock.now += 0.02
    assert hold.pressed() == (frozenset(), {})
    assert hold.silent_s == pytest.approx(0.01)
    hold.take(frame(2, hold.beat()["beat"], ["w"]))
    assert hold.beat()["holds"]
    hold.let_go("p2")  # somebody else's page
    assert hold.silent_s <= 0
    hold.let_go("p1")
    assert hold.pressed() == (frozenset(), {})
    assert not hold.beat()["holds"]


def test_doubled_late_and_lost_frames_tap_once(hold):
    echo = hold.beat()["beat"]
    hold.take(frame(2, echo, ["t"], [(1, "t"), (2, "g")]))
    hold.take(frame(2, echo, [], [(3, "y")]))  # doubled
    hold.take(frame(1, echo, ["w"], [(1, "t")]))  # overtaken
    hold.take(frame(3, echo, [], [(1, "t"), (2, "g"), (3, "y")]))
    assert hold.taps() == ["t", "g", "y"]
    assert hold.taps() == []
    assert hold.beat()["tap"] == 3
    hold.take(frame(1, echo, [], [(1, "x")], page="p2"))  # another page counts from 1 again
    assert hold.taps() == ["x"]


@pytest.fixture(scope="module")
def env():
    return PickEnv(image_size=32, renderer="ray")


class Link:
    """A learner at which nobody looks; the test hands the frames over itself."""

    watched = False


@functools.cache
def composed():
    return load_config(["operator=browser"])


def configured(*words):
    return OmegaConf.merge(composed(), OmegaConf.from_dotlist(list(words)))


def operator_of(env, *words, link=None):
    operator = build_operator(configured(*words), env, link or Link())
    operator._page.hold.clock = Clock()
    operator._page.hold._clock = operator._page.hold.clock
    return operator


def press(operator, seq, held=(), taps=(), **axes):
    hold = operator._page.hold
    hold.take(frame(seq, hold.beat()["beat"], held, taps, **axes))


def act(operator):
    action, by_hand = operator.act(SEEN, lambda: PROPOSAL, 0)
    return [round(value, 6) for value in action.tolist()], by_hand


def test_held_keys_move_together_and_the_takeover_key_ends_with_the_hold(env):
    operator = operator_of(env, "operator.release_s=0.001")
    assert operator.missing() is None
    operator.reset(np.random.default_rng(0), from_start=False)
    assert act(operator) == ([0.001, 0, 0, -0.5], False)
    press(operator, 1, ["w", "d"])
    assert act(operator) == ([0.0125, -0.0125, 0, -0.5], True)  # half of the limits; both keys at once
    press(operator, 2, ["w", "s"], [(1, "t"), (2, "g")])
    assert act(operator) == ([0, 0, 0, 1], True)  # taken over: the gripper closes
    press(operator, 3)
    assert act(operator) == ([0, 0, 0, 1], True)  # pinned, though nothing is pressed
    operator._page.hold.clock.now += LIMIT_S + 0.01
    assert not act(operator)[1]
    press(operator, 4)
    assert not act(operator)[1]  # who comes back has to take over anew


def test_sticks_move_while_the_right_shoulder_is_held(env):
    operator = operator_of(env)
    operator.reset(np.random.default_rng(0), from_start=False)
    press(operator, 1, ["LB"], LY=-1.0)
    assert act(operator) == ([0.001, 0, 0, -0.5], False)
    press(operator, 2, ["RB"], LY=-1.0, RY=0.1)
    assert act(operator) == ([0.0125, 0, 0, -0.5], True)  # away is forward; within the deadband nothing
    press(operator, 3, [], [(1, "north"), (2, "start")], LY=-1.0)
    assert not act(operator)[1]
    said = operator.words()
    assert (said.success, said.ready, said.failure) == (True, True, False)


def test_a_word_said_in_time_counts_when_the_page_is_gone_and_a_takeover_does_not(env):
    operator = operator_of(env)
    operator.reset(np.random.default_rng(0), from_start=False)
    press(operator, 1, [], [(1, "t"), (2, "y")])
    operator._page.hold.clock.now += 10
    assert operator.words().success
    assert not act(operator)[1]


def test_a_demonstration_waits_for_somebody_and_is_cut_without_them(env):
    operator = operator_of(env)
    assert operator.absent() == "waiting for the operator: take the keys at the console, whose address is on the " \
        "learner's screen"  # fmt: skip
    press(operator, 1)
    assert operator.absent() is None
    operator.reset(np.random.default_rng(0), from_start=True)
    assert act(operator)[1]
    operator._page.hold.clock.now += LIMIT_S + 1.0
    assert act(operator)[0][:3] == [0, 0, 0]  # nobody moves it
    operator._page.hold.clock.now += 1.1
    with pytest.raises(OperatorGoneError, match=r"let go 2\.1 s ago, in mid-demonstration"):
        act(operator)


def test_the_device_asks_while_a_page_is_open_and_survives_a_silent_learner(env):
    class Scripted:
        watched = True
        asked: list = []
        answers = [ServerSilent("away"), {"frame": {"page": "p", "seq": 0}}, {"frame": {"page": "p", "gone": True}}]

        def request(self, type, payload, *, timeout_ms):
            self.asked.append((type, payload))
            if not self.answers:
                self.watched = False
                return {"frame": None}
            answer = self.answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

    link = Scripted()
    operator = build_operator(configured(), env, link)
    for _ in range(200):
        if not link.watched:
            break
        time.sleep(0.02)
    operator.close()
    kinds, beats = zip(*link.asked, strict=True)
    assert set(kinds) == {"hands"}
    assert len(beats) == 4
    assert "w / s: dx + / -" in beats[0]["table"]
    assert "pad RB: take over, let go (drives while it is held)" in beats[0]["table"]
    assert beats[1]["table"] is None
    assert [beat["beat"] - beats[0]["beat"] for beat in beats] == [0, 1, 2, 3]


def test_it_is_a_persons_device_and_without_a_learner_nobody_can_be_there(env):
    cfg = configured()
    assert is_person(cfg)
    assert "there is none" in build_operator(cfg, env).missing()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["operator.keys.success=w"], "expected different keys, got 'w' 2 times"),
        (["operator.keys.stop=esc"], "operator.keys.stop: esc is the page's own"),
        (["operator.pad_buttons.stop=B7"], "operator.pad_buttons.stop: expected one of south"),
        (["operator.pad_axes.dx=LZ"], "operator.pad_axes.dx: expected one of LX"),
        (["operator.age_limit_ms=0"], "operator.age_limit_ms: expected a number above 0"),
        (["operator.axes.dx=[w]"], "operator.axes.dx: expected \\[key that increases it"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_its_key(env, words, why):
    with pytest.raises(Exception, match=why):
        build_operator(configured(*words), env, Link())


def test_keys_are_named_as_the_terminals_and_case_does_not_matter():
    keys = PageKeys({"dx": ["W", "space"]}, {"success": "Y"}, {}, {}, 0.1)
    assert keys.motion(frozenset({"w"}), {}) == {"dx": 1.0}
    assert keys.motion(frozenset({"space"}), {}) == {"dx": -1.0}
    assert keys.commands == {"y": "success"}
    assert not keys.takes_over(frozenset({"RB"}))
