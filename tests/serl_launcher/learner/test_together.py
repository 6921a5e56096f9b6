"""Several ranks of the trainer do what rank 0 says, in the same step: real views on a real ring, over gloo."""

import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from configured import rule
from omegaconf import OmegaConf
from ranks_rig import on_ranks
from tiny import SPEC
from trainer_rig import make, put

from serl_launcher.learner import trainer as trainer_module
from serl_launcher.learner.data import Heard, TrainingData
from serl_launcher.learner.ranks import Ranks
from serl_launcher.learner.together import Together, Words, told
from serl_launcher.replay.learning import LearningView
from serl_launcher.replay.ring import RingWriter
from serl_launcher.replay.verdicts import VerdictLedger
from serl_launcher.replay.views import ChunkView, ViewSources
from serl_launcher.run.in_force import Word

STEPS = 50


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


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["train", "online"])
@pytest.mark.parametrize("algo", ["reject_sampling_pi0", "sac_pi0", "dsrl_pi0"])
def test_two_ranks_learn_what_one_does_on_the_same_rows(tmp_path, ring, algo, mode):
    steps = STEPS
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


class Rows:
    """A learner that keeps what it was given; its agent forgets when it is told to."""

    in_parts = False

    def __init__(self, ranks):
        self.agent, self.ranks, self.states, self.forgot = self, ranks, [], 0

    def step(self, batch, lr_scale):
        self.states.append(np.concatenate([batch.transitions.state, batch.imitation.state], axis=1))
        self.ranks.highest(0)  # as the exchange of gradients, it lets no rank run ahead
        return {}

    def forget_data(self):
        self.forgot += 1


def view_of(ledger, words) -> LearningView:
    accepted = ChunkView(rule(), SPEC, 4, on_verdict=ledger.note, history=ledger.returns, words=words.word_of)
    return LearningView(
        ViewSources(SPEC, accepted, 4, 2, words.word_of), gamma=0.9, demo_share=0.5, min_online=1, takeover_reward=None
    )


def rows_of_ranks(folder: Path, path: Path, more) -> list:
    """Batches of six steps: more episodes come in, which drive others out, and a person says a word."""
    ranks = Ranks.joined()
    learner = Rows(ranks)
    words, ledger = Words({}), VerdictLedger(folder / "acceptance.jsonl", "r") if ranks.first else Heard()
    heard, rng = None if ranks.first else words, np.random.default_rng(0)
    data = TrainingData(view_of(ledger, words), ledger, rng, 0, lambda b: b, torch.device("cpu"), ranks=ranks)
    together = Together(ranks, learner, data, None, lambda config: (view_of(ledger, words), ledger), heard)
    if not ranks.first:
        together.follow()
        return learner.states
    for k in range(6):
        if k in (2, 4):
            more(k)
        if k == 3:
            said = {"e1": Word(success=False, use="discard", act=1)}
            words.take(told(said))
            together.start_over(said)
        if k == 5:
            together.take_view(OmegaConf.create({}))
        assert together.refresh(str(path))
        together.step(8, 1.0)
    together.end()
    assert learner.forgot == 1
    return learner.states


def test_every_rank_draws_its_share_of_the_rows_that_one_would_draw(tmp_path):
    found = {}
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        ring = RingWriter(SPEC, 120, folder, shared=folder)
        fill(ring)

        def more(k, ring=ring):
            for ordinal in range(10 * k, 10 * k + 6):
                put(ring, ordinal, "online", success=ordinal % 2 == 0)

        found[world] = on_ranks(world, rows_of_ranks, folder, ring.path, more)
        ring.close()
    assert len(found[1][0]) == 6
    for k, whole in enumerate(found[1][0]):
        shares = [rank[k] for rank in found[2]]
        assert [len(share) for share in shares] == [4, 4]
        np.testing.assert_array_equal(np.concatenate(shares), whole)
