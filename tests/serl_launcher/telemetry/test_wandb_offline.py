"""What W&B gets, read back from the files of real offline runs: rows, episodes, videos, policies, where it all goes."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import save_file

from serl_launcher.learner.step_log import StepLog
from serl_launcher.run.files import sha256_of, write_sealed
from serl_launcher.run.parameters import find_parameters
from serl_launcher.run.paths import RunPaths
from serl_launcher.run.versions import KEPT, PublishedVersion, file_path, write_entry
from serl_launcher.telemetry.metrics import MetricsWriter, read_metrics
from serl_launcher.telemetry.wandb_folder import model_type, write_small_run
from serl_launcher.telemetry.wandb_process import read_env

CONFIG = {
    "policy": {"name": "groot_n1_7"},
    "serving": {"openpi_token": "s3cret"},
    "telemetry": {"tensorboard": False, "wandb": True, "group": "cube", "tags": ["lab", "night"], "entity": "robots"},
}
TRAINER = """
import json, os, signal, sys, torch
from pathlib import Path
from serl_launcher.learner.step_log import StepLog
from serl_launcher.run.parameters import find_parameters
from serl_launcher.run.paths import RunPaths
from serl_launcher.telemetry.metrics import MetricsWriter
first, last, ending = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
writer = MetricsWriter(RunPaths(Path(sys.argv[1])), json.loads(sys.argv[5]))
log = StepLog(writer, 5)
for step in range(first, last + 1):
    if log.add(step, "online", {"losses/flow": torch.tensor(step / 2)}):
        log.read()
        log.write()
