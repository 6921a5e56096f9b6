"""The trainer on bad data: it says what is wrong, publishes nothing bad, and goes on where it can.

The real trainer, agent and ring; only the gateway's answers are scripted.
"""

import logging

import pytest
import torch
from trainer_rig import make, put

from serl_launcher.replay.verdicts import read
from serl_launcher.run.parameters import PublishedVersion, read_tensors


def version(tmp_path):
    return PublishedVersion.read(tmp_path / "params").version


def test_sac_trains_through_the_trainer_and_resumes(tmp_path, ring):
    for k in range(3):
        put(ring, 2 * k, "demo")
        put(ring, 2 * k + 1, "online", success=k == 0)
    trainer, gateway = make(tmp_path, ring, "sac_pi0", mode="online", steps=4)
    trainer.run()
    assert trainer.learner.step_count == 4
    assert gateway.reports[-1]["metrics"]["losses/critic"] >= 0
    assert {row["ordinal"]: row["accepted"] for row in read(tmp_path / "acceptance.jsonl")} == {
        0: True, 1: True, 2: True, 3: False, 4: True, 5: False,
    }  # fmt: skip
    want = trainer.learner.tensors()
    again, _ = make(tmp_path, ring, "sac_pi0", mode="online", steps=4)
    assert again.learner.step_count == 4
    assert all(torch.equal(tensor, want[name]) for name, tensor in again.learner.tensors().items())


def test_ticks_of_evaluations_do_not_loosen_the_limiter(tmp_path, ring):
    for k in range(6):
        put(ring, k, "online")
    trainer, gateway = make(tmp_path, ring, mode="online", limit=3)
    gateway.experience = lambda: 0
    trainer.run()
    assert trainer.learner.step_count == 0
    assert gateway.reports[-1]["metrics"]["replay/accepted"] == 6  # the dashboard's figure needs no step


def test_when_everything_is_rejected_it_says_so_and_the_first_version_stays(tmp_path, ring, caplog):
    for k in range(6):
        put(ring, k, "online", success=False)
    trainer, _ = make(tmp_path, ring, mode="online", limit=3)
    with caplog.at_level(logging.WARNING):
        trainer.run()
    assert "all 6 online episodes were rejected (return: 6): nothing to learn from" in caplog.text
    assert (trainer.learner.step_count, version(tmp_path)) == (0, 1)


def test_a_training_stage_without_any_episode_says_what_it_waits_for(tmp_path, ring, caplog):
    trainer, _ = make(tmp_path, ring, mode="train", limit=3)
    with caplog.at_level(logging.WARNING):
        trainer.run()
    assert caplog.text.count("holds no episodes yet: record demonstrations first (run_learner_data_collection.sh)") == 1
    assert trainer.learner.step_count == 0


def test_with_one_class_only_a_critic_has_nothing_to_tell_apart_and_that_is_said(tmp_path, ring, caplog):
    for k in range(3):
        put(ring, k, "online", success=False)
    trainer, _ = make(tmp_path, ring, "sac_pi0", mode="online", steps=1, limit=10)
    with caplog.at_level(logging.WARNING):
        trainer.run()
    assert "every transition has the same reward, 0: a critic cannot tell good from bad" in caplog.text


def test_a_diverging_critic_goes_back_then_holds_and_nothing_of_it_is_published(tmp_path, ring, caplog):
    put(ring, 0, "demo")
    put(ring, 1, "online")
    trainer, gateway = make(tmp_path, ring, "sac_pi0", mode="online", steps=4)
    trainer.run()  # a good start: a checkpoint and a published version
    good, published = {n: t.clone() for n, t in trainer.learner.averaged.items()}, version(tmp_path)

    changes = {"steps": 50, "limit": 60, "algo__agent__q_limit": 1e-9}
    trainer, gateway = make(tmp_path, ring, "sac_pi0", mode="online", **changes)
    with caplog.at_level(logging.WARNING):
        trainer.run()
    assert "the critic diverges: |Q| =" in caplog.text
    assert "training goes on from checkpoint step_000004" in caplog.text
    assert trainer.faults.held.startswith("training holds")
    assert gateway.reports[-1]["metrics"]["trainer/held"] == 1.0
    assert version(tmp_path) == published
    served = read_tensors(tmp_path / "params" / PublishedVersion.read(tmp_path / "params").file)[0]
    assert all(torch.equal(served[name], tensor) for name, tensor in good.items())


