"""Chunk views over a real ring: clipping at the episode's end, the pad mask, eviction."""

from dataclasses import replace

import numpy as np
import pytest
from configured import rule as accepting

from serl_launcher.replay.ring import RingReader, RingWriter
from serl_launcher.replay.ring_layout import RingError
from serl_launcher.replay.transitions import TransitionView
from serl_launcher.replay.views import ChunkView
from serl_transport.contract.specs import TaskSpec

SPEC = TaskSpec.from_dict(
    {
        "name": "t",
        "prompt": "p",
        "cameras": {"front": [4, 4]},
        "state_names": ["a"],
        "state_low": [-1],
        "state_high": [1],
        "action_names": ["x"],
        "action_low": [-100],
        "action_high": [100],
        "control_hz": 10,
        "max_ticks": 60,
    }
)


def arrays(n, first, success=True, intervention=()):
    """An episode whose action at tick k is first + k and whose image and state say k."""
    flags = np.zeros(n, bool)
    flags[list(intervention)] = True
    reward = np.zeros(n, np.float32)
    reward[-1] = float(success)
    false = np.zeros(n, bool)
    return {
        "observation.images.front": np.broadcast_to(
            np.arange(n + 1, dtype=np.uint8)[:, None, None, None], (n + 1, 4, 4, 3)
        ),
        "observation.state": np.arange(n + 1, dtype=np.float32)[:, None],
        "action": (first + np.arange(n, dtype=np.float32))[:, None],
        "next.reward": reward,
        "next.done": false,
        "next.truncated": false,
        "next.success": false,
        "intervention": flags,
        "policy_version": np.zeros(n, np.int64),
        "time_ns": np.zeros(n, np.int64),
    }


@pytest.fixture
def ring(tmp_path):
    writer = RingWriter(SPEC, 40, tmp_path, shared=tmp_path)
    yield writer
    writer.close()


def view_of(ring, horizon=4, spec=SPEC, **rule):
    view = ChunkView(accepting(**({"noop_threshold": 0.0} | rule)), spec, horizon)
    view.attach(RingReader(ring.path))
    return view


def test_chunks_stop_at_the_episodes_end_and_say_so(ring):
    ring.append(0, "demo", True, arrays(5, 10))
    ring.append(1, "demo", True, arrays(5, 20))
    view = view_of(ring)
    assert view.refresh() == 2
    batch = view.sample(np.random.default_rng(0), 500)
    seen = {tuple(a[:, 0].astype(int)): tuple(p) for a, p in zip(batch.action, batch.is_pad, strict=True)}
    # Starts 10..14 and 20..24; the last action repeats under the mask and never runs into the next episode.
    assert seen[(13, 14, 14, 14)] == (False, False, True, True)
    assert seen[(10, 11, 12, 13)] == (False, False, False, False)
    assert seen[(24, 24, 24, 24)] == (False, True, True, True)
    assert len(seen) == 10


def test_the_observation_is_that_of_the_chunks_first_tick(ring):
    ring.append(0, "demo", True, arrays(5, 10))
    view = view_of(ring)
    view.refresh()
    batch = view.sample(np.random.default_rng(0), 50)
    np.testing.assert_array_equal(batch.state[:, 0], batch.action[:, 0, 0] - 10)
    np.testing.assert_array_equal(batch.images["front"][:, 0, 0, 0], batch.action[:, 0, 0] - 10)
    assert batch.demo.all()


