"""Chunk transitions over a real ring, by hand: terminated, truncated and padded ticks, discounts, mixing."""

import numpy as np
import pytest

from serl_launcher.replay.ring import RingReader, RingWriter
from serl_launcher.replay.transitions import TransitionView, index_episode
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


def arrays(n, base, ended="done", reward=None):
    """Tick k has action, state and pixels base + k; the last observation is base + n."""
    last = np.arange(n) == n - 1
    observed = base + np.arange(n + 1)
    return {
        "observation.images.front": np.broadcast_to(observed.astype(np.uint8)[:, None, None, None], (n + 1, 4, 4, 3)),
        "observation.state": observed.astype(np.float32)[:, None],
        "action": observed[:n].astype(np.float32)[:, None],
        "next.reward": np.zeros(n, np.float32) if reward is None else np.asarray(reward, np.float32),
        "next.done": last & (ended == "done"),
        "next.truncated": last & (ended == "truncated"),
        "next.success": np.zeros(n, bool),
        "intervention": np.zeros(n, bool),
        "policy_version": np.zeros(n, np.int64),
        "time_ns": np.zeros(n, np.int64),
    }


@pytest.fixture
def ring(tmp_path):
    writer = RingWriter(SPEC, 40, tmp_path, shared=tmp_path)
    yield writer
    writer.close()


def by_start(view, b=400, seed=0):
    """first tick's action -> (row's values), over many draws."""
    batch = view.sample(np.random.default_rng(seed), b)
    return {int(batch.action[i, 0, 0]): (batch, i) for i in range(b)}


def test_a_terminated_episode_by_hand(ring):
    # 5 ticks, h = 3, γ = 0.5, r = [1, 2, 4, 8, 16]; terminated at tick 4.
    ring.append(0, "online", True, arrays(5, 10, "done", [1, 2, 4, 8, 16]))
    view = TransitionView(SPEC, 3, 0.5, demo_share=0.5)
    view.attach(RingReader(ring.path))
    view.refresh()
    seen = by_start(view)
    assert sorted(seen) == [10, 11, 12, 13, 14]
    #        start: actions         is_pad          Σ γ^i r                γ^k    bootstrap  s'
    want = {
        10: ([10, 11, 12], [0, 0, 0], 1 + 0.5 * 2 + 0.25 * 4, 0.125, True, 13),
        11: ([11, 12, 13], [0, 0, 0], 2 + 0.5 * 4 + 0.25 * 8, 0.125, True, 14),
        12: ([12, 13, 14], [0, 0, 0], 4 + 0.5 * 8 + 0.25 * 16, 0.125, False, 15),
        13: ([13, 14, 14], [0, 0, 1], 8 + 0.5 * 16, 0.25, False, 15),
        14: ([14, 14, 14], [0, 1, 1], 16, 0.5, False, 15),
    }
    for start, (actions, pad, reward, discount, bootstrap, after) in want.items():
        batch, i = seen[start]
        assert batch.action[i, :, 0].tolist() == actions
        assert batch.is_pad[i].astype(int).tolist() == pad
        assert batch.reward[i] == pytest.approx(reward)
        assert batch.discount[i] == pytest.approx(discount)
        assert bool(batch.bootstrap[i]) is bootstrap
        assert batch.next_state[i, 0] == after
        assert batch.next_images["front"][i, 0, 0, 0] == after
        assert batch.images["front"][i, 0, 0, 0] == start == batch.state[i, 0]


def test_a_truncated_episode_bootstraps_from_its_last_observation(ring):
    ring.append(0, "online", False, arrays(3, 20, "truncated", [1, 1, 1]))
    ring.append(1, "online", False, arrays(3, 40, "truncated"))
    view = TransitionView(SPEC, 4, 0.9, demo_share=0.5)
    view.attach(RingReader(ring.path))
    view.refresh()
    batch, i = by_start(view)[21]
    # Two real ticks are left: 1 + 0.9, then 0.9² · Q at observation 23, which no action follows.
    assert batch.reward[i] == pytest.approx(1.9)
    assert batch.discount[i] == pytest.approx(0.81)
    assert bool(batch.bootstrap[i])
    assert batch.next_state[i, 0] == 23
    # The chunk stops at the episode's end, though another episode follows in the ring.
    assert batch.action[i, :, 0].tolist() == [21, 22, 22, 22]
    assert batch.is_pad[i].tolist() == [False, False, True, True]