def test_a_fallen_evaluation_brings_the_best_version_back(tmp_path, ring, caplog):
    put(ring, 0, "demo")
    trainer, gateway = make(tmp_path, ring, steps=2)
    trainer.publisher.publish()
    best = {n: t.clone() for n, t in trainer.learner.averaged.items()}
    gateway.evaluations = {"a": {"episodes": 10, "successes": 9}}
    trainer.rollback.check({"eval": gateway.evaluations})
    for tensor in trainer.learner.averaged.values():
        tensor.add_(1.0)
    trainer.publisher.publish()
    gateway.evaluations = gateway.evaluations | {"b": {"episodes": 10, "successes": 2}}
    with caplog.at_level(logging.ERROR):
        trainer.rollback.check({"eval": gateway.evaluations})
    assert "evaluation b fell to 0.20" in caplog.text
    assert "version 2 is rolled back to version 1, published again as version 3" in caplog.text
    served = read_tensors(tmp_path / "params" / PublishedVersion.read(tmp_path / "params").file)[0]
    assert all(torch.equal(served[name], tensor) for name, tensor in best.items())


def test_a_rollback_holds_when_the_trainer_starts_anew_whenever_it_was_killed(tmp_path, ring, monkeypatch):
    put(ring, 0, "demo")
    evaluations = {"a": {"episodes": 10, "successes": 9}}
    trainer, _ = make(tmp_path, ring, steps=2)
    trainer.run()
    trainer.rollback.check({"eval": evaluations})
    best = {n: t.clone() for n, t in trainer.learner.averaged.items()}
    trainer, _ = make(tmp_path, ring, steps=4)
    trainer.run()  # further, and worse
    evaluations |= {"b": {"episodes": 10, "successes": 2}}
    with monkeypatch.context() as killed:
        killed.setattr(trainer.checkpoints, "save", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.rollback.check({"eval": evaluations})
    for _ in range(2):
        trainer, _ = make(tmp_path, ring, steps=4)
        trainer.rollback.check({"eval": evaluations})
        assert all(torch.equal(trainer.learner.averaged[name], tensor) for name, tensor in best.items())
    assert version(tmp_path) == trainer.publisher.version == 5  # 1 and 2, 3 of the fallen, rolled back twice


def test_a_published_version_with_parts_of_another_algorithm_is_replaced_before_anything_else(tmp_path, ring):
    put(ring, 0, "demo")
    first, _ = make(tmp_path, ring, "dsrl_pi0", steps=2)
    first.run()
    for _ in range(2):  # once; the next start finds a version that its server can load
        second, gateway = make(tmp_path, ring, steps=2)
        gateway.stage["name"] = "another"
        gateway.limit = 1
        second.run()
        assert version(tmp_path) == first.publisher.version + 1
    names = read_tensors(tmp_path / "params" / PublishedVersion.read(tmp_path / "params").file)[0].keys()
    assert not [name for name in names if name.startswith("steering.")]


def test_a_fall_after_a_change_of_algorithm_brings_the_other_ones_policy_back(tmp_path, ring):
    put(ring, 0, "demo")
    first, _ = make(tmp_path, ring, "dsrl_pi0", steps=2)
    first.run()
    first.rollback.check({"eval": {"a": {"episodes": 10, "successes": 9}}})
    second, _ = make(tmp_path, ring, steps=2)
    for tensor in second.learner.averaged.values():
        tensor.add_(1.0)
    second.rollback.check({"eval": {"b": {"episodes": 10, "successes": 1}}})
    best = first.learner.averaged
    assert all(torch.equal(tensor, best[name]) for name, tensor in second.learner.averaged.items())


def test_another_algorithm_goes_on_in_the_folder_from_the_policy_it_finds(tmp_path, ring, caplog):
    for k in range(3):
        put(ring, 2 * k, "demo")
        put(ring, 2 * k + 1, "online", success=k == 0)
    first, _ = make(tmp_path, ring, steps=3)
    first.run()
    second, gateway = make(tmp_path, ring, "sac_pi0", mode="online", steps=2)
    assert "trained by FlowMatchingAgent: SACAgent goes on from its policy and the run's data" in caplog.text
    gateway.stage["name"] = "further"
    assert (second.learner.step_count, second.publisher.version) == (3, first.publisher.version)
    theirs, ours = first.learner.tensors(), second.learner.tensors()
    policy = [name for name in ours if name.startswith(("raw.", "averaged."))]
    assert len(policy) == 2 * len(second.learner.averaged)
    assert all(torch.equal(ours[name], theirs[name]) for name in policy)
    second.run()
    assert second.learner.step_count == 5
    again, _ = make(tmp_path, ring, "sac_pi0", mode="online", steps=2)
    want = second.learner.tensors()
    assert all(torch.equal(tensor, want[name]) for name, tensor in again.learner.tensors().items())
    back, _ = make(tmp_path, ring, steps=3)
    assert all(torch.equal(t, second.learner.averaged[name]) for name, t in back.learner.averaged.items())
