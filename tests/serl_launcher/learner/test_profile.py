"""A profile says where a step's time went; a deterministic run; metrics of a card that is not there."""

import json
import logging

import pytest
import torch
from trainer_rig import make, put

from serl_launcher.learner.profile import be_deterministic, device_metrics, table

PARTS = (
    "sample",
    "forward",
    "backward",
    "gradients",
    "optimizer",
    "average",
    "read metrics",
    "publish and save",
    "log",
)


def test_a_profile_has_a_trace_and_a_table_of_each_part_of_the_steps_asked_for(tmp_path, ring, caplog):
    put(ring, 0, "demo")
    changes = {"trainer__profile": True, "trainer__profile_after": 1, "trainer__profile_steps": 2}
    trainer, _ = make(tmp_path, ring, steps=5, **changes)
    with caplog.at_level(logging.INFO):
        trainer.run()
    events = json.loads((tmp_path / "profile/trace_rank0.json").read_text())["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert {name: names.count(f"step/{name}") for name in ("sample", "forward", "publish and save")} == {
        "sample": 2, "forward": 2, "publish and save": 1}  # fmt: skip
    text = (tmp_path / "profile/table_rank0.txt").read_text()
    rows = {line[:16].strip(): float(line[16:].split()[0]) for line in text.partition("\n\n")[0].splitlines()}
    assert set(rows) == {"a step", *PARTS, "outside these"}
    assert sum(ms for name, ms in rows.items() if name != "a step") == pytest.approx(rows["a step"], abs=0.1)
    assert "where the time of 2 steps went" in caplog.text


def test_nothing_is_looked_at_where_no_profile_is_asked_for(tmp_path, ring):
    put(ring, 0, "demo")
    trainer, _ = make(tmp_path, ring, steps=2, trainer__profile_after=0)
    trainer.run()
    assert not (tmp_path / "profile").exists()


def test_the_table_by_hand():
    assert table({"forward": 0.5, "backward": 0.25}, 1.0, 10).splitlines() == [
        "a step              100.00 ms  100.0%",
        "forward              50.00 ms   50.0%",
        "backward             25.00 ms   25.0%",
        "outside these        25.00 ms   25.0%",
    ]


def test_a_deterministic_run_refuses_what_cannot_be_repeated(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    try:
        be_deterministic()
        with pytest.raises(RuntimeError, match="deterministic"):
            torch.zeros(4).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]), accumulate=False)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True


def test_a_card_says_what_it_holds_and_a_cpu_nothing(monkeypatch):
    assert device_metrics(torch.device("cpu")) == {}
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 2e9)
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 87)
    told = {"device/allocated_gb": 2.0, "device/reserved_gb": 2.0, "device/peak_gb": 2.0, "device/utilisation": 0.87}
    assert device_metrics(torch.device("cuda")) == told

    def no_library(device):
        raise ModuleNotFoundError("pynvml")

    monkeypatch.setattr(torch.cuda, "utilization", no_library)
    told.pop("device/utilisation")
    assert device_metrics(torch.device("cuda")) == told
