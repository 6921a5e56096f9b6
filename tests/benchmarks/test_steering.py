"""The best of n noises: the chunk nearest to the expert's is the one that is executed."""

import json
import sys

import numpy as np
import pytest
import torch


@pytest.mark.slow
def test_rows_of_a_tiny_flow(capsys, monkeypatch):
    import steering

    monkeypatch.setattr(sys, "argv", [
        "steering.py", "--episodes", "1", "--best-of", "1,2", "budget.demos=1", "budget.clone_steps=2",
    ])  # fmt: skip
    steering.main()
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [(row["variant"], row["best_of"]) for row in rows] == [
        ("per_step", 1), ("per_step", 2), ("tiled", 1), ("tiled", 2),
    ]  # fmt: skip
    assert all(row["success_rate"] in (0, 1) and row["trials"] == 1 for row in rows)


def test_the_nearest_chunk_is_chosen():
    from steering import nearest

    made = torch.tensor([[[0.0, 9.0], [0.0, 9.0], [5.0, 0.0]], [[1.0, -9.0], [1.0, 9.0], [0.0, 0.0]]])
    # One robot dim, the first two ticks: 2 · 0.8² against 2 · 0.2².
    assert nearest(made, torch.tensor([[[0.8, 0.0]]]), robot_dim=1) == 1
    assert nearest(made, torch.tensor([[[0.2, 0.0]]]), robot_dim=1) == 0


def test_an_episode_is_driven_chunk_by_chunk():
    from steering import success

    from serl_robot_infra.envs.pick import PickEnv

    env = PickEnv(cameras=(), max_ticks=7)
    asked = []

    def choose(observation, wanted):
        asked.append(wanted)
        return np.zeros((8, 4))

    assert success(env, choose, 4, 0) is False
    assert len(asked) == 2  # 4 ticks of the first chunk, 3 of the second
