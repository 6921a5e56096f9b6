"""Chunks asked for ahead: which action is given at which tick, what the question carries, what a failure costs."""

import threading

import numpy as np
import pytest

from openpi_client import BasePolicy, RealtimeChunkBroker


class Stepped(BasePolicy):
    """Answers when it is let; the chunk of an observation of tick k is [k, k + 1, …]; version counts the answers."""

    def __init__(self, horizon=8):
        self.horizon, self.questions, self.resets = horizon, [], 0
        self.free = threading.Semaphore(0)
        self.asked = threading.Semaphore(0)
        self.fail = None

    def infer(self, obs):
        self.questions.append(obs)
        self.asked.release()
        assert self.free.acquire(timeout=20)
        if self.fail is not None:
            raise self.fail
        actions = np.arange(self.horizon, dtype=np.float32)[:, None] + obs["tick"]
        return {"actions": actions, "policy_version": len(self.questions)}

    def reset(self):
        self.resets += 1


def drive(broker, policy, ticks, answered_at, start=0):
    """(value, version) a tick; before the ticks of `answered_at` the policy gives one answer."""
    out = []
    for tick in range(start, start + ticks):
        if tick in answered_at:
            before = broker._answers.qsize()
            policy.free.release()
            if tick != start:
                while broker._answers.qsize() == before:
                    pass
        answer = broker.infer({"tick": tick})
        out.append((float(answer["actions"][0]), answer["policy_version"]))
    return out


@pytest.fixture
def policy():
    return Stepped()


def test_every_tick_gets_the_action_of_its_own_time_and_none_waits(policy):
    broker = RealtimeChunkBroker(policy, execute_horizon=4, mode="async")
    out = drive(broker, policy, 12, answered_at={0, 3, 6, 9})
    assert [value for value, _ in out] == list(range(12))
    # Asked at ticks 0, 1, 3 (index 4 - 2 of the chunk of tick 1), 6 (index 4 - 3 of the chunk of tick 3).
    assert [version for _, version in out] == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert broker.idle_ticks == 0
    assert broker.delay == 3
    assert all("prefix_actions" not in question for question in policy.questions)
    broker.close()


def test_rtc_sends_the_rest_of_the_running_chunk_from_this_tick_on(policy):
    broker = RealtimeChunkBroker(policy, execute_horizon=4, mode="rtc")
    drive(broker, policy, 6, answered_at={0, 3})
    assert all(policy.asked.acquire(timeout=10) for _ in range(3))
    first, second, third = policy.questions
    assert "prefix_actions" not in first
    assert second["prefix_actions"][:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert second["inference_delay"] == 0  # not known yet
    # The second chunk began at tick 1; asked again at its index 4 − 2, tick 3, with the delay of the last one.
    assert third["tick"] == 3
    assert third["prefix_actions"][:, 0].tolist() == [3, 4, 5, 6, 7, 8]
    assert third["inference_delay"] == 2
    assert first["tick"] == 0
    broker.close()


def test_a_chunk_that_is_missed_twice_is_no_longer_trusted(policy):
    policy.horizon = 50
    broker = RealtimeChunkBroker(policy, execute_horizon=4, mode="async", miss_limit=2)
    drive(broker, policy, 2, answered_at={0})
    for tick in range(2, 9):  # asked at tick 1
        assert broker.infer({"tick": tick})["policy_version"] == 1
    assert broker.missed_chunks == 2
    timer = threading.Timer(0.3, lambda: (policy.free.release(), policy.free.release()))
    timer.start()
    answer = broker.infer({"tick": 9})
    assert broker.idle_ticks == 1
    assert answer["policy_version"] == 2
    assert float(answer["actions"][0]) == 9
    broker.close()


def test_a_failure_is_raised_only_when_an_action_is_missed_and_asked_again_before(policy):
    broker = RealtimeChunkBroker(policy, execute_horizon=4, mode="async", miss_limit=5)
    drive(broker, policy, 1, answered_at={0})
    assert policy.asked.acquire(timeout=10)
    broker.infer({"tick": 1})
    assert policy.asked.acquire(timeout=10)
    policy.fail = ConnectionError("the link is cut")
    policy.free.release()
    while broker._answers.empty():
        pass
    policy.fail = None
    assert float(broker.infer({"tick": 2})["actions"][0]) == 2  # the running chunk goes on
    assert policy.asked.acquire(timeout=10)  # and the next question is out
    assert policy.questions[-1]["tick"] == 2
    for tick in range(3, 8):
        broker.infer({"tick": tick})
    policy.fail = ConnectionError("still cut")
    policy.free.release(2)  # it asks once more where the failure is there before the tick
    with pytest.raises(ConnectionError, match="still cut"):
        broker.infer({"tick": 8})
    policy.fail = None
    policy.free.release()
    assert float(broker.infer({"tick": 8})["actions"][0]) == 8
    broker.close()


def test_what_was_asked_before_someone_else_drove_is_void(policy):
    broker = RealtimeChunkBroker(policy, execute_horizon=4, mode="rtc")
    drive(broker, policy, 2, answered_at={0})
    broker.drop_chunk()
    policy.free.release()  # the answer to tick 1
    policy.free.release()  # the answer to the new plan
    answer = broker.infer({"tick": 7})
    assert float(answer["actions"][0]) == 7
    assert "prefix_actions" not in policy.questions[-1]
    broker.reset()
    assert policy.resets == 1
    broker.close()


def test_settings_that_cannot_work_are_refused(policy):
    with pytest.raises(ValueError, match="realtime: expected off, async or rtc, got 'fast'"):
        RealtimeChunkBroker(policy, 4, "fast")
    with pytest.raises(ValueError, match="execute_horizon: expected at least 1, got 0"):
        RealtimeChunkBroker(policy, 0, "rtc")
    with pytest.raises(ValueError, match="hold_after_chunks: expected at least 1, got 0"):
        RealtimeChunkBroker(policy, 4, "rtc", 0)
    broker = RealtimeChunkBroker(policy, 9, "rtc")
    policy.free.release()
    with pytest.raises(ValueError, match="execute_horizon=9 is longer than the chunk, 8 actions"):
        broker.infer({"tick": 0})
    broker.close()


def test_a_new_chunk_is_told_as_the_plan_from_its_tick_on(policy):
    broker, plans = RealtimeChunkBroker(policy, execute_horizon=4, mode="async"), []
    infer = broker.infer

    def noted(obs):
        answer = infer(obs)
        if "plan" in answer:
            plans.append((obs["tick"], answer["plan"][:, 0].tolist()))
        return answer

    broker.infer = noted
    drive(broker, policy, 6, answered_at={0, 3})
    assert plans == [(0, [0, 1, 2, 3, 4, 5, 6, 7]), (3, [3, 4, 5, 6, 7, 8])]  # asked at tick 1, answered at 3
    broker.close()
