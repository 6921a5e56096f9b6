"""Versions and checkpoints are written while training goes on, and are what they would be if it had waited."""

import errno
import logging
import os
import threading

import pytest
import torch
from trainer_rig import make, put

from serl_launcher.learner import copies, disk, publisher
from serl_launcher.learner.copies import Copies
from serl_launcher.learner.disk import DiskWait, Write
from serl_launcher.learner.stage import TrainingStage
from serl_launcher.run import checkpoints, parameters
from serl_launcher.run.parameters import StoredTensors
from serl_launcher.run.versions import file_path

STAGE = TrainingStage("s", "train", 100)


@pytest.fixture
def trainer(tmp_path, ring):
    for k in range(3):
        put(ring, k, "demo")
    trainer, _ = make(tmp_path, ring, trainer__publish_period=2, trainer__checkpoint_period=2, trainer__log_period=100)
    trainer.data.refresh(str(ring.path))
    trainer.learner.begin_stage("train")
    yield trainer
    trainer.disk.close()


@pytest.fixture
def gate(monkeypatch):
    """gate.set() lets versions be written."""
    opened, plain = threading.Event(), parameters.publish

    def held(*words, **more):
        assert opened.wait(20)
        return plain(*words, **more)

    monkeypatch.setattr(publisher, "publish", held)
    yield opened
    opened.set()


def counted(trainer):
    return trainer.disk.counted(trainer.stages.steps, {}).get("s", 0)


def test_steps_go_on_while_a_version_is_written_and_count_once_it_is(tmp_path, trainer, gate):
    for _ in range(3):
        trainer.take_step(STAGE, 0)
    assert (trainer.learner.step_count, trainer.publisher.version, trainer.publisher.begun) == (3, 0, 1)
    assert counted(trainer) == 1  # the version of step 2 is not written
    gate.set()
    trainer.disk.finish()
    assert (counted(trainer), trainer.publisher.version) == (3, 1)
    state = checkpoints.read_state(tmp_path / "checkpoints/step_000002")
    assert (state["counters"]["step"], state["stage_steps"], state["version"]) == (2, {"s": 2}, 1)


def test_what_is_written_is_the_state_of_its_step(tmp_path, trainer, gate):
    trainer.take_step(STAGE, 0)
    trainer.take_step(STAGE, 0)
    then = {name: x.clone() for name, x in trainer.learner.tensors().items()}
    optimizer = trainer.learner.optimizer_state()["policy"]["state"][0]["exp_avg"].clone()
    trainer.take_step(STAGE, 0)
    gate.set()
    trainer.disk.finish()
    folder = tmp_path / "checkpoints/step_000002"
    kept = StoredTensors(folder / "tensors.safetensors")
    assert all(torch.equal(kept[name], x) for name, x in then.items())
    assert any(not torch.equal(kept[name], x) for name, x in trainer.learner.tensors().items())
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    assert torch.equal(state["policy"]["state"][0]["exp_avg"], optimizer)
    version = StoredTensors(file_path(tmp_path / "params", 1))
    assert version.metadata["step"] == "2"
    assert all(torch.equal(version[name], then[f"averaged.{name}"]) for name in version)


def test_the_next_one_of_a_kind_waits_for_the_one_before(trainer, gate):
    for _ in range(3):
        trainer.take_step(STAGE, 0)
    threading.Timer(0.2, gate.set).start()
    trainer.take_step(STAGE, 0)
    assert trainer.publisher.version >= 1
    assert trainer.disk.stall_s > 0.1
    trainer.disk.finish()
    assert (trainer.publisher.version, counted(trainer)) == (2, 4)


def test_after_a_refusal_no_step_is_taken_and_the_version_is_that_of_its_step(tmp_path, trainer, monkeypatch):
    monkeypatch.setattr(disk, "RETRY_S", 0.0)
    full, plain = threading.Event(), parameters.publish
    full.set()

    def refused(*words, **more):
        if full.is_set():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(*words, **more)

    monkeypatch.setattr(publisher, "publish", refused)
    for _ in range(2):
        trainer.take_step(STAGE, 0)
    trainer.disk.still()
    for _ in range(3):
        assert trainer._bear(lambda: trainer.train(STAGE, 0)) is None
        assert (trainer.learner.step_count, counted(trainer)) == (2, 1)
        assert trainer.disk.waits.startswith("the disk is full: training waits")
    full.clear()
    trainer.disk.catch_up()
    assert StoredTensors(file_path(tmp_path / "params", 1)).metadata["step"] == "2"
    assert (trainer.publisher.version, counted(trainer)) == (1, 2)


def test_a_fault_waits_for_the_checkpoint_that_is_being_written(trainer, gate, caplog):
    for _ in range(2):
        trainer.take_step(STAGE, 0)
    threading.Timer(0.1, gate.set).start()
    parameter = next(iter(trainer.learner.agent.trainable_state().values()))
    with torch.no_grad():
        parameter.fill_(float("nan"))
    for _ in range(10):  # after five in a row: back
        trainer.take_step(STAGE, 0)
    assert "training goes on from checkpoint step_000002" in caplog.text
    assert parameter.isfinite().all()


def test_without_memory_for_a_copy_training_waits_and_says_so(tmp_path, trainer, monkeypatch, caplog):
    monkeypatch.setattr(copies, "SHARE_OF_FREE", 0.0)
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            trainer.take_step(STAGE, 0)
    assert (trainer.publisher.version, counted(trainer)) == (2, 4)
    assert [f.name for f in checkpoints.complete(tmp_path / "checkpoints")] == ["step_000002", "step_000004"]
    told = [record.message for record in caplog.records if "while training waits" in record.message]
    assert len(told) == 1
    assert told[0].startswith("a version is written while training waits: there is no memory for a copy of")


def test_copies_take_the_same_memory_again():
    kept = Copies()
    first = kept.of({"a": [torch.zeros(3), 7], "b": torch.ones(2, dtype=torch.bfloat16)})
    place = first["a"][0].data_ptr()
    second = kept.of({"a": [torch.full((3,), 2.0), 8], "b": torch.ones(2, dtype=torch.bfloat16)})
    assert second["a"][0].data_ptr() == place
    assert second["a"][0].tolist() == [2, 2, 2]
    assert second["a"][1] == 8


def test_a_mistake_in_the_thread_is_raised_and_not_tried_again():
    writes = DiskWait(lambda: "")

    def mistaken():
        raise KeyError("mistake")

    writes.begin([Write("version", lambda: mistaken, mistaken)])
    writes.still()
    with pytest.raises(KeyError, match="mistake"):
        writes.catch_up()
    writes.close()
