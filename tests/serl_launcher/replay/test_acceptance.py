"""The acceptance rules, tick by tick."""

from dataclasses import replace

import numpy as np
import pytest
from configured import rule as accepting
from hydra.errors import InstantiationException

from serl_launcher.replay.acceptance import (
    EpisodeColumns,
    before_takeover,
    idle_starts,
)


def episode(n=6, success=True, intervention=(), moves=None, mode="online"):
    reward = np.zeros(n, np.float32)
    reward[-1] = float(success)
    flags = np.zeros(n, bool)
    flags[list(intervention)] = True
    action = np.zeros((n, 2), np.float32)
    action[:, 0] = 0.5 if moves is None else moves
    action[:, 1] = -1  # a gripper that holds its command is no motion
    return EpisodeColumns(mode, success, reward, action, flags)


def ticks(mask):
    return np.flatnonzero(mask).tolist()


def test_an_autonomous_success_is_taken_whole():
    selection = accepting()(episode())
    assert selection.accepted
    assert ticks(selection.labels) == [0, 1, 2, 3, 4, 5]


def test_a_failure_is_rejected_by_its_return():
    selection = accepting()(episode(success=False))
    assert (selection.accepted, selection.reason) == (False, "return")
    assert not selection.starts.any()


def test_a_failure_with_the_rewards_of_its_stages_is_rejected_unless_the_return_alone_is_asked_for():
    """Two of three stages and the time limit, as a process classifier rewards them."""
    staged = replace(episode(success=False), reward=np.float32([0, 1 / 3, 0, 1 / 3, 0, 0]))
    selection = accepting()(staged)
    assert (selection.accepted, selection.reason) == (False, "failed")
    assert accepting(require_success=False)(staged).accepted
    assert accepting(require_success=False, min_return=0.8)(staged).reason == "return"


def test_a_short_episode_is_dropped_even_when_it_succeeded():
    assert accepting(min_ticks=3)(episode(n=2)).reason == "short"


def test_policy_ticks_before_a_takeover_are_hidden():
    selection = accepting()(episode(intervention=[3, 4, 5]))
    assert selection.accepted
    assert ticks(selection.labels) == [3, 4, 5]


def test_only_the_last_ticks_before_a_takeover_are_hidden_when_a_reach_is_set():
    selection = accepting(mask_before_takeover=1)(episode(intervention=[3, 4, 5]))
    assert ticks(selection.labels) == [0, 1, 3, 4, 5]


def test_each_takeover_hides_its_own_stretch_and_what_follows_the_operator_counts():
    flags = np.array([0, 0, 1, 0, 0, 0, 1, 0], bool)
    assert ticks(before_takeover(flags, None)) == [0, 1, 3, 4, 5]
    assert ticks(before_takeover(flags, 2)) == [0, 1, 4, 5]


def test_driving_from_the_first_tick_hides_nothing():
    assert not before_takeover(np.ones(4, bool), None).any()


def test_leading_noops_end_with_the_first_motion():
    action, nobody = np.array([[0.0, 1], [0.01, 1], [0.3, 1], [0.0, 1]], np.float32), np.zeros(4, bool)
    assert ticks(idle_starts(action, nobody, 0.02, [0])) == [0, 1]
    assert ticks(idle_starts(action, nobody, 0.02, None)) == []


def test_the_moment_an_operator_needs_after_taking_over_is_a_noop_and_a_later_pause_is_not():
    action = np.zeros((9, 1), np.float32)
    action[[0, 1, 5, 7]] = 0.5
    flags = np.array([0, 0, 0, 1, 1, 1, 1, 1, 1], bool)
    assert ticks(idle_starts(action, flags, 0.02, None)) == [3, 4]


TARGETS = [0, 1]  # a joint and a gripper that are told where to be


def targets(joint, gripper, intervention=()):
    """Target positions, in shares of their ranges; the joint stands at 0.7, far from the middle of its range."""
    flags = np.zeros(len(joint), bool)
    flags[list(intervention)] = True
    return np.float32(np.stack([0.7 + np.array(joint), np.array(gripper) - 1.0], 1)), flags


def test_a_robot_that_keeps_its_target_stands_still_wherever_it_is():
    action, flags = targets([0, 0.004, -0.004, 0.1, 0.2, 0.2], [0] * 6, range(6))
    assert ticks(idle_starts(action, flags, 0.02, None)) == []  # taken for displacements it never stands still
    assert ticks(idle_starts(action, flags, 0.02, None, TARGETS)) == [0, 1, 2]


