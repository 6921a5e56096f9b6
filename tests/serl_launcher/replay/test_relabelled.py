"""A person's later word on an episode: what it changes of the episode, and how it is kept."""

import numpy as np
import pytest
from replay_samples import batches, info

from serl_launcher.replay.relabelled import Relabelled
from serl_transport.contract.schema import Episode


def episode(success, rewards=None):
    """Seven ticks; a failure is a time limit."""
    found = Episode.from_batches(batches(info("e1"), (4, 3), success=success))
    if rewards is not None:
        found.arrays["next.reward"][:] = rewards
    return found


def corrected(tmp_path, recorded, success):
    labels = Relabelled(tmp_path)
    labels.add({"e1": success}, "ana", "2026-01-01T12:00:00+00:00")
    return labels.correct(recorded)


def last(found):
    return tuple(float(found.arrays[f"next.{key}"][-1]) for key in ("reward", "success", "done", "truncated"))


def test_a_failure_that_was_a_success_ends_in_reward_and_termination(tmp_path):
    recorded = episode(False)
    found = corrected(tmp_path, recorded, True)
    assert (found.outcome.success, found.outcome.success_source, found.outcome.truncated_by) == (True, "human", None)
    assert last(found) == (1, 1, 1, 0)
    assert last(recorded) == (0, 0, 0, 1)  # what was recorded is not touched


def test_a_success_that_was_none_is_a_failure_state_without_reward(tmp_path):
    found = corrected(tmp_path, episode(True), False)
    assert (found.outcome.success, found.outcome.success_source, found.outcome.truncated_by) == (False, "human", None)
    assert last(found) == (0, 0, 1, 0)


def test_stages_that_were_paid_already_are_not_paid_twice(tmp_path):
    found = corrected(tmp_path, episode(False, np.float32([0, 1 / 3, 0, 0, 1 / 3, 0, 0])), True)
    assert found.arrays["next.reward"].sum() == pytest.approx(1)


def test_a_confirmed_outcome_only_changes_who_said_so(tmp_path):
    recorded = episode(False)
    found = corrected(tmp_path, recorded, False)
    assert (found.outcome.success_source, found.outcome.truncated_by) == ("human", "time_limit")
    assert found.arrays is recorded.arrays


def test_labels_last_and_the_later_word_counts(tmp_path):
    labels = Relabelled(tmp_path)
    assert labels.labels == {}
    labels.add({"e1": True, "e2": False}, "ana", "2026-01-01T12:00:00+00:00")
    labels.save()
    again = Relabelled(tmp_path)
    again.add({"e1": False}, "ben", "2026-01-02T12:00:00+00:00")
    again.save()
    kept = Relabelled(tmp_path).labels
    assert {name: (label.success, label.by) for name, label in kept.items()} == {
        "e1": (False, "ben"),
        "e2": (False, "ana"),
    }
    assert {path.name for path in tmp_path.iterdir()} == {"acts.jsonl", "acts.mark"}


@pytest.mark.parametrize("text", ['{"e1": true}', "[]", "{", '{"e1": {"success": "yes", "by": "a", "time": "b"}}'])
def test_a_file_that_is_something_else_is_refused_with_what_to_do(tmp_path, text):
    (tmp_path / "relabelled.json").write_text(text)
    with pytest.raises(ValueError, match=r"relabelled.json: expected .* Mend it, or remove it"):
        Relabelled(tmp_path)
