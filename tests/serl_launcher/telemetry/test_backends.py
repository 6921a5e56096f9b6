"""Metrics backends that fail or hang: one warning, and training goes on; W&B in its process of its own."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from serl_launcher.run.paths import RunPaths
from serl_launcher.telemetry import metrics, wandb_process
from serl_launcher.telemetry.metrics import MetricsWriter, read_metrics
from serl_launcher.telemetry.wandb_process import WandbProcess

FILE_ONLY = {"telemetry": {"tensorboard": False, "wandb": False}}
WANDB = {"telemetry": {"tensorboard": False, "wandb": True}}


def steps(tmp_path) -> list[int]:
    return [row["step"] for row in read_metrics(tmp_path / "metrics/trainer.jsonl")]


def test_a_tensorboard_that_cannot_be_written_is_switched_off_with_one_warning(tmp_path, caplog):
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics/tensorboard").write_text("a file where the folder should be")
    writer = MetricsWriter(RunPaths(tmp_path), {"telemetry": {"tensorboard": True}})
    for step in range(5):
        writer.write(step, {"losses/flow": 0.5})
    writer.close()
    warnings = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert warnings[0].startswith("telemetry.tensorboard is switched off, training goes on: ")
    assert steps(tmp_path) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("when", ["write", "close"])
def test_a_backend_may_raise_anything(tmp_path, caplog, monkeypatch, when):
    def fail(*_):
        raise RuntimeError("a bug of theirs")

    monkeypatch.setattr(metrics.TensorBoard, when, fail)
    writer = MetricsWriter(RunPaths(tmp_path), {"telemetry": {"tensorboard": True}})
    for step in range(3):
        writer.write(step, {"losses/flow": 0.5})
    writer.close()
    assert steps(tmp_path) == [0, 1, 2]
    assert caplog.text.count("is switched off, training goes on: a bug of theirs") == 1


def test_rows_that_the_disk_refuses_are_whole_once_they_are_written_again(tmp_path, monkeypatch):
    """Nothing is taken, then half a row, then all is well again; the trainer waits and writes the same row."""
    writer, real, answers = MetricsWriter(RunPaths(tmp_path), FILE_ONLY), os.write, []

    def write(fd, data):
        answer = answers.pop(0) if answers else None
        if answer == "full":
            raise OSError(28, "No space left on device")
        return real(fd, data[:20] if answer == "half" else data)

    writer.write(0, {"losses/flow": 0.5})
    monkeypatch.setattr(os, "write", write)
    answers += ["full", "half"]
    for _ in range(2):
        with pytest.raises(OSError, match="No space left on device"):
            writer.write(1, {"losses/flow": 0.5})
    for step in range(1, 5):
        writer.write(step, {"losses/flow": 0.5})
    writer.close()
    assert steps(tmp_path) == [0, 1, 2, 3, 4]
    assert (tmp_path / "metrics/trainer.jsonl").read_text().count("\n") == 5


def test_a_folder_in_the_place_of_the_file_is_moved_aside_and_named(tmp_path, caplog):
    (tmp_path / "metrics/trainer.jsonl").mkdir(parents=True)
    writer = MetricsWriter(RunPaths(tmp_path), FILE_ONLY)
    writer.write(1, {"losses/flow": 0.5})
    writer.close()
    assert steps(tmp_path) == [1]
    assert "metrics/trainer.jsonl is no file: it was moved to trainer.jsonl.damaged-" in caplog.text


@pytest.fixture
def black_hole():
    """A server that accepts and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept: list[socket.socket] = []

        def accept():
            try:
                while True:
                    kept.append(server.accept()[0])
            except OSError:
                return

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.slow
@pytest.mark.parametrize("server", ["nobody listens", "never answers"])
def test_a_w_and_b_that_hangs_never_holds_a_step_up(tmp_path, caplog, monkeypatch, black_hole, server):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", black_hole if server == "never answers" else "http://127.0.0.1:9")
    writer = MetricsWriter(RunPaths(tmp_path), WANDB)
    process = writer._backends["wandb"]._process
    slowest, step = 0.0, 0
    while process.poll() is None:
        began = time.monotonic()
        writer.write(step := step + 1, {"losses/flow": 0.5})
        slowest = max(slowest, time.monotonic() - began)
        time.sleep(0.05)
        assert step < 2000
    writer.write(step := step + 1, {"losses/flow": 0.5})
    writer.close()
    assert slowest < 5.0
    assert steps(tmp_path) == list(range(1, step + 1))
    assert caplog.text.count("telemetry.wandb is switched off, training goes on: W&B could not be reached") == 1


