"""Threshold schedules, source weights and the acceptance ledger, over a real ring."""

import json

import numpy as np
import pytest
from configured import rule as accepting
from test_transitions import SPEC, arrays

from serl_launcher.replay.ring import RingReader, RingWriter
from serl_launcher.replay.threshold import QuantileThreshold, SteppedThreshold
from serl_launcher.replay.verdicts import VerdictLedger, read, rule_text
from serl_launcher.replay.views import ChunkView

RULE = accepting(noop_threshold=0.0, min_return=0.5)


@pytest.fixture
def ring(tmp_path):
    writer = RingWriter(SPEC, 80, tmp_path, shared=tmp_path)
    yield writer
    writer.close()


def put(ring, ordinal, return_, mode="online", driven=(), success=None):
    """Four ticks; the whole return comes at the last. success: what the return says when None."""
    body = arrays(4, 10 * ordinal, "truncated", [0, 0, 0, return_])
    body["intervention"][list(driven)] = True
    body["policy_version"][:] = ordinal
    ring.append(ordinal, mode, return_ > 0 if success is None else success, body)


def view_of(ring, rule=RULE, **settings):
    view = ChunkView(rule, SPEC, 2, **settings)
    view.attach(RingReader(ring.path))
    return view


def episodes_drawn(view):
    return set((view.sample(np.random.default_rng(0), 300).action[:, 0, 0] // 10).astype(int))


def test_the_quantile_rises_with_the_returns_and_never_falls():
    threshold = QuantileThreshold(start=0.1, quantile=0.5, window=3, ceiling=0.8)
    seen = []
    for return_ in (0.2, 0.4, 0.6, 0.1, 0.0, 0.9, 1.0, 1.0):
        threshold.observe("online", return_)
        seen.append(threshold.value)
    # Medians of the last three, once there are three: 0.4, 0.4, 0.1, 0.1, 0.9, 1.0; held up, and capped at 0.8.
    assert seen == [0.1, 0.1, 0.4, 0.4, 0.4, 0.4, 0.8, 0.8]
    threshold.observe("demo", 5.0)
    threshold.reset()
    assert threshold.value == 0.1


def test_steps_count_online_episodes():
    threshold = SteppedThreshold({0: 0.5, 2: 0.9})
    for mode in ("demo", "online", "online"):
        assert threshold.value == 0.5
        threshold.observe(mode, 1.0)
    assert threshold.value == 0.9
    with pytest.raises(ValueError, match="m ≤ m'"):
        SteppedThreshold({0: 0.5, 2: 0.4})


def test_a_threshold_stays_where_it_was_when_the_trainer_starts_anew_and_the_ring_has_moved_on(tmp_path, ring):
    path, rule = tmp_path / "acceptance.jsonl", accepting(noop_threshold=0.0, min_return=0.5)

    def start():
        threshold = QuantileThreshold(0.5, quantile=0.5, window=2)
        ledger = VerdictLedger(path, rule_text(rule, threshold))
        return threshold, view_of(ring, threshold=threshold, on_verdict=ledger.note, history=ledger.returns)

    threshold, view = start()
    for ordinal in range(20):  # 16 of them fit
        put(ring, ordinal, 0.95 if ordinal < 4 else 0.6)
        view.refresh()
    m, lines = threshold.value, path.read_text()
    assert m == pytest.approx(0.95)
    threshold, view = start()
    view.refresh()
    assert threshold.value == m
    assert view.accepted["online"] == 0  # the good ones have left the ring, the others are no better than before
    assert path.read_text() == lines


def test_a_ledger_tells_rules_with_other_schedules_apart():
    rule = accepting()
    texts = {
        rule_text(rule),
        rule_text(rule, QuantileThreshold(0.5)),
        rule_text(rule, QuantileThreshold(0.5, window=7)),
        rule_text(rule, SteppedThreshold({0: 0.5})),
    }
    assert len(texts) == 4
    assert rule_text(rule, SteppedThreshold({0: 0.5})).endswith("m by SteppedThreshold({0: 0.5})")


def test_a_risen_threshold_rejects_earlier_online_episodes_too_and_keeps_demonstrations(ring):
    verdicts = []
    view = view_of(
        ring, threshold=QuantileThreshold(0.2, quantile=1.0, window=2), on_verdict=lambda v: verdicts.append(v)
    )
    put(ring, 0, 0.3, "demo")
    put(ring, 1, 0.3)
    put(ring, 2, 0.9)
    put(ring, 3, 0.6)
    view.refresh()
    # 1 and 2 come under m = 0.2; then m = 0.9: 1 leaves, 3 is never in.
    assert episodes_drawn(view) == {0, 2}
    assert view.accepted == {"demo": 1, "online": 1}
    told = [(v.ordinal, v.accepted, v.reason, v.threshold) for v in verdicts]
    assert told == [
        (0, True, "accepted", 0.2),
        (1, True, "accepted", 0.2),
        (2, True, "accepted", 0.2),
        (1, False, "threshold_rose", pytest.approx(0.9)),
        (3, False, "return", pytest.approx(0.9)),
    ]
    view.clear()
    view.refresh()  # the same episodes give the same thresholds again
    assert [(v.ordinal, v.accepted, v.reason, v.threshold) for v in verdicts[5:]] == told


def test_a_schedule_works_on_the_returns_of_failures_where_they_may_be_imitated(ring):
    for ordinal, return_ in enumerate((0.3, 0.6, 0.6, 0.2)):
        put(ring, ordinal, return_, success=False)
    rule = accepting(noop_threshold=0.0, require_success=False)
    view = view_of(ring, rule, threshold=QuantileThreshold(0.2, quantile=1.0, window=2))
    view.refresh()
    assert episodes_drawn(view) == {1, 2}
    strict = view_of(ring, threshold=QuantileThreshold(0.2, quantile=1.0, window=2))
    strict.refresh()
    assert strict.reasons == {"failed": 3, "return": 1}


def test_weights_follow_the_source_of_a_chunk(ring):
    put(ring, 0, 1.0, "demo", driven=[0, 1, 2, 3])
    put(ring, 1, 1.0, driven=[0, 1])
    view = view_of(ring, weights={"operator": 3.0, "demo": 0.5})
    view.refresh()
    batch = view.sample(np.random.default_rng(0), 200)
    want = {0: 0.5, 10: 3.0, 11: 3.0, 12: 1.0, 13: 1.0}  # ticks 12 and 13 are the policy's own
    assert all(batch.weight[i] == want.get(int(batch.action[i, 0, 0]), 0.5) for i in range(200))
    with pytest.raises(ValueError, match="expected weights ≥ 0 of demo, autonomous, operator"):
        view_of(ring, weights={"human": 1.0})


def test_an_episode_with_a_reward_that_is_no_number_is_rejected_and_named(ring):
    verdicts = []
    put(ring, 0, float("nan"))
    put(ring, 1, 1.0)
    view = view_of(ring, threshold=QuantileThreshold(0.2, window=1), on_verdict=lambda v: verdicts.append(v.reason))
    view.refresh()
    assert verdicts == ["reward_not_finite", "accepted"]
    assert episodes_drawn(view) == {1}


def test_a_view_whose_episodes_are_all_rejected_says_so(ring):
    view = view_of(ring)
    for ordinal in range(4):
        put(ring, ordinal, 0.0)
    view.refresh()
    assert view.problem("online", 3) is None  # it may still be bad luck
    put(ring, 4, 0.0)
    view.refresh()
    assert view.problem("online", 3) == "all 5 online episodes were rejected (return: 5): nothing to learn from"
    put(ring, 5, 1.0)
    view.refresh()
    assert view.problem("online", 3) is None


def test_the_ledger_keeps_each_verdict_once_over_restarts_and_a_torn_line(ring, tmp_path):
    path, rule = tmp_path / "acceptance.jsonl", rule_text(accepting(min_return=0.5))

    def run(rule):
        view = view_of(ring, on_verdict=VerdictLedger(path, rule).note)
        view.refresh()

    put(ring, 0, 1.0)
    put(ring, 1, 0.0)
    run(rule)
    with path.open("a") as file:
        file.write('{"ordinal": 2, "acc')  # a kill in the middle of a line
    put(ring, 2, 1.0, driven=[3])
    run(rule)
    rows = read(path)
    assert [(r["ordinal"], r["accepted"], r["reason"]) for r in rows] == [
        (0, True, "accepted"), (1, False, "return"), (2, True, "accepted"),
    ]  # fmt: skip
    # Ticks 0 to 2 of episode 2 are what the operator corrected.
    assert (rows[2]["labels"], rows[2]["operator_ticks"], rows[2]["policy_versions"]) == (1, 1, [2, 2])
    assert rows[0]["rule"] == rule
    assert "min_return=0.5" in rule
    run(rule_text(accepting(min_return=0.7)))  # another rule speaks for itself
    assert len(read(path)) == 6
    run(rule)  # the first rule again: the newest line of each episode is its own
    assert [row["rule"] for row in read(path)[6:]] == [rule] * 3
    assert VerdictLedger(path, rule).accepted == 2
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_quantile_of_discounted_returns_is_a_threshold_on_speed(ring):
    rule = accepting(noop_threshold=0.0, min_return=0.0, discount=0.9)
    verdicts, threshold = [], QuantileThreshold(0.0, quantile=0.5, window=2)
    view = view_of(ring, rule=rule, threshold=threshold, on_verdict=verdicts.append)
    for ordinal in range(3):
        put(ring, ordinal, 1.0)
    view.refresh()
    assert [v.return_ for v in verdicts] == pytest.approx([0.9**3] * 3)
    assert threshold.value == pytest.approx(0.9**3)
