"""The metrics writer: the file, TensorBoard, resuming at an earlier step."""

import json
import math
import subprocess
import sys

from serl_launcher.run.paths import RunPaths
from serl_launcher.telemetry.metrics import MetricsWriter, read_metrics

TENSORBOARD = {"telemetry": {"tensorboard": True, "wandb": False}}
FILE_ONLY = {"telemetry": {"tensorboard": False, "wandb": False}}


def read_tensorboard(folder) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, round(e.value, 6)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_rows_and_scalars(tmp_path):
    writer = MetricsWriter(RunPaths(tmp_path), TENSORBOARD)
    writer.write(20, {"losses/flow": 0.5, "stage": "sft"})
    writer.write(40, {"losses/flow": math.nan, "time/step_s": 0.1, "stage": "sft"})
    writer.close()
    writer.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics/trainer.jsonl").read_text().splitlines()]
    assert [(row["step"], row["stage"], row["losses/flow"]) for row in rows] == [(20, "sft", 0.5), (40, "sft", None)]
    assert read_tensorboard(tmp_path / "metrics/tensorboard")["time/step_s"] == [(40, 0.1)]


def test_a_resume_replaces_the_steps_it_does_again(tmp_path):
    paths = RunPaths(tmp_path)
    first = MetricsWriter(paths, TENSORBOARD)
    for step in (10, 20, 30):
        first.write(step, {"losses/flow": float(step)})
    first.close()
    second = MetricsWriter(paths, TENSORBOARD)  # from the checkpoint of step 15
    second.write(20, {"losses/flow": 21.0})
    second.close()
    rows = read_metrics(tmp_path / "metrics/trainer.jsonl")
    assert [(row["step"], row["losses/flow"]) for row in rows] == [(10, 10.0), (20, 21.0)]
    assert read_tensorboard(tmp_path / "metrics/tensorboard")["losses/flow"] == [(10, 10.0), (20, 21.0)]


def test_a_kill_keeps_what_was_written(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from serl_launcher.run.paths import RunPaths;"
        "from serl_launcher.telemetry.metrics import MetricsWriter;"
        "w = MetricsWriter(RunPaths(Path(sys.argv[1])), {'telemetry': {'tensorboard': False}});"
        "[w.write(s, {'losses/flow': 1.0}) for s in range(5)]; os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, timeout=60)
    path = tmp_path / "metrics/trainer.jsonl"
    with path.open("a") as file:
        file.write('{"step": 5, "loss')  # torn
    assert [row["step"] for row in read_metrics(path)] == [0, 1, 2, 3, 4]
    writer = MetricsWriter(RunPaths(tmp_path), FILE_ONLY)
    writer.write(5, {"losses/flow": 2.0})
    writer.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 3, 4, 5]
