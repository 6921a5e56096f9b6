"""The trainer on a disk that fills up: it waits, says so, loses nothing and goes on by itself."""

import errno
import json
import logging
import os
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trainer_rig import make, put

from serl_launcher.learner import checkpoint
from serl_launcher.replay.verdicts import Verdict, VerdictLedger, read
from serl_launcher.run.files import append_whole, disk_trouble, write_text
from serl_launcher.run.parameters import PublishedVersion, read_tensors
from serl_launcher.run.paths import RunPaths
from serl_launcher.run.versions import newest_whole
from serl_launcher.telemetry.metrics import MetricsWriter, read_metrics


@pytest.fixture
def disk(tmpfs):
    """A tmpfs of 24 MB."""
    return tmpfs("size=24m")


def fill(disk: Path) -> None:
    """Not a byte is left."""
    with (disk / "ballast").open("wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue


def on_a_disk_that_fills(trainer, gateway, disk: Path, after: int, reports: int = 6) -> list[str | None]:
    """Fill it at the report that tells of so many steps, free it some reports later; what each said it waits for."""
    plain, said, full = gateway.progress, [], []

    def progress(**report):
        said.append(report["waits"])
        if not full and report["step"] >= after:
            fill(disk)
        if full or report["step"] >= after:
            full.append(report)
        if len(full) == reports:
            (disk / "ballast").unlink()
        return plain(**report)

    gateway.progress = progress
    trainer.run()
    assert len(full) >= reports
    return said


@pytest.mark.parametrize("changes", [{"trainer__publish_period": 2}, {"trainer__checkpoint_period": 2}, {}])
def test_it_waits_says_so_and_goes_on_where_it_was(tmp_path, disk, ring, monkeypatch, caplog, changes):
    monkeypatch.setattr("serl_launcher.learner.disk.RETRY_S", 0.01)
    for k in range(3):
        put(ring, k, "demo")
    changes = {"trainer__checkpoint_period": 100, "trainer__publish_period": 100} | changes
    calm, _ = make(tmp_path / "calm", ring, steps=6, **changes)
    calm.run()
    trainer, gateway = make(disk, ring, steps=6, limit=300, **changes)
    monkeypatch.setattr("serl_launcher.learner.trainer.REPORT_S", 0.001)
    with caplog.at_level(logging.WARNING):
        said = on_a_disk_that_fills(trainer, gateway, disk, after=3)
    waiting = [text for text in said if text]
    assert waiting
    assert all(text.startswith("the disk is full: training waits, policy version") for text in waiting)
    assert said[-1] is None
    assert "the disk is full: training waits, policy version" in caplog.text
    assert "the disk takes writes again after" in caplog.text
    steps = [report["step"] for report in gateway.reports]
    assert steps == sorted(steps)
    assert (trainer.learner.step_count, trainer.publisher.version) == (6, calm.publisher.version)
    assert all(torch.equal(t, calm.learner.tensors()[name]) for name, t in trainer.learner.tensors().items())
    assert [row["step"] for row in read_metrics(disk / "metrics/trainer.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert (disk / "metrics/trainer.jsonl").read_text().count("\n") == 6
    newest = PublishedVersion.read(disk / "params")
    assert newest.version == trainer.publisher.version
    read_tensors(disk / "params" / newest.file)
    assert [f.name for f in checkpoint.complete(disk / "checkpoints")] == [
        f.name for f in checkpoint.complete(tmp_path / "calm/checkpoints")
    ]
    assert not [path for path in disk.rglob("*") if path.name.endswith(".part")]


def test_a_stage_does_not_end_before_its_last_version_is_written(disk, ring, monkeypatch):
    monkeypatch.setattr("serl_launcher.learner.disk.RETRY_S", 0.01)
    monkeypatch.setattr("serl_launcher.learner.trainer.REPORT_S", 0.001)
    put(ring, 0, "demo")
    trainer, gateway = make(disk, ring, steps=4, limit=300, trainer__publish_period=100)
    on_a_disk_that_fills(trainer, gateway, disk, after=3)
    for report in gateway.reports:
        assert report["stage_steps"].get("s", 0) < 4 or report["version"] == 2


@pytest.mark.parametrize("refused", ["v000003.safetensors", "v000003.json", "latest.json"])
def test_a_version_that_the_disk_refuses_takes_no_number_and_no_other_version_away(
    tmp_path, ring, monkeypatch, refused
):
    trainer, _ = make(tmp_path, ring, trainer__keep_params=2)
    params, replace = tmp_path / "params", os.replace
    for _ in range(2):
        trainer.publisher.publish()
    before = {path.name: path.read_bytes() for path in params.iterdir()}

    def full(source, target):
        if Path(target).name == refused:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        replace(source, target)

    with monkeypatch.context() as disk:
        disk.setattr(os, "replace", full)
        for _ in range(2):
            with pytest.raises(OSError, match="No space left"):
                trainer.publisher.publish()
    assert trainer.publisher.version == newest_whole(params).version == 2
    assert {path.name: path.read_bytes() for path in params.iterdir()} == before
    trainer.publisher.publish()
    assert trainer.publisher.version == newest_whole(params).version == 3
    assert not (params / "v000001.safetensors").exists()


def test_a_rollback_whose_checkpoint_the_disk_refuses_is_published_once(tmp_path, ring, monkeypatch):
    trainer, _ = make(tmp_path, ring)
    trainer.publisher.publish()
    trainer.rollback.check({"eval": {"a": {"episodes": 10, "successes": 9, "version": 1}}})
    fallen = {"eval": {"b": {"episodes": 10, "successes": 1, "version": 1}}}

    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as disk:
        disk.setattr(trainer.checkpoints, "save", full)
        for _ in range(3):
            with pytest.raises(OSError, match="No space left"):
                trainer.rollback.check(fallen)
    trainer.rollback.check(fallen)
    assert trainer.publisher.version == 2
    assert len(checkpoint.complete(tmp_path / "checkpoints")) == 1


def test_a_stop_on_a_full_disk_says_what_the_next_start_goes_on_from(disk, ring, monkeypatch, caplog):
    monkeypatch.setattr("serl_launcher.learner.disk.RETRY_S", 0.01)
    monkeypatch.setattr("serl_launcher.learner.trainer.REPORT_S", 0.001)
    put(ring, 0, "demo")
    trainer, gateway = make(disk, ring, steps=50, limit=300, trainer__checkpoint_period=2)
    plain, full = gateway.progress, []

    def progress(**report):
        if report["waits"]:
            trainer.stop()
        elif report["step"] >= 4 and not full:
            trainer.disk.still()  # the checkpoint of step 4
            full.append(fill(disk))
        return plain(**report)

    gateway.progress = progress
    with caplog.at_level(logging.ERROR):
        trainer.run()
    assert "without a checkpoint (No space left on device): the next start goes on from step_000004" in caplog.text
    assert [f.name for f in checkpoint.complete(disk / "checkpoints")] == ["step_000002", "step_000004"]
    (disk / "ballast").unlink()
    again, _ = make(disk, ring, steps=50, limit=300, trainer__checkpoint_period=2)
    assert again.learner.step_count == 4


def test_verdicts_that_the_disk_refused_are_written_later_and_once(disk):
    ledger = VerdictLedger(disk / "acceptance.jsonl", "rule")

    def verdict(ordinal):
        return Verdict(ordinal, "demo", 5, 1.0, True, 0, (1, 1), True, "accepted", 4, 5, None)

    ledger.note(verdict(0))
    fill(disk)
    for ordinal in range(1, 200):
        ledger.note(verdict(ordinal))
    with pytest.raises(OSError, match="No space left"):
        ledger.write()
    assert all(row["rule"] == "rule" for row in read(disk / "acceptance.jsonl"))
    (disk / "ballast").unlink()
    ledger.write()
    assert [row["ordinal"] for row in read(disk / "acceptance.jsonl")] == list(range(200))


def test_a_torn_list_of_verdicts_is_mended_once_there_is_room(disk):
    path = disk / "acceptance.jsonl"
    ledger = VerdictLedger(path, "rule")
    for ordinal in range(2):
        ledger.note(Verdict(ordinal, "demo", 5, 1.0, True, 0, (1, 1), True, "accepted", 4, 5, None))
    path.write_bytes(path.read_bytes()[:-9])
    fill(disk)
    ledger = VerdictLedger(path, "rule")
    assert ledger.incomplete
    ledger.note(Verdict(1, "demo", 5, 1.0, True, 0, (1, 1), True, "accepted", 4, 5, None))
    (disk / "ballast").unlink()
    ledger.write()
    assert [row["ordinal"] for row in read(path)] == [0, 1]
    assert not VerdictLedger(path, "rule").incomplete


def test_a_refused_write_leaves_nothing_half_there(disk):
    write_text(disk / "a.json", json.dumps({"old": 1}))
    fd = os.open(disk / "lines", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    append_whole(fd, b"one\n")
    fill(disk)
    with pytest.raises(OSError) as refusal:
        write_text(disk / "a.json", "x" * 100_000)
    assert disk_trouble(refusal.value) == "the disk is full"
    with pytest.raises(OSError):
        append_whole(fd, b"two\n" * 5000)
    os.close(fd)
    assert json.loads((disk / "a.json").read_text()) == {"old": 1}
    assert (disk / "lines").read_bytes() == b"one\n"
    assert not list(disk.glob("*.part"))


def test_what_no_freed_space_mends_is_no_disk_trouble(tmp_path):
    with pytest.raises(OSError) as mistake:
        (tmp_path / "nothing" / "file").write_text("")
    assert disk_trouble(mistake.value) is None


def refuses(writer: MetricsWriter, step: int, metrics: dict[str, float]) -> bool:
    try:
        writer.write(step, metrics)
    except OSError as error:
        return disk_trouble(error) == "the disk is full"
    return False


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
def test_the_metrics_file_and_tensorboard_hold_every_step_once_after_the_disk_was_full(disk):
    writer = MetricsWriter(RunPaths(disk), {"telemetry": {"tensorboard": True}})
    metrics = {f"losses/part_{k}": float(k) for k in range(20)}
    writer.write(1, metrics)
    fill(disk)
    step = next(step for step in range(2, 100) if refuses(writer, step, metrics))
    (disk / "ballast").unlink()
    for later in (step, step + 1):
        writer.write(later, metrics)
    writer.close()
    steps = list(range(1, step + 2))
    assert [row["step"] for row in read_metrics(disk / "metrics/trainer.jsonl")] == steps
    events = EventAccumulator(str(disk / "metrics/tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("losses/part_7")] == steps
