"""Each run script, run for real up to its resolved config (--dry-run): side, task, mode, schedule, user overrides."""

import itertools
import os
import subprocess
from pathlib import Path

import pytest
from omegaconf import OmegaConf

# script -> (side, key, value) that makes it what its name says
SCRIPTS = {
    "run_actor": ("actor", "rollout.mode", "follow"),
    "run_learner": ("learner", "algo.name", "reject_sampling_pi0"),
    "run_actor_data_collection": ("actor", "rollout.mode", "demo"),
    "run_learner_data_collection": ("learner", "schedule.stages.0.mode", "demo"),
    "run_actor_reject_sampling": ("actor", "rollout.mode", "online"),
    "run_learner_reject_sampling": ("learner", "schedule.stages.0.mode", "online"),
    "run_learner_sft": ("learner", "algo.name", "sft_pi0"),
    "run_actor_eval": ("actor", "rollout.mode", "eval"),
}
TASKS = ("pick", "pick_gym_hil", "metaworld")


def dry_run(script: Path, *words: str, folder: Path) -> tuple[str, OmegaConf]:
    """(side, resolved config) of a script."""
    done = subprocess.run(
        ["bash", str(script), *words, "--dry-run"], capture_output=True, text=True, cwd=folder, timeout=120
    )
    assert done.returncode == 0, done.stderr
    side, _, text = done.stdout.partition("\n")
    return side.removeprefix("# "), OmegaConf.create(text)


@pytest.mark.parametrize(("script", "task"), zip(SCRIPTS, itertools.cycle(TASKS), strict=False))
def test_script_composes(repo_root, tmp_path, task, script):
    side, key, value = SCRIPTS[script]
    path = repo_root / "examples" / "experiments" / task / f"{script}.sh"
    got, config = dry_run(path, "seed=9", "unique_identifier=left-arm", folder=tmp_path)
    assert (got, config.task.name, config.run, config.seed) == (side, task, task, 9)
    assert config.unique_identifier == "left-arm"
    assert OmegaConf.select(config, key) == value


def test_every_task_has_every_script_and_all_of_them_say_the_same(repo_root):
    for task in TASKS:
        scripts = {path.stem: path for path in (repo_root / "examples" / "experiments" / task).glob("*.sh")}
        assert scripts.keys() == set(SCRIPTS)
        assert {path.read_text() for path in scripts.values()} == {
            '#!/usr/bin/env bash\nsource "$(dirname "$0")/../stage.sh"\n'
        }
        assert all(os.access(path, os.X_OK) for path in scripts.values())


def test_a_script_of_another_name_is_refused(repo_root, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run_nothing.sh").write_text(f'source "{repo_root}/examples/experiments/stage.sh"\n')
    command = ["bash", str(tmp_path / "mine" / "run_nothing.sh")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout) == (2, "")
    assert "run_nothing.sh: no such stage" in done.stderr


@pytest.mark.parametrize("side", ["actor", "learner"])
def test_the_scripts_at_the_root_run_the_default_task(repo_root, tmp_path, side):
    got, config = dry_run(repo_root / f"run_{side}.sh", "run=mine", folder=tmp_path)
    assert (got, config.task.name, config.run) == (side, "pick", "mine")


@pytest.mark.parametrize("side", ["actor", "learner"])
def test_a_task_without_scripts_is_told_which_there_are(repo_root, side):
    script = repo_root / f"run_{side}.sh"
    done = subprocess.run(
        ["bash", str(script)],
        capture_output=True,
        text=True,
        timeout=20,
        env={**os.environ, "TASK": "metaworld_box_close"},
    )
    assert done.returncode == 2
    assert (
        f"run_{side}: TASK=metaworld_box_close has no scripts; expected one of: metaworld pick pick_gym_hil"
        in done.stderr
    )
    assert f"bash run_{side}.sh task=<name> run=<name>" in done.stderr


def test_a_misspelt_override_ends_the_script_with_2(repo_root):
    script = repo_root / "run_learner.sh"
    done = subprocess.run(["bash", str(script), "sed=1"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "did you mean 'seed'" in done.stderr
    assert "Traceback" not in done.stderr