def test_every_chunk_has_its_own_episodes_prompt_and_so_has_every_transition(ring):
    texts = ["put the pen into the cup", "wirf den Stift weg – jetzt", "put the pen into the cup"]
    for ordinal, prompt in enumerate(texts):
        ring.append(ordinal, "demo", True, arrays(5, 10 * ordinal + 10), prompt)
    assert [row.prompt for row in RingReader(ring.path).episodes()] == texts
    transitions = TransitionView(SPEC, 2, 0.9, demo_share=0.5)
    transitions.attach(RingReader(ring.path))
    for view in (view_of(ring), transitions):
        view.refresh()
        batch = view.sample(np.random.default_rng(0), 100)
        assert batch.prompts == [texts[int(first) // 10 - 1] for first in batch.action[:, 0, 0]]
        assert len(set(batch.prompts)) == 2


def test_a_demonstration_that_moves_in_the_ring_keeps_its_prompt(ring):
    ring.append(0, "demo", True, arrays(5, 10), "stay")
    for ordinal in range(1, 12):
        ring.append(ordinal, "online", True, arrays(5, 20), "go")
    view = view_of(ring)
    view.refresh()
    batch = view.sample(np.random.default_rng(0), 200)
    assert {prompt for prompt, demo in zip(batch.prompts, batch.demo, strict=True) if demo} == {"stay"}
    assert {prompt for prompt, demo in zip(batch.prompts, batch.demo, strict=True) if not demo} == {"go"}


def test_more_prompts_than_the_ring_has_room_for_are_refused_by_name(ring):
    ring.append(0, "demo", True, arrays(3, 10), "x" * (1 << 19))
    with pytest.raises(RingError, match="1 different prompts fill the 1048576 bytes"):
        ring.append(1, "demo", True, arrays(3, 10), "y" * (1 << 20))
    ring.append(1, "demo", True, arrays(3, 10), "x" * (1 << 19))
    assert len(RingReader(ring.path).episodes()) == 2


def test_rejected_episodes_and_hidden_ticks_are_never_drawn(ring):
    ring.append(0, "online", False, arrays(5, 10, success=False))
    ring.append(1, "online", True, arrays(6, 20, intervention=[3, 4, 5]))
    view = view_of(ring)
    view.refresh()
    batch = view.sample(np.random.default_rng(0), 200)
    assert set(batch.action[:, 0, 0].astype(int)) == {23, 24, 25}
    assert batch.operator.all()
    assert view.accepted == {"demo": 0, "online": 1}
    assert view.reasons == {"return": 1, "accepted": 1}


def test_still_ticks_of_a_robot_that_takes_targets_are_never_drawn(ring):
    data = arrays(8, 0)
    data["action"] = np.float32([70, 70, 71, 70, 90, 95, 95, 95])[:, None]  # of -100 to 100: it stands far from 0
    ring.append(0, "demo", True, data)
    for targets, drawn in (({}, {70, 71, 90, 95}), ({"x": "a"}, {90, 95})):
        view = view_of(ring, spec=replace(SPEC, targets=targets), noop_threshold=0.02)
        view.refresh()
        batch = view.sample(np.random.default_rng(0), 200)
        assert set(batch.action[:, 0, 0].astype(int)) == drawn


def test_an_online_stage_is_ready_with_so_many_accepted_online_episodes(ring):
    ring.append(0, "demo", True, arrays(3, 10))
    ring.append(1, "online", False, arrays(3, 20, success=False))
    ring.append(2, "online", True, arrays(3, 30))
    view = view_of(ring)
    view.refresh()
    assert not view.ready("online", 2)  # a demonstration and a failure do not count
    assert view.ready("online", 1)
    assert view.ready("train", 2)
    ring.append(3, "online", True, arrays(3, 40))
    view.refresh()
    assert view.ready("online", 2)


def test_evicted_episodes_leave_the_view(ring):
    for ordinal in range(10):  # 6 frames each into 40: the oldest go
        ring.append(ordinal, "demo", True, arrays(5, 10 * ordinal))
    view = view_of(ring)
    view.refresh()
    drawn = set((view.sample(np.random.default_rng(0), 500).action[:, 0, 0] // 10).astype(int))
    assert drawn == set(range(4, 10))


@pytest.mark.parametrize("every", [1, 7, 20])
def test_demonstrations_stay_in_the_views_however_far_the_ring_moves_on(ring, every):
    verdicts = []
    ring.append(0, "demo", True, arrays(5, 500))
    ring.append(1, "demo", False, arrays(5, 600, success=False))
    chunks = ChunkView(accepting(noop_threshold=0.0), SPEC, 4, on_verdict=verdicts.append)
    chunks.attach(RingReader(ring.path))
    values = TransitionView(SPEC, 2, 0.9, demo_share=0.5)
    values.attach(RingReader(ring.path))
    rng = np.random.default_rng(0)
    for ordinal in range(2, 22):
        ring.append(ordinal, "online", True, arrays(5, 10 * ordinal))
        if ordinal % every:
            continue
        chunks.refresh()
        values.refresh()
        demo = chunks.sample(rng, 400)
        assert set(demo.action[demo.demo, 0, 0].astype(int)) == set(range(500, 505))
        both = values.sample(rng, 400)
        assert set(both.action[both.demo, 0, 0].astype(int)) == {*range(500, 505), *range(600, 605)}
        assert values.count("demo") == 10
    assert chunks.accepted["demo"] == 1
    judged = [v.ordinal for v in verdicts]
    assert len(judged) == len(set(judged))  # a move is no new episode


def test_eviction_between_refreshes_is_survived(ring):
    ring.append(0, "demo", True, arrays(5, 0))
    view = view_of(ring)
    view.refresh()
    for ordinal in range(1, 8):
        ring.append(ordinal, "demo", True, arrays(5, 10 * ordinal))
    with pytest.raises(ValueError, match="no accepted tick"):
        view.sample(np.random.default_rng(0), 8)
    view.refresh()
    assert (view.sample(np.random.default_rng(0), 100).action >= 20).all()


def test_a_new_ring_starts_the_view_over(ring, tmp_path):
    ring.append(0, "demo", True, arrays(5, 10))
    view = view_of(ring)
    view.refresh()
    (tmp_path / "b").mkdir()
    fresh = RingWriter(SPEC, 40, tmp_path / "b", shared=tmp_path / "b")
    fresh.append(0, "demo", True, arrays(3, 70))
    view.attach(RingReader(fresh.path))
    assert len(view) == 0
    view.refresh()
    assert set(view.sample(np.random.default_rng(0), 50).action[:, 0, 0].astype(int)) == {70, 71, 72}
    fresh.close()
