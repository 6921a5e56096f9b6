"""The image and the workflow name what is there, and the workflow runs what CI runs."""

import re

import yaml


def test_the_image_copies_and_starts_what_the_checkout_has(repo_root):
    text = (repo_root / "Dockerfile").read_text()
    scripts = re.findall(r"bash (\S+\.sh)", text) + re.findall(r'"bash", "(\S+)"', text)
    assert {"tools/bootstrap.sh", "run_actor.sh", "run_learner.sh"} <= set(scripts)
    assert all((repo_root / name).is_file() for name in scripts)
    kinds = re.findall(r"bootstrap\.sh (\w+)", text)
    assert all((repo_root / "requirements" / f"{kind}.txt").is_file() for kind in kinds)


def test_the_workflow_runs_the_readmes_test_command(repo_root):
    jobs = yaml.safe_load((repo_root / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert commands == ["bash test.sh", "bash test.sh -m faults"]
    assert "bash test.sh" in (repo_root / ".ci" / "run").read_text()
