"""Relative actions through a whole run: actor, gateway, policy server, trainer and exporter on targets of a hand."""

import numpy as np
import pytest
import yaml
from absolute_pick import HIGH, LOW, words
from whole_run import ROOT, Run, check

REACH = 0.1  # of a relative action at ±1, metres: what the hand goes in half a chunk
RELATIVE = f"policy.relative={{exclude:[grip],low:[[-{REACH},-{REACH},-{REACH},0]],high:[[{REACH},{REACH},{REACH},0]]}}"
CRITIC = ["algo.agent.warmup_steps=10", "algo.agent.widths=[32]", "algo.agent.critics=2", "algo.view.min_online=20"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("algo", "more"),
    [
        ("reject_sampling_pi0", ["policy=pi05_tiny", "rollout.realtime=rtc"]),
        ("sac_pi0", ["policy=groot_tiny", "rollout.realtime=async", *CRITIC]),
    ],
)
def test_a_run_with_a_relative_policy_learns_from_absolute_actions(algo, more, tmp_path, free_ports):
    env = {"PYTHONPATH": str(ROOT / "tests" / "serl_robot_infra")}
    task = [word.replace(" ", "") for word in words()]
    with Run(tmp_path, free_ports, f"algo={algo}", *more, RELATIVE, *task, env=env) as run:
        summary = run.end(800)
    assert summary["episodes"] >= 4 + 4 + 3 + 4
    assert {stage["name"]: stage["steps"] for stage in summary["stages"]}["online"] >= 40
    assert "nothing lost" in check(run.folder)
    assert yaml.safe_load((run.folder / "config.yaml").read_text())["policy"]["relative"]["exclude"] == ["grip"]
    state, action, mode = recorded(run.folder / "dataset")
    assert (action >= np.float32(LOW) - 1e-6).all()
    assert (action <= np.float32(HIGH) + 1e-6).all()
    alone = mode == 2  # evaluations: the policy drives every tick, and what it says is near where the hand is
    assert alone.sum() > 100
    assert np.abs(action[alone, :3] - state[alone, :3]).mean() < 2 * REACH
    assert action[alone, 2].mean() > 0.05  # an anchor of 0 would lie in the table


def recorded(folder):
    """State, action and mode (2: evaluation) of every row of a run's dataset."""
    import pyarrow.parquet as parquet

    columns = ["observation.state", "action", "complementary_info.mode"]
    tables = [parquet.read_table(path, columns=columns) for path in sorted(folder.glob("data/*/*.parquet"))]
    stacked = ([np.stack(t[name].to_numpy()) for t in tables] for name in columns)
    return [np.concatenate(column).reshape(sum(len(t) for t in tables), -1).squeeze() for column in stacked]