process = writer._backends["wandb"]._process
if ending == "kill":
    print(process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
if ending == "end":
    log.close()
process.wait(100) if ending == "end" else None
"""


def train(folder: Path, first: int, last: int, ending: str = "end", **more: Any) -> None:
    """Steps of a trainer that `end`s, is `kill`ed or leaves through the interpreter's exit (`leave`)."""
    env = {key: word for key, word in os.environ.items() if not key.startswith("WANDB_")}
    config = CONFIG | {"telemetry": CONFIG["telemetry"] | more}
    words = [sys.executable, "-c", TRAINER, str(folder), str(first), str(last), ending, json.dumps(config)]
    env |= {"WANDB_MODE": "offline", "WANDB_PROJECT": "from_env", "WANDB_TAGS": "not,these"}
    done = subprocess.run(words, env=env, timeout=150, capture_output=True, text=True, check=False)
    assert done.returncode == (-9 if ending == "kill" else 0), done.stderr


def publish(params: Path, version: int, step: int) -> None:
    params.mkdir(parents=True, exist_ok=True)
    path = file_path(params, version)
    save_file({"w": np.full(4, step, np.float32)}, path, {"version": str(version), "step": str(step)})
    write_entry(params, PublishedVersion(version, step, path.name, path.stat().st_size, sha256_of(path), 1.5))


def run_folder(root: Path) -> RunPaths:
    """A run with two versions of which the first is the best, an episode and a video."""
    paths = RunPaths(root)
    paths.videos.mkdir(parents=True)
    (paths.videos / "e0-success.mp4").write_bytes(b"a video")
    paths.config.write_text(yaml.safe_dump(CONFIG))
    paths.episodes.write_text("".join(json.dumps({"ordinal": k, "episode_id": f"e{k}", "success": True}) + "\n"
                                      for k in range(3)))  # fmt: skip
    publish(paths.params, 1, 6)
    publish(paths.params, 2, 12)
    write_sealed(paths.params / KEPT, {"stage": "eval", "rate": 0.9, "version": 1, "judged": ["eval"]})
    (paths.root / "checkpoints/step_000012").mkdir(parents=True)
    (paths.root / "checkpoints/step_000012/optimizer.pt").write_bytes(b"optimizer state")
    return paths


def records(folder: Path) -> Iterator[Any]:
    """Every record of the newest offline run."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    newest = max((folder / "metrics/wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    store = DataStore()
    store.open_for_scan(str(newest))
    while (raw := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(raw)
        yield record


def history(folder: Path) -> list[dict[str, Any]]:
    rows = [r.history for r in records(folder) if r.WhichOneof("record_type") == "history"]
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row.item} | {"#": row.step.num}
        for row in rows
    ]


def artifacts(folder: Path) -> list[Any]:
    found = [r.artifact for r in records(folder) if r.WhichOneof("record_type") == "artifact"]
    return [artifact for artifact in found if artifact.type.endswith("-model")]


def of_kind(folder: Path, kind: str) -> Any:
    return next(getattr(r, kind) for r in records(folder) if r.WhichOneof("record_type") == kind)


@pytest.mark.slow
def test_an_offline_run_holds_everything_that_w_and_b_is_to_get(tmp_path):
    paths = run_folder(tmp_path / "night1")
    train(paths.root, 1, 12)
    run, rows = of_kind(paths.root, "run"), history(paths.root)
    wandb_id = (paths.metrics / "wandb_run_id").read_text()
    assert (run.run_id, run.display_name, run.entity, run.run_group) == (wandb_id, "night1", "robots", "cube")
    assert (run.project, list(run.tags)) == ("from_env", ["lab", "night"])  # the config before the environment
    assert "s3cret" not in str(list(records(paths.root)))
    steps = [(row["trainer/step"], row["losses/flow"]) for row in rows if "losses/flow" in row]
    assert steps == [(step, step / 2) for step in range(1, 13)]  # each one, though values are read back every fifth
    assert [row["#"] for row in rows] == list(range(len(rows)))
    (table,) = [row for row in rows if "episodes/_type" in row]
    assert (table["episodes/_type"], table["episodes/nrows"]) == ("incremental-table-file", 3)
    assert [row["videos/captions"] for row in rows if "videos/_type" in row] == [["e0-success"]]
    check_policies(paths, wandb_id)
    assert of_kind(paths.root, "exit").exit_code == 0  # finish() came through


def check_policies(paths: RunPaths, wandb_id: str) -> None:
    best, newest = artifacts(paths.root)
    assert {artifact.name for artifact in (best, newest)} == {"from_env-groot_n1_7"}
    assert {artifact.type for artifact in (best, newest)} == {"gr00t-model"}
    assert set(best.aliases) >= {"best", "step-6", f"run-{wandb_id}"}
    assert set(newest.aliases) == {"latest", "step-12", f"run-{wandb_id}"}
    files = {entry.path: entry for entry in newest.manifest.contents}
    assert sorted(files) == ["config.yaml", "flowserl_origin.json", "params/latest.json", "params/v000002.json",
                             "params/v000002.safetensors"]  # fmt: skip
    assert all(entry.skip_cache for entry in files.values())
    assert "s3cret" not in Path(files["config.yaml"].local_path).read_text()
    weights = files["params/v000002.safetensors"].local_path
    assert sha256_of(Path(weights)) == sha256_of(file_path(paths.params, 2))
    assert Path(weights).is_relative_to(paths.metrics)  # nothing of it lies in the home


@pytest.mark.slow
@pytest.mark.parametrize(("ending", "exit_code"), [("kill", 1), ("leave", 0)])
def test_a_resumed_run_goes_on_where_w_and_b_is(tmp_path, ending, exit_code):
    paths = run_folder(tmp_path / "night1")
    train(paths.root, 1, 12, ending)
    wait_for_finish(paths)
    first, row = (paths.metrics / "wandb_run_id").read_text(), history(paths.root)[-1]["#"]
    assert of_kind(paths.root, "exit").exit_code == exit_code
    publish(paths.params, 3, 20)
    train(paths.root, 11, 20)  # from the checkpoint of step 10
    rows = history(paths.root)
    assert of_kind(paths.root, "run").run_id == first
    numbers = [row["#"] for row in rows]
    assert numbers == sorted(set(numbers))
    assert numbers[0] > row
    written = 10 if ending == "kill" else 12  # the rows of 11 and 12 were still on the device
    assert [row["trainer/step"] for row in rows if "losses/flow" in row] == list(range(written + 1, 21))
    assert not [row for row in rows if "videos/_type" in row]  # W&B has it
    assert ["step-20" in a.aliases for a in artifacts(paths.root)] == [True]


def wait_for_finish(paths: RunPaths) -> None:
    """The process of a trainer that was killed ends by itself."""
    for _ in range(600):
        try:
            of_kind(paths.root, "exit")
            return
        except (StopIteration, ValueError, AssertionError):
            time.sleep(0.1)
    raise AssertionError("W&B's process has not finished")


def test_the_env_file_gives_w_and_b_what_the_environment_lacks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("# mine\nexport WANDB_API_KEY='abc'\nWANDB_PROJECT=theirs\nWANDB_TAGS=\nHF=x\n")
    environment = {"WANDB_PROJECT": "ours"}
    read_env(environment)
    assert environment == {"WANDB_PROJECT": "ours", "WANDB_API_KEY": "abc"}


def test_git_keeps_the_env_file_out(repo_root):
    asked = [subprocess.run(["git", "check-ignore", "-q", name], cwd=repo_root, check=False).returncode
             for name in (".env", ".env.example")]  # fmt: skip
    assert asked == [0, 1]


@pytest.mark.parametrize(
    ("policy", "kind"), [("pi0", "pi0-model"), ("pi05_tiny", "pi0-model"), ("groot_n1_5", "gr00t-model")]
)
def test_the_type_of_an_artifact_is_the_family_of_its_policy(policy, kind):
    assert model_type(policy) == kind


def test_what_inference_needs_of_a_version_is_a_run_folder_of_its_own(tmp_path):
    paths = run_folder(tmp_path / "night1")
    place = tmp_path / "downloaded"
    place.mkdir()
    write_small_run(paths, paths.params, PublishedVersion.read(paths.params), place)
    assert (
        find_parameters(place).name == "v000002.safetensors"
    )  # checksums and all: checkpoint_path=, export_checkpoint
    assert yaml.safe_load((place / "config.yaml").read_text()) == CONFIG | {"serving": {"openpi_token": "(hidden)"}}


def test_every_step_has_its_row_and_none_is_doubled_when_the_disk_refuses(tmp_path, monkeypatch):
    writer = MetricsWriter(RunPaths(tmp_path), {"telemetry": {"tensorboard": False}})
    log, real, refusals = StepLog(writer, 4), os.write, [0, 0, 1, 0]

    def write(fd, data):
        if refusals and refusals.pop(0):
            raise OSError(28, "No space left on device")
        return real(fd, data)

    for step in range(1, 4):
        assert not log.add(step, "sft", {"losses/flow": 0.5, **({"losses/q": 2.0} if step == 2 else {})})
    monkeypatch.setattr(os, "write", write)
    assert log.add(4, "sft", {"losses/flow": torch.tensor(0.25)})
    assert [row.step for row in log.read()] == [1, 2, 3, 4]
    assert log.shown == {"losses/flow": 0.25, "losses/q": 2.0}
    with pytest.raises(OSError, match="No space left"):
        log.write()
    log.write()
    log.add(5, "sft", {"losses/flow": 0.125})
    log.close()
    written = read_metrics(tmp_path / "metrics/trainer.jsonl")
    rows = [(row["step"], row["losses/flow"], row.get("losses/q")) for row in written]
    assert rows == [(1, 0.5, None), (2, 0.5, 2.0), (3, 0.5, None), (4, 0.25, 2.0), (5, 0.125, None)]
    assert (tmp_path / "metrics/trainer.jsonl").read_text().count("\n") == 5
