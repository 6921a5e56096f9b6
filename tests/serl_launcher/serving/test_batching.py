"""Which questions are answered together, and when: the queue of the policy server, with a clock made of numbers."""

import pytest

from serl_launcher.serving.batching import BatchQueue, Waiting


def ask(actor, arrived, **options):
    return Waiting(actor, None, actor, arrived, **options)


def queue(max_batch=4, max_wait_s=0.01, bound=8, patience=0.5):
    return BatchQueue(max_batch, max_wait_s, bound, patience)


def names(items):
    return [item.actor for item in items]


def test_a_lone_actor_does_not_wait_for_company():
    q = queue()
    assert q.wait_s(0.0) is None
    q.offer(ask("a", 0.0))
    assert q.wait_s(0.0) == 0.0


def met(q, *actors, think_s=0.002, start=0.0):
    """Actors that have asked twice, `think_s` after an answer; they were answered last at the returned time."""
    now = start
    for _ in range(2):
        for actor in actors:
            q.offer(ask(actor, now))
        now += 0.02
        q.served(q.take(), 0.02, now)
        now += think_s
    return now - think_s


def test_the_first_waits_for_those_about_to_ask_and_no_longer_than_max_wait():
    q = queue()
    now = met(q, "a", "b", think_s=0.004)
    q.offer(ask("a", now + 0.001))
    assert q.wait_s(now + 0.002) == pytest.approx(0.009)
    assert q.wait_s(now + 0.1) == 0.0
    q.offer(ask("b", now + 0.004))  # everybody is here
    assert q.wait_s(now + 0.004) == 0.0


def test_nobody_waits_for_an_actor_that_asks_much_later():
    q = queue()
    now = met(q, "a", "b", think_s=0.1)
    q.offer(ask("a", now + 0.05))
    assert q.wait_s(now + 0.05) == 0.0  # b asks at 0.1, after the patience of a
    q.take()
    q.offer(ask("a", now + 0.095))
    assert q.wait_s(now + 0.095) == pytest.approx(0.01)


def test_an_actor_that_left_is_no_longer_expected():
    q = queue()
    now = met(q, "a", "b")
    q.offer(ask("a", now + 0.5))
    assert q.wait_s(now + 0.5) == 0.0


def test_a_full_bucket_fires_and_the_rest_stays():
    q = queue(max_batch=2)
    for k in range(3):
        q.offer(ask(f"a{k}", k / 1000))
    assert q.wait_s(0.003) == 0.0
    assert names(q.take()) == ["a0", "a1"]
    assert names(q.take()) == ["a2"]


def test_slack_that_runs_out_fires_before_max_wait():
    q = queue(max_wait_s=1.0)
    now = met(q, "a", "b")  # a batch takes 20 ms
    q.offer(ask("a", now, deadline=now + 0.05))
    # 50 ms of time less 20 ms of work
    assert q.wait_s(now) == pytest.approx(0.03)
    assert q.wait_s(now + 0.031) == 0.0


def test_the_late_are_taken_out():
    q = queue()
    q.offer(ask("a", 0.0, deadline=0.05))
    q.offer(ask("b", 0.0, deadline=0.2))
    assert q.expire(0.05) == []
    assert names(q.expire(0.1)) == ["a"]
    assert names(q.take()) == ["b"]


def test_actors_go_before_evaluation_and_evaluation_does_not_starve():
    q = queue(max_batch=1, patience=0.5)
    q.offer(ask("eval", 0.0, evaluation=True))
    q.offer(ask("early", 0.1))
    q.offer(ask("late", 0.6))
    assert [names(q.take()) for _ in range(3)] == [["early"], ["eval"], ["late"]]


def test_a_full_queue_turns_away_who_would_be_served_last():
    q = queue(bound=2)
    assert q.offer(ask("eval", 0.0, evaluation=True)) is None
    assert q.offer(ask("a", 0.1)) is None
    assert q.offer(ask("b", 0.2)).actor == "eval"
    assert q.offer(ask("c", 0.3)).actor == "c"
    assert len(q) == 2


@pytest.mark.parametrize(("change", "key"), [({"max_batch": 0}, "max_batch"), ({"bound": 0}, "max_queue")])
def test_settings_that_cannot_work_are_named(change, key):
    with pytest.raises(ValueError, match=f"serving.{key}: expected at least 1, got 0"):
        queue(**change)
