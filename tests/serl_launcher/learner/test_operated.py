"""What people say of episodes reaches the critics' samples in a running trainer, and a restarted one the same."""

import numpy as np
import pytest
from trainer_rig import make, put

from serl_launcher.learner.guard import EvaluationWatch
from serl_launcher.run.acts import ActsLedger


def rewards(trainer) -> list[float]:
    """Return of each episode that the critics sample, in the order of the ring."""
    index = trainer.data._view.transitions._index["online"]
    return [float(index["reward"][index["last"] == last][-1]) for last in np.unique(index["last"])]


def said(trainer, ring) -> list[float]:
    trainer.operated.look()
    assert trainer.data.refresh(str(ring.path))
    return rewards(trainer)


def test_words_reach_what_sac_samples_at_once_and_after_a_restart(tmp_path, ring) -> None:
    for ordinal in range(3):
        put(ring, ordinal, "online", success=ordinal != 2)
    trainer, _ = make(tmp_path, ring, "sac_pi0", mode="online")
    assert said(trainer, ring) == [1.0, 1.0, 0.0]
    ledger = ActsLedger(tmp_path)
    ledger.append({"act": "verdict", "episode_id": "e0", "word": "failure"}, by="bo")
    ledger.append({"act": "verdict", "episode_id": "e2", "word": "success"}, by="bo")
    assert said(trainer, ring) == [0.0, 1.0, 1.0]
    assert trainer.data._view.imitation.accepted["online"] == 2
    ledger.append({"act": "verdict", "episode_id": "e1", "word": "discard"}, by="bo")
    assert said(trainer, ring) == [0.0, 1.0]
    assert said(make(tmp_path, ring, "sac_pi0", mode="online")[0], ring) == [0.0, 1.0]
    ledger.append(*({"act": "verdict", "episode_id": f"e{k}", "word": "clear"} for k in range(3)), by="bo")
    assert said(trainer, ring) == [1.0, 1.0, 0.0]


def test_a_setting_is_taken_by_the_running_trainer_and_by_the_next(tmp_path, ring) -> None:
    put(ring, 0)
    trainer, _ = make(tmp_path, ring, trainer__publish_period=100)
    ledger = ActsLedger(tmp_path)
    ledger.append({"act": "set", "key": "trainer.publish_period", "value": 7, "was": 100}, by="bo")
    ledger.append({"act": "set", "key": "trainer.rollback_margin", "value": None, "was": 0.2}, by="bo")
    trainer.operated.look()
    assert trainer.operated.settings.publish_period == 7
    assert make(tmp_path, ring, trainer__publish_period=100)[0].operated.settings.publish_period == 7
    assert make(tmp_path, ring, trainer__publish_period=50)[0].operated.settings.publish_period == 50  # typed since


@pytest.mark.parametrize("margin", [0.2, None])
def test_an_evaluation_of_a_pinned_version_is_not_judged(tmp_path, margin) -> None:
    watch = EvaluationWatch(tmp_path, {"a": 10}, margin)
    watch.pass_over({"a": {"episodes": 10, "successes": 0, "version": 3}})
    assert watch.best.judged == ([] if margin is None else ["a"])
