"""Step batches: what leaves the adder joins to the episode that went in."""

from dataclasses import replace

import numpy as np
import pytest

from serl_robot_infra.adder import Adder
from serl_transport.contract.errors import BadFrame
from serl_transport.contract.schema import Episode, EpisodeInfo, Observation, Outcome, StepBatch, TimeStep
from serl_transport.contract.specs import TaskSpec
from serl_transport.wire import blob, codec

SPEC = TaskSpec.from_dict(
    {
        "name": "fake",
        "prompt": "do it",
        "cameras": {"front": [4, 6]},
        "state_names": ["x", "y"],
        "state_low": [-1, -1],
        "state_high": [1, 1],
        "action_names": ["dx"],
        "action_low": [-1],
        "action_high": [1],
        "control_hz": 10,
        "max_ticks": 60,
    }
)
INFO = EpisodeInfo("e1", "actor-0", "boot", "fake", "do it", "online", "online", 7, 1.5)


def observation(t):
    return Observation({"front": np.full((4, 6, 3), t, np.uint8)}, np.float32([t, -t]))


def step(t, *, done=False, truncated=False):
    return TimeStep(observation(t), np.float32([t / 10]), float(t), done, truncated, done, t % 2 == 0, t, 100 + t)


def record(n, batch_ticks, outcome, last):
    sent = []
    adder = Adder(sent.append, batch_ticks)
    adder.begin(INFO)
    for t in range(n - 1):
        adder.add(step(t))
    adder.add(last)
    adder.end(observation(n), outcome)
    # Through the codec, as on the wire.
    return [StepBatch.from_body(codec.unpack(blob.split(blob.join(codec.pack(body)))), SPEC) for body in sent]


def test_who_drove_and_who_judged_is_in_the_episode_and_lasts_when_its_actor_dies():
    steps = [replace(step(t), driver=name) for t, name in enumerate(["Ann", None, "script", "Ann"])]
    judged = Outcome(True, "human", None, "Bo")
    bodies = [
        StepBatch.from_steps(INFO, 0, steps[:2]).to_body(),
        StepBatch.from_steps(INFO, 2, steps[2:]).to_body(),
        StepBatch.from_steps(INFO, 4, [step(4, done=True)], observation(5), judged).to_body(),
    ]
    batches = [StepBatch.from_body(body, SPEC) for body in bodies]
    whole, cut = Episode.from_batches(batches), Episode.cut(batches[:2])
    assert (whole.drivers, whole.outcome.judge) == (("Ann", "script"), "Bo")
    assert (cut.drivers, cut.outcome.judge) == (("Ann", "script"), None)
    del bodies[0]["drivers"], bodies[2]["outcome"]["judge"]  # as older releases wrote them
    assert [StepBatch.from_body(bodies[k], SPEC).drivers for k in (0, 2)] == [(), ()]
    for part, value in (("drivers", ["a, b"]), ("drivers", "Ann"), ("outcome", {**bodies[2]["outcome"], "judge": 7})):
        with pytest.raises(BadFrame, match=r"(drivers|judge): expected"):
            StepBatch.from_body(bodies[2] | {part: value}, SPEC)


@pytest.mark.parametrize(
    ("n", "sizes"), [(1, [1]), (9, [9]), (10, [10]), (11, [10, 1]), (20, [10, 10]), (25, [10, 10, 5])]
)
def test_batches_join_to_the_episode(n, sizes):
    batches = record(n, 10, Outcome(True, "environment", None), step(n - 1, done=True))
    assert [batch.n for batch in batches] == sizes
    assert [batch.final for batch in batches] == [False] * (len(sizes) - 1) + [True]
    episode = Episode.from_batches(batches)
    assert episode.info == INFO
    assert episode.outcome.success
    assert episode.arrays["observation.state"][:, 0].tolist() == list(range(n + 1))
    assert episode.arrays["observation.images.front"][:, 0, 0, 0].tolist() == list(range(n + 1))
    assert episode.arrays["next.reward"].tolist() == list(range(n))
    assert episode.arrays["policy_version"].tolist() == list(range(n))
    assert episode.arrays["next.done"].tolist() == [False] * (n - 1) + [True]


@pytest.mark.parametrize("n", [1, 10, 11])
def test_a_cut_marks_the_last_executed_tick_truncated(n):
    batches = record(n, 10, Outcome(False, "environment", "stop"), step(n - 1))
    episode = Episode.from_batches(batches)
    assert episode.n == n
    assert episode.arrays["next.truncated"].tolist() == [False] * (n - 1) + [True]
    assert not episode.arrays["next.done"].any()


def test_an_episode_without_ticks_is_not_sent_and_the_next_one_is_clean():
    sent = []
    adder = Adder(sent.append, 10)
    adder.begin(INFO)
    assert not adder.end(observation(0), Outcome(False, "environment", "stop"))
    adder.begin(INFO)
    adder.abandon()
    assert sent == []
    adder.begin(INFO)
    adder.add(step(0, done=True))
    assert adder.end(observation(1), Outcome(True, "environment", None))
    assert sent[0]["first_tick"] == 0


def test_a_batch_leaves_while_the_episode_runs():
    sent = []
    adder = Adder(sent.append, 3)
    adder.begin(INFO)
    for t in range(4):
        adder.add(step(t))
    assert [body["first_tick"] for body in sent] == [0]


def test_batch_ticks_must_be_positive():
    with pytest.raises(ValueError, match="batch_ticks: expected at least 1, got 0"):
        Adder(print, 0)
