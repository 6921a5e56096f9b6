"""kill -9 of any rank of the trainer, at random moments of a whole run: it goes on, and nothing is published twice."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from whole_run import Run, check

KILLS = int(os.environ.get("FAULTS_RANK_KILLS", "10"))
MORE = ["launch=several", "launch.num_processes=2", "trainer.device=cpu", "task=pick_state", "console.port=null"]


def ranks_of(folder: Path) -> dict[int, int]:
    """Rank -> pid, of the ranks of this run that live."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().decode().split("\0")
            given = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if str(folder) in words and "serl_launcher.supervisor.lifeline" in words and "RANK=" in "".join(given):
            rank = next((word for word in given if word.startswith("RANK=")), None)
            if rank is not None and "serl_launcher.supervisor.several" not in words:
                found[int(rank.removeprefix("RANK="))] = int(entry.name)
    return found


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_any_rank_is_killed_again_and_again(tmp_path, free_ports, figures):
    rng = random.Random(7)
    steps = {"sft": 30 * (KILLS + 1), "online": 20}
    words = [f"schedule.stages.1.steps={steps['sft']}", f"schedule.stages.3.steps={steps['online']}"]
    with Run(tmp_path, free_ports, *MORE, *words) as run:
        killed, step = [], 0
        while len(killed) < KILLS:
            status = run.wait_for(lambda s, step=step: s.get("trainer", {}).get("step", 0) > step or s.get("done"), 600)
            if status.get("done"):
                break
            time.sleep(rng.uniform(0, 1.0))
            ranks = ranks_of(run.folder)
            if len(ranks) < 2:
                continue
            victim = rng.choice(sorted(ranks))
            step = run.status()["trainer"]["step"]
            os.kill(ranks[victim], signal.SIGKILL)
            killed.append(victim)
            until_gone(ranks.values())
            step = max(step, run.status()["trainer"]["step"])  # what it had told before it died
        summary = run.end(1800)
    assert summary["steps"] == sum(steps.values())
    check(run.folder)
    lines = (run.folder / "metrics" / "trainer.jsonl").read_text().splitlines()
    written = [json.loads(line)["step"] for line in lines]
    assert sorted(set(written)) == list(range(1, sum(steps.values()) + 1))
    versions = [json.loads(path.read_text())["version"] for path in (run.folder / "params").glob("v*.json")]
    assert len(versions) == len(set(versions))
    assert not ranks_of(run.folder)
    figures.row(
        "kill -9 of a rank", "the run ends with all steps, no rank left", True, kills=len(killed), of=str(killed)
    )


def until_gone(pids) -> None:
    """No rank of before meets those of the next start."""
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
