"""Batches made ahead: in another thread, and yet each step gets the batch that it would have got without."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import random_batch, tiny_policy
from trainer_rig import make, put

from serl_launcher.agents.flow_matching import FlowMatchingAgent
from serl_launcher.learner.ahead import Ahead
from serl_launcher.learner.data import TrainingData
from serl_launcher.replay.views import ChunkBatch

CPU = torch.device("cpu")


def test_a_batch_is_made_while_the_caller_does_something_else_and_one_of_another_size_anew():
    began, go_on, made = threading.Event(), threading.Event(), []

    def draw(size):
        made.append((size, threading.current_thread() is threading.main_thread()))
        if len(made) == 2:
            began.set()
            assert go_on.wait(10)
        return size

    ahead = Ahead(draw, CPU)
    assert ahead.take(3) == 3
    ahead.begin(3)
    assert began.wait(10)  # while this thread is here
    go_on.set()
    assert ahead.take(3) == 3
    ahead.begin(3)
    assert ahead.take(4) == 4
    assert made == [(3, True), (3, False), (3, False), (4, True)]
    ahead.close()


def test_what_goes_wrong_in_the_thread_is_raised_where_the_batch_is_taken_and_nowhere_else():
    draws = iter(["whole", ValueError("episode 3 is torn"), "whole again"])

    def draw():
        found = next(draws)
        if isinstance(found, Exception):
            raise found
        return found

    ahead = Ahead(draw, CPU)
    assert ahead.take() == "whole"
    ahead.begin()
    with pytest.raises(ValueError, match="episode 3 is torn"):
        ahead.take()
    assert ahead.take() == "whole again"
    ahead.begin()  # beyond the end, and never taken
    ahead.close()


class Numbers:
    """A view whose batches are numbers below `top`, which `refresh` raises by what came."""

    def __init__(self, top):
        self.top, self.came = top, 0

    def attach(self, ring):
        """There is no ring."""

    def refresh(self):
        came, self.came = self.came, 0
        self.top += came
        return came

    def sample(self, rng, b):
        return rng.integers(0, self.top, b)


class NoLedger:
    accepted = 0

    def write(self):
        """Nothing is judged."""


def numbers(seed=0, top=1000):
    view, rng = Numbers(top), np.random.default_rng(seed)
    data = TrainingData(view, NoLedger(), rng, 0, lambda batch: batch, CPU)
    data._ring, data._reader = "r", SimpleNamespace(rows=1, reach=lambda rows: None)
    return view, rng, data


def test_a_step_gets_the_batch_that_it_would_have_got_and_so_does_a_resumed_run():
    view, rng, data = numbers()
    plain, expected = np.random.default_rng(0), []
    for k in range(12):
        if k == 5:  # more came in: the one that is ahead is of before
            view.came = 500
            data._reader.rows += 1
            data.refresh(None)
        if k == 8:  # an operator took the size back
            data.sample(2)
            plain.integers(0, view.top, 2)
        if k == 9:  # people said something of episodes
            data.start_over()
            view.top, data._ring = 10, "r"
        expected.append(plain.integers(0, view.top, 4))
        np.testing.assert_array_equal(data.sample(4), expected[-1])
        assert rng.bit_generator.state == plain.bit_generator.state, k
        if k == 6:
            kept = rng.bit_generator.state
    _, again, resumed = numbers(top=1500)
    again.bit_generator.state = kept
    np.testing.assert_array_equal(resumed.sample(4), expected[7])


def test_another_rules_view_is_drawn_from_at_once():
    _, _, data = numbers()
    data.sample(4)
    data.take(Numbers(1), NoLedger())
    data._ring = "r"
    assert data.sample(4).tolist() == [0, 0, 0, 0]


def test_a_prepared_batch_has_the_loss_and_the_gradients_of_the_arrays():
    agent, batch, found = FlowMatchingAgent(tiny_policy(), noise_samples=2), random_batch(), []
    prepared = agent.prepare(batch)
    assert isinstance(prepared, ChunkBatch)
    assert isinstance(prepared.weight, torch.Tensor)
    assert agent.prepare("a lab's own batch") == "a lab's own batch"
    for given in (batch, prepared):
        agent.zero_grad()
        torch.manual_seed(0)
        loss = agent(given, 0)[0]["policy"]
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in agent.parameters() if p.grad is not None)])
    assert len(found[0]) > 20
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_run_that_was_stopped_between_two_steps_is_the_run_that_was_not(tmp_path, ring):
    put(ring, 0, "demo")
    constant, ends = {"trainer__warmup_steps": 1, "trainer__final_lr_scale": 1.0}, []
    for name, stops in (("whole", [4]), ("cut", [2, 4])):
        for steps in stops:
            trainer, _ = make(tmp_path / name, ring, steps=steps, **constant)
            trainer.run()
        ends.append(trainer.learner.tensors())
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
