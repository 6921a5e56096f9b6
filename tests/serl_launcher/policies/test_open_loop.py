"""The figures of the open-loop evaluation, derived by hand on a two-joint episode."""

import numpy as np

from serl_launcher.policies.open_loop import errors_by_tick_of_chunk, figures, hold_still, run_episode

NAMES = ("dx", "grip")
RECORDED = np.array([[1, -1], [2, -1], [3, 1], [4, 1], [5, 1]], np.float32)
STATES = np.zeros((5, 3), np.float32)


def evaluated(predict, stride=2):
    still = hold_still(NAMES, ("x", "y", "z"), [0], {})
    return run_episode(7, RECORDED, STATES, predict, still, stride)


def test_chunks_are_laid_end_to_end_and_the_last_one_is_cut():
    asked = []

    def predict(tick):
        asked.append(tick)
        return np.full((4, 2), tick, np.float32)

    episode = evaluated(predict)
    assert asked == [0, 2, 4]
    assert episode.predicted["policy"][:, 0].tolist() == [0, 0, 2, 2, 4]
    # Repeat the action before the chunk; before the first there was none.
    assert episode.predicted["repeat_last"][:, 0].tolist() == [0, 0, 2, 2, 4]
    # Hold still: rates are zero, the absolute grip keeps its value.
    assert episode.predicted["hold_still"].tolist() == [[0, 0], [0, 0], [0, -1], [0, -1], [0, 1]]


def test_figures_of_a_perfect_and_of_a_shifted_policy():
    scale = np.array([2.0, 1.0])
    perfect = figures([evaluated(lambda tick: RECORDED[tick:])], NAMES, scale)
    assert perfect["policy"]["mse_physical"] == 0
    assert perfect["better_than_best_baseline"]
    shifted = figures([evaluated(lambda tick: RECORDED[tick:] + np.array([1, 0]))], NAMES, scale)["policy"]
    assert shifted["mse_physical"] == 0.5  # (1² + 0²) / 2
    assert shifted["mse_normalised"] == 0.125  # (0.5² + 0²) / 2
    assert shifted["max_error_normalised"] == 0.5
    assert shifted["joints"]["dx"] == {"mse_normalised": 0.25, "mse_physical": 1.0, "max_error_physical": 1.0}
    # dx is a ramp, grip jumps once by 2: |second differences| of grip are 2, 2, 0 over three ticks and two joints.
    np.testing.assert_allclose(shifted["smoothness"], (2 + 2) / 6)


def test_targets_hold_still_at_the_state():
    still = hold_still(("z", "x"), ("x", "y", "z"), None, {})
    assert still(np.array([1, 2, 3], np.float32), np.zeros(2, np.float32)).tolist() == [3, 1]


def test_what_the_task_says_of_its_targets_counts_beside_displacements():
    still = hold_still(("dx", "gripper", "grip"), ("x", "opening"), [0, 1], {1: 1})
    assert still(np.float32([1, 40]), np.float32([5, 6, 7])).tolist() == [0, 40, 7]


def test_the_error_over_a_chunk_grows_where_the_policy_drifts():
    drift = np.array([[0, 0], [1, 0]], np.float32)

    def predict(tick):
        part = RECORDED[tick : tick + 2]
        return part + drift[: len(part)]

    by_tick = errors_by_tick_of_chunk([evaluated(predict)], np.ones(2), 2)
    assert by_tick["policy"].tolist() == [0.0, 0.5]
