"""The quick start in small, as a user starts it: real actor, gateway, policy server, trainer and exporter.

One run ends by itself; in the others (marker `soak`) trainer, gateway and actor are killed in mid-run, and what was
acknowledged is compared with the journal and the dataset.
"""

import json
from pathlib import Path

import pytest
from whole_run import STEPS, Run, check

from serl_launcher.run.files import read_sealed

SECRETS = {
    "OPENPI_TOKEN": "serve-3f9a7c21d0", "WANDB_API_KEY": "4b" * 20, "HF_TOKEN": "hf_AbCdEfGh0123456789",
}  # fmt: skip
AS_IT_IS = "drive-8e1b55aa42"  # not by reference, so that it stands in the config


@pytest.mark.timeout(400)
def test_a_small_run_goes_through_every_stage_and_ends_by_itself(tmp_path, free_ports):
    words = ["serving.openpi_port=0", "serving.openpi_token=env:OPENPI_TOKEN", f"rollout.openpi.token={AS_IT_IS}"]
    env = {**SECRETS, "WANDB_MODE": "offline"}
    with Run(tmp_path, free_ports, *words, "telemetry.wandb=true", env=env) as run:
        summary = run.end()
    assert summary["transitions"] > 0
    assert summary["episodes"] >= 4 + 4 + 3 + 4
    assert 0 <= summary["success_rate_before_online"] <= 1
    assert {stage["name"]: stage["steps"] for stage in summary["stages"]}["online"] >= STEPS["online"] - 20
    assert len((run.folder / "evaluation.csv").read_text().splitlines()) == 1 + 4 + 4
    assert summary["policy_versions"] >= (STEPS["sft"] + STEPS["online"]) // 10
    assert (run.folder / "learning_curve.png").stat().st_size > 10_000
    assert len(list((run.folder / "logs").glob("*.log"))) == 6
    assert not list((run.folder / "logs").glob("*.starting"))  # every role said that it was ready
    assert "nothing lost" in check(run.folder)
    page = (run.folder / "journal.md").read_text()
    heads = [line.rpartition(" · ")[2] for line in page.splitlines() if line.startswith("## ")]
    stages = [f"stage `{stage['name']}` is over" for stage in summary["stages"]]
    assert heads == ["start 1 (learner, new)", *stages, "ended: complete"]
    (row,) = map(json.loads, (run.folder.parent / "index.jsonl").read_text().splitlines())
    assert (row["success_rate"], row["complete"]) == (summary["success_rate"], True)
    assert read_sealed(max((run.folder / "checkpoints").iterdir()) / "origin.json")["run_id"] == row["run_id"]
    assert (run.folder / "config.yaml").stat().st_mode & 0o077 == 0
    assert list((run.folder / "metrics/wandb").glob("offline-run-*/*.wandb"))
    assert files_with(tmp_path, *SECRETS.values()) == []
    assert files_with(tmp_path, AS_IT_IS) == [run.folder / "config.yaml"]
    assert "warning: rollout.openpi.token is given as it is" in run.text()


def files_with(folder: Path, *words: str) -> list[Path]:
    """Every file below that holds one of these words: journal, dataset, logs, W&B, screens and all."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    assert len(files) > 30
    return [path for path in files if any(word.encode() in path.read_bytes() for word in words)]


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_killing_trainer_gateway_and_actor_in_mid_run_loses_nothing(tmp_path, free_ports):
    def step_reached(step):
        return lambda status: status["trainer"]["step"] >= step

    def online_episodes(n):
        return lambda status: status["counts"]["online"] >= n

    with Run(tmp_path, free_ports, "+schedule.stages.3.episodes=24") as run:
        run.wait_for(step_reached(15))
        run.kill("serl_launcher.learner")
        run.wait_for(online_episodes(3), 180)
        run.kill("serl_launcher.gateway")
        run.wait_for(online_episodes(9), 180)
        run.kill("actor=true")
        run.wait_for(online_episodes(15), 180)
        run.kill("serl_launcher.learner")
        run.kill("serl_launcher.exporter")
        run.kill("serl_launcher.serving")
        summary = run.end(300)
    assert summary["success_rate_episodes"] == 4
    report = check(run.folder)
    assert "nothing lost" in report
    text = run.log.read_text()
    for role in ("trainer", "gateway", "exporter", "policy"):
        assert f"{role} started again" in text, text[-4000:]


@pytest.mark.soak  # its restarts are up to a minute apart
@pytest.mark.timeout(900)
def test_a_policy_server_killed_seven_times_once_it_serves_does_not_end_the_run(tmp_path, free_ports):
    with Run(tmp_path, free_ports) as run:
        starting, log = run.folder / "logs" / "policy.starting", run.folder / "logs" / "policy.log"
        run.wait_for(lambda _: log.exists())
        for kills in range(1, 8):
            run.wait_for(lambda _, n=kills: log.read_text().count(" start\n") == n and not starting.exists(), 180)
            run.kill("serl_launcher.serving")
        run.end(400)
    text = run.log.read_text()
    assert text.count("policy started again") == 7, text[-4000:]
    assert "nothing lost" in check(run.folder)
