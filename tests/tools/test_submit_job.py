"""tools/submit_job.py: what it prints is what a queue would get; mistakes are named; a time limit is survived."""

import json
import os
import subprocess
import sys

import pytest


def submit(repo_root, *words, timeout=60):
    command = [sys.executable, str(repo_root / "tools" / "submit_job.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=repo_root)


def test_a_sweep_is_an_array_of_jobs_and_a_dry_run_submits_nothing(repo_root):
    words = ["submit=slurm", "submit.dry_run=true", "submit.partition=gpu", "submit.actors=4", "submit.minutes=90"]
    done = submit(repo_root, *words, "seed=0,1", "algo=sac_pi0,reject_sampling_pi0", "run=night")
    assert done.returncode == 0, done.stderr
    jobs = [line for line in done.stdout.splitlines() if line.startswith("# job")]
    assert jobs[1] == "# job 1: bash run_learner.sh seed=0 algo=reject_sampling_pi0 run=night-1   + 4 actors"
    assert len(jobs) == 4
    for option in ("array=0-3%4", "partition=gpu", "time=90", "signal=USR2@240", "ntasks-per-node=1"):
        assert f"#SBATCH --{option}" in done.stdout


def test_several_nodes_get_their_place_from_the_job(repo_root):
    done = submit(repo_root, "submit=slurm", "submit.dry_run=true", "launch=nodes", "submit.nodes=2")
    assert done.returncode == 0, done.stderr
    assert "launch.num_machines=2 launch.main_host=FIRST-NODE" in done.stdout
    assert "#SBATCH --nodes=2" in done.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["task=pick"], "submit=: expected one of local, slurm"),
        (["submit=slurm", "submit.partitoin=x"], "submit.partitoin: expected one of cluster, folder"),
        (["submit=slurm", "submit.minutes=4"], "submit.minutes=4: expected more than submit.grace_s=240 seconds"),
        (["submit=slurm", "submit.actors=-1"], "submit.actors: expected a whole number of at least 0, got -1"),
        (["submit=slurm", "algo=sac_pi0,sack"], "no algo is called 'sack'"),
    ],
)
def test_a_mistake_is_named_and_nothing_is_submitted(repo_root, words, told):
    done = submit(repo_root, *words)
    assert done.returncode == 2
    assert told in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_reaches_its_time_limit_is_queued_again_and_goes_on(repo_root, tmp_path):
    """Real processes: a learner and an actor as a job of this machine, cut after a minute of its three."""
    short = ["schedule.stages.0.episodes=3", "schedule.stages.1.steps=40", "schedule.stages.2.episodes=2"]
    short += ["schedule.stages.3.steps=900", "schedule.stages.4.episodes=2"]
    job = ["submit=local", "submit.minutes=3", "submit.grace_s=120", f"submit.folder={tmp_path / 'jobs'}"]
    done = submit(repo_root, *job, f"runs_dir={tmp_path}", "run=cut", "console.port=null", *short, timeout=580)
    logs = "\n".join(path.read_text() for path in (tmp_path / "jobs").glob("*.out"))
    assert done.returncode == 0, done.stderr + logs[-3000:]
    assert "Requeued job" in logs + "\n".join(p.read_text() for p in (tmp_path / "jobs").glob("*.err"))
    assert json.loads((tmp_path / "cut" / "summary.json").read_text())["steps"] >= 940
    checked = [sys.executable, str(repo_root / "tools" / "check_run.py"), str(tmp_path / "cut")]
    assert subprocess.run(checked, env=os.environ, timeout=60).returncode == 0
