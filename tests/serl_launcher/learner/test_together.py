"""Several ranks of the trainer do what rank 0 says, in the same step: real views on a real ring, over gloo."""

import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks_rig import on_ranks
from trainer_rig import make, put

from serl_launcher.learner import trainer as trainer_module

STEPS = 6


def work(folder: Path, ring: Path, algo: str, mode: str, steps: int, changes: dict, act=None):
    """A trainer, or a follower of it, to its end; what its learner was given and what came of it."""
    logging.disable(logging.CRITICAL)
    trainer_module.REST_S = trainer_module.LIMITED_S = 0.0
    trainer, gateway = make(folder, SimpleNamespace(path=ring), algo, mode, steps=steps, limit=400, **changes)
    together = getattr(trainer, "together", None) or trainer._together
    learner, states, losses = together.learner, [], []
    step = learner.step

    def noted(batch, lr_scale):
        chunks = getattr(batch, "transitions", batch)
        states.append(np.asarray(chunks.state).copy())
        metrics = step(batch, lr_scale)
        losses.append([float(x) for name, x in sorted(metrics.items()) if name.startswith("losses/")])
        return metrics

    learner.step = noted
    if act is not None:
        act(trainer, gateway)
    trainer.run()
    return {
        "states": states,
        "losses": losses,
        "tensors": {name: tensor.clone() for name, tensor in learner.tensors().items()},
        "reports": getattr(gateway, "reports", []),
    }


def run(folder: Path, ring, ranks: int, algo: str, mode: str = "train", steps: int = STEPS, act=None, **changes):
    folder.mkdir(exist_ok=True)
    return on_ranks(ranks, work, folder, ring.path, algo, mode, steps, changes, act)


def close(one, other, tolerance: float = 1e-4) -> None:
    assert [len(row) for row in one] == [len(row) for row in other]
    worst = max(
        abs(a - b) / max(abs(a), 1e-6) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)
    )
    assert worst < tolerance, worst


def alike(ranks) -> None:
    """Do all ranks hold the same numbers?"""
    for name, tensor in ranks[0]["tensors"].items():
        assert all(torch.equal(tensor, rank["tensors"][name]) for rank in ranks[1:]), name


def fill(ring, demos: int = 4, online: int = 4) -> None:
    for ordinal in range(demos + online):
        put(ring, ordinal, "demo" if ordinal < demos else "online")


@pytest.mark.parametrize(
    ("algo", "mode"),
    [
        ("reject_sampling_pi0", "train"),
        pytest.param("reject_sampling_pi0", "online", marks=pytest.mark.slow),
        pytest.param("sac_pi0", "train", marks=pytest.mark.slow),
        pytest.param("sac_pi0", "online", marks=pytest.mark.slow),
        pytest.param("dsrl_pi0", "train", marks=pytest.mark.slow),
        pytest.param("dsrl_pi0", "online", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_learn_what_one_does_on_the_same_rows(tmp_path, ring, algo, mode, request):
    steps = 50 if request.node.get_closest_marker("slow") else STEPS
    fill(ring)
    (alone,) = run(tmp_path / "one", ring, 1, algo, mode, steps)
    two = run(tmp_path / "two", ring, 2, algo, mode, steps, launch__engine="ddp")
    for k, whole in enumerate(alone["states"]):
        np.testing.assert_array_equal(np.concatenate([rank["states"][k] for rank in two]), whole)
    close(alone["losses"], two[0]["losses"])
    assert two[0]["losses"] == two[1]["losses"]
    alike(two)
    assert two[0]["reports"][-1]["step"] == steps
    assert two[1]["reports"] == []