CHILD = """
import sys, signal
sys.modules["wandb"] = type(sys)("wandb")
import wandb

class Run:
    step, resumed, offline = 0, False, True
    def define_metric(self, *words, **more): pass
    def log(self, row, step): {log}
    def finish(self, exit_code): {finish}

class Setup:
    class settings:
        mode, base_url = "online", "http://127.0.0.1:9"

def init(**words):
    {init}
    return Run()

wandb.init, wandb.Settings, wandb.setup = init, lambda **words: None, Setup
from serl_launcher.telemetry import wandb_process
wandb_process.START_S = wandb_process.STUCK_S = wandb_process.FINISH_S = 1
wandb_process.LOOK_S = 0.1
sys.exit(wandb_process.main(int(sys.argv[1]), wandb_process.Path(sys.argv[2])))
"""


@pytest.fixture
def stand_in(monkeypatch):
    """make(init=, log=, finish=): the real process with a `wandb` that does this."""
    real = subprocess.Popen

    def make(**lines: str) -> None:
        code = CHILD
        for name in ("init", "log", "finish"):
            code = code.replace("{" + name + "}", lines.get(name, "pass"))

        def popen(words, **options):
            return real([sys.executable, "-c", code, *words[3:]], **options)

        monkeypatch.setattr(wandb_process.subprocess, "Popen", popen)

    return make


HANG = "import time; time.sleep(600)"


@pytest.mark.parametrize(
    ("where", "line"),
    [("init", HANG), ("init", "raise RuntimeError('no such entity')"), ("log", "raise OSError('gone')")],
)
def test_a_w_and_b_that_ends_is_told_of_once_and_left(tmp_path, caplog, stand_in, where, line):
    stand_in(**{where: line})
    writer = MetricsWriter(RunPaths(tmp_path), WANDB)
    process = writer._backends["wandb"]._process
    writer.write(1, {"losses/flow": 0.5})
    process.wait(60)
    for step in (2, 3):
        writer.write(step, {"losses/flow": 0.5})
    writer.close()
    assert steps(tmp_path) == [1, 2, 3]
    assert caplog.text.count("telemetry.wandb is switched off") == 1


def test_one_that_hangs_at_the_end_is_ended(tmp_path, caplog, stand_in):
    stand_in(finish=HANG)
    writer = MetricsWriter(RunPaths(tmp_path), WANDB)
    writer.write(1, {"losses/flow": 0.5})
    process = writer._backends["wandb"]._process
    writer.close()
    assert process.returncode == -signal.SIGALRM
    assert "W&B could not be reached or does not answer" in caplog.text


def test_the_end_of_training_waits_for_seconds_only(tmp_path, caplog, stand_in, monkeypatch):
    monkeypatch.setattr(wandb_process, "CLOSE_S", 0.2)
    stand_in(finish=HANG)
    link = WandbProcess(tmp_path, {})
    link.close()
    assert "it is not waited for any longer" in caplog.text
    assert link._process.wait(60) == -signal.SIGALRM  # and no process is left behind


def test_one_that_hangs_at_a_row_holds_nothing_up_and_is_ended(tmp_path, caplog, stand_in):
    stand_in(log=HANG)
    writer = MetricsWriter(RunPaths(tmp_path), WANDB)
    process = writer._backends["wandb"]._process
    began = time.monotonic()
    for step in range(2_000):
        writer.write(step, {f"losses/{k}": 0.5 for k in range(20)})
    assert time.monotonic() - began < 5.0
    process.wait(60)
    writer.close()
    assert process.returncode == -signal.SIGALRM
    assert "W&B could not be reached or does not answer" in caplog.text


def test_it_ends_with_a_killed_trainer(tmp_path, stand_in):
    stand_in()
    link = WandbProcess(tmp_path, {})
    link._socket.close()  # what the kernel does
    assert link._process.wait(60) == 0


def test_w_and_b_gets_the_config_without_its_secrets(tmp_path, stand_in):
    stand_in(init=f"open({str(tmp_path / 'config')!r}, 'w').write(str(words['config']))")
    link = WandbProcess(tmp_path, {"serving": {"openpi_token": "s3cret", "threads": 1}})
    link.close()
    assert json.loads((tmp_path / "config").read_text().replace("'", '"')) == {
        "serving": {"openpi_token": "(hidden)", "threads": 1}
    }