def test_a_target_that_creeps_moves_once_it_is_away_and_a_gripper_that_closes_moves():
    action, flags = targets(np.arange(6) * 0.008, [0] * 6, range(6))
    assert ticks(idle_starts(action, flags, 0.02, None, TARGETS)) == [0, 1, 2]
    action, flags = targets([0] * 6, [0, 0, 1.9, 1.9, 1.9, 1.9], range(6))
    assert ticks(idle_starts(action, flags, 0.02, None, TARGETS)) == [0, 1]
    assert ticks(idle_starts(action, flags, 0.02, [0], TARGETS)) == [0, 1, 2, 3, 4, 5]  # the gripper is not counted


def test_after_a_takeover_a_target_stands_still_until_it_leaves_where_it_was_taken_over():
    joint = [0, 0.1, 0.2, 0.35, 0.35, 0.35, 0.5, 0.5]  # taking over begins where the arm is, ahead of the last target
    action, flags = targets(joint, [0] * 8, range(3, 8))
    assert ticks(idle_starts(action, flags, 0.02, None, TARGETS)) == [0, 3, 4, 5]


def test_displacements_and_targets_of_one_task_are_each_told_by_their_own_measure():
    drive = np.float32([[0, 0.7], [0, 0.7], [0.5, 0.7], [0, 0.7]])  # a base's displacement, an arm's target
    assert ticks(idle_starts(drive, np.ones(4, bool), 0.02, None, [1])) == [0, 1]
    arm = np.float32([[0, 0.7], [0, 0.7], [0, 0.7], [0, 0.8]])
    assert ticks(idle_starts(arm, np.ones(4, bool), 0.02, None, [1])) == [0, 1, 2]


def test_an_operator_who_never_moves_hides_no_tick_of_the_policy():
    action = np.full((6, 1), 0.5, np.float32)
    flags = np.array([0, 0, 1, 1, 0, 0], bool)
    action[flags] = 0
    assert ticks(idle_starts(action, flags, 0.02, None)) == [2, 3]


def test_mixed_rate_begins_chunks_seldom_where_the_policy_drove_and_densely_where_a_person_did():
    selection = accepting(autonomous_stride=4, mask_before_takeover=0)(episode(n=10, intervention=[5, 6, 7]))
    assert ticks(selection.starts) == [0, 4, 5, 6, 7, 8]
    assert ticks(selection.labels) == list(range(10))


def test_an_episode_that_never_moves_is_rejected_as_noop():
    selection = accepting(noop_dims=[0])(episode(moves=0.0))
    assert (selection.accepted, selection.reason) == (False, "noop")


def test_the_demonstration_rule_takes_successful_demonstrations_only():
    rule = accepting("demonstration")
    assert rule(episode(mode="demo")).accepted
    assert rule(episode(mode="online")).reason == "online"
    assert rule(episode(mode="demo", success=False)).reason == "failed"


def test_pauses_in_mid_episode_stay_unless_they_are_asked_away():
    paused = episode(n=7, moves=[0.5, 0.5, 0.0, 0.01, 0.5, 0.5, 0.5], mode="demo")
    for name in ("success", "demonstration"):
        assert ticks(accepting(name, noop_dims=[0])(paused).starts) == [0, 1, 2, 3, 4, 5, 6]
        no_start = accepting(name, noop_dims=[0], pauses="no_start")(paused)
        assert (ticks(no_start.starts), ticks(no_start.labels)) == ([0, 1, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6])
        drop = accepting(name, noop_dims=[0], pauses="drop")(paused)
        assert ticks(drop.starts) == ticks(drop.labels) == [0, 1, 4, 5, 6]
    with pytest.raises(
        InstantiationException, match=r"algo\.rule\.pauses: expected one of keep, no_start, drop, got 'off'"
    ):
        accepting(pauses="off")


def test_a_gripper_that_closes_and_a_target_that_moves_are_no_pause():
    closing = episode(n=4, moves=[0.5, 0.0, 0.0, 0.0])
    closing.action[2:, 1] = 1.0
    rule = accepting(noop_dims=[0], pauses="no_start")
    assert ticks(rule(closing).starts) == [0, 2]  # from the tick after the command on it waits
    held = replace(episode(n=4, moves=[0.2, 0.4, 0.4, 0.7]), targets=(0,))
    assert ticks(rule(held).starts) == [1, 3]


def test_a_discounted_return_tells_the_quick_success_from_the_slow_one():
    rule = accepting(discount=0.9, min_return=0.9**5)
    assert rule(episode(n=6)).accepted
    slow = rule(episode(n=7))
    assert (slow.accepted, slow.reason) == (False, "return")
    assert rule.return_of(episode(n=7)) == pytest.approx(0.9**6)
    with pytest.raises(InstantiationException, match=r"algo\.rule\.discount: expected above 0, at most 1, got 0"):
        accepting(discount=0.0)
