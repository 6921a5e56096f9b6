"""A capture that fails: what CUDA and torch's allocator are left as, what is served on, and what is said.

By `fake_cuda` here; with a card (marker gpu) the same tests capture for themselves.
"""

import logging
from contextlib import suppress

import pytest
import torch
from fake_cuda import FakeCuda

from serl_launcher.serving.graphs import GraphRunner, capture_cuda


class Card:
    """A CUDA device, faked or real, and what may be asked of it."""

    def __init__(self, fake):
        self.fake, self.device = fake, "cpu" if fake else "cuda"

    def read_back(self, x):
        """Wait for a value, which a capture forbids."""
        if self.fake is None:
            x.sum().item()
        else:
            self.fake.read_back()

    def is_in_order(self):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # an assertion of the allocator, where it believes that a capture goes on
        default = torch.cuda.default_stream() if self.fake is None else self.fake.default
        return torch.cuda.current_stream() == default


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.gpu)])
def card(request, monkeypatch):
    return Card(FakeCuda().install(monkeypatch) if request.param == "fake" else None)


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING, "policy")
    return lambda: [record.getMessage() for record in caplog.records]


def ask(runner, card, n):
    answer = runner({"noise": torch.full((n, 2), 1.0, device=card.device)})
    assert answer.shape == (n, 2)
    return answer


def test_a_pass_that_reads_back_ends_capturing_and_everything_is_served_on(card, said):
    def forward(inputs):
        if len(inputs["noise"]) == 4:
            card.read_back(inputs["noise"])
        return inputs["noise"] * 2

    runner = GraphRunner(forward, capture_cuda)
    ask(runner, card, 1)
    for n in (4, 2, 4, 1):
        assert ask(runner, card, n).unique().tolist() == [2.0]
        assert card.is_in_order()
    assert (runner.captured, runner.plain) == (1, 3)
    (line,) = said()
    assert line.startswith("serving.cuda_graphs: a batch of 4 cannot be captured: CUDA error: operation not permitted")
    assert line.endswith("; nothing more is, 1 graphs that are there are used on")


def test_a_capture_whose_end_raises_leaves_stream_and_allocator_in_order(card, said):
    """The pass swallows the error of what it may not do: only the end of the capture tells."""

    def forward(inputs):
        with suppress(RuntimeError):
            card.read_back(inputs["noise"])
        return inputs["noise"] * 2

    runner = GraphRunner(forward, capture_cuda)
    for n in (1, 2):
        assert ask(runner, card, n).unique().tolist() == [2.0]
        assert card.is_in_order()
    assert len(said()) == 1
    assert "previous error" in said()[0]
    if card.fake:
        assert not +card.fake.uses  # no pool is held for it


def test_an_error_of_the_pass_while_it_is_captured_leaves_the_graphs_that_are_there(card, said):
    runs = []

    def forward(inputs):
        runs.append(len(inputs["noise"]))
        if runs.count(2) == 4:  # three runs before it is captured, and this one
            raise ValueError("not twice")
        return inputs["noise"] * 2

    runner = GraphRunner(forward, capture_cuda)
    ask(runner, card, 1)
    ask(runner, card, 2)
    ask(runner, card, 1)
    assert card.is_in_order()
    assert (runner.captured, runner.plain) == (1, 1)
    assert said()[0].startswith("serving.cuda_graphs: a batch of 2 cannot be captured: not twice")


def test_an_error_of_the_pass_itself_is_the_questions_and_capturing_goes_on(card, said):
    def forward(inputs):
        if len(inputs["noise"]) == 3:
            raise ValueError("no such batch")
        return inputs["noise"] * 2

    runner = GraphRunner(forward, capture_cuda)
    with pytest.raises(ValueError, match="no such batch"):
        ask(runner, card, 3)
    assert card.is_in_order()
    ask(runner, card, 2)
    assert runner.captured == 1
    assert said() == []