def test_returns_to_go_by_hand():
    index = index_episode(0, np.array([0.0, 2.0, 0.0, 4.0]), np.array([0, 0, 0, 1], bool), 2, 0.5)
    # 0 + 0.5·(2 + 0.5·(0 + 0.5·4)) = 1.5, 2 + 0.25·4 = 3, 0.5·4 = 2, 4
    assert index["return_to_go"].tolist() == [1.5, 3.0, 2.0, 4.0]


def test_a_cut_episode_bounds_nothing_once_a_reward_was_negative(ring):
    view = TransitionView(SPEC, 2, 0.5, demo_share=0.5)
    view.attach(RingReader(ring.path))

    def bounds():
        view.refresh()
        return {start: float(batch.value_lower_bound[i]) for start, (batch, i) in by_start(view).items()}

    ring.append(0, "online", False, arrays(3, 10, "truncated", [0, 0, 2]))
    assert bounds() == {10: 0.5, 11: 1.0, 12: 2.0}
    # -1 + 0.5·(-1 + 0.5·4) = -0.5, -1 + 0.5·4 = 1, 4: it terminated, so nothing came after.
    ring.append(1, "online", True, arrays(3, 20, "done", [-1, -1, 4]))
    cut = {10: -np.inf, 11: -np.inf, 12: -np.inf}
    assert bounds() == cut | {20: -0.5, 21: 1.0, 22: 4.0}


def test_half_of_a_batch_is_demonstrations_while_there_are_both(ring):
    ring.append(0, "demo", True, arrays(3, 10))
    view = TransitionView(SPEC, 2, 0.9, demo_share=0.5)
    view.attach(RingReader(ring.path))
    view.refresh()
    rng = np.random.default_rng(0)
    assert view.sample(rng, 8).demo.tolist() == [True] * 8
    ring.append(1, "online", False, arrays(20, 50, "truncated"))
    view.refresh()
    batch = view.sample(rng, 8)
    assert batch.demo.sum() == 4
    assert (batch.action[batch.demo] < 20).all()
    assert (batch.action[~batch.demo] >= 50).all()


def test_failures_are_transitions_too_and_evicted_ones_leave(ring):
    for ordinal in range(8):  # 6 frames each into 40
        ring.append(ordinal, "online", False, arrays(5, 10 * ordinal, "truncated"))
    view = TransitionView(SPEC, 2, 0.9, demo_share=0.5)
    view.attach(RingReader(ring.path))
    view.refresh()
    assert {start // 10 for start in by_start(view)} == set(range(2, 8))


def test_an_empty_view_says_so(ring):
    view = TransitionView(SPEC, 2, 0.9, demo_share=0.5)
    view.attach(RingReader(ring.path))
    with pytest.raises(ValueError, match="no transition"):
        view.sample(np.random.default_rng(0), 2)
    with pytest.raises(ValueError, match="gamma"):
        TransitionView(SPEC, 2, 1.5, demo_share=0.5)


def test_what_the_policy_did_up_to_a_take_over_can_end_there(ring):
    """6 ticks, of which the operator drives 2 and 3; h = 4, γ = 0.5, the last tick succeeds with 8."""
    helped = np.array([0, 0, 1, 1, 0, 0], bool)
    ring.append(0, "online", True, arrays(6, 10, "done", [0, 0, 0, 0, 0, 8]) | {"intervention": helped})
    view = TransitionView(SPEC, 4, 0.5, demo_share=0.5, takeover_reward=-1.0)
    view.attach(RingReader(ring.path))
    view.refresh()
    found = by_start(view)
    batch, i = found[10]
    assert batch.is_pad[i].tolist() == [False, False, True, True]
    assert (batch.reward[i], batch.bootstrap[i], batch.next_state[i, 0]) == (-0.5, False, 12)
    assert (batch.return_to_go[i], batch.value_lower_bound[i]) == (-0.5, -0.5)
    batch, i = found[12]  # the operator's stretch and what the policy did after it belong together
    assert (batch.reward[i], batch.bootstrap[i], batch.return_to_go[i]) == (1.0, False, 1.0)
    assert batch.is_pad[i].tolist() == [False] * 4
    whole = TransitionView(SPEC, 4, 0.5, demo_share=0.5)
    whole.attach(RingReader(ring.path))
    whole.refresh()
    batch, i = by_start(whole)[10]
    assert (batch.reward[i], batch.bootstrap[i], batch.return_to_go[i]) == (0, True, 0.25)


def test_a_take_over_reward_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match=r"algo\.view\.takeover_reward: expected null or a finite number, got nan"):
        TransitionView(SPEC, 2, 0.9, 0.5, takeover_reward=float("nan"))
