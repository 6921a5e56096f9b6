"""Graphs of the policy server: buckets, static buffers, hot swap and fallback. Without CUDA the capture is replaced by
a recording that runs the same forward pass into the same buffer; test_on_a_card captures."""

import numpy as np
import pytest
import torch
from serving_samples import body, put
from tiny import HORIZON, SPEC, tiny_config

from serl_launcher.serving import graphs
from serl_launcher.serving.engine import PolicyEngine
from serl_launcher.serving.graphs import GraphRunner, bucket_of, bucket_sizes
from serl_launcher.serving.query import query_from_body


def record(forward, inputs, pool):
    """What a capture gives, without CUDA: a buffer, and what writes it again from the same inputs."""
    output = forward(inputs).clone()
    return output, lambda: output.copy_(forward(inputs)), pool


@pytest.fixture
def engine(tmp_path):
    put(tmp_path, 0)
    engine = PolicyEngine(tiny_config(serving__max_batch=6, serving__device="cpu"), tmp_path)
    engine.refresh()
    engine._graphs = GraphRunner(engine._forward, record)
    return engine


def ask(engine, n, **extra):
    return engine.act([query_from_body(body(k) | extra, SPEC) for k in range(n)])


def plain(engine, n, **extra):
    graphs, engine._graphs = engine._graphs, None
    try:
        return ask(engine, n, **extra)
    finally:
        engine._graphs = graphs


def test_buckets_are_powers_of_two_and_the_largest_batch():
    assert bucket_sizes(8) == (1, 2, 4, 8)
    assert bucket_sizes(6) == (1, 2, 4, 6)
    assert bucket_sizes(1) == (1,)
    assert [bucket_of(n, (1, 2, 4, 6)) for n in (1, 2, 3, 5, 6, 7)] == [1, 2, 4, 6, 6, None]


def test_every_batch_size_is_answered_as_without_graphs(engine):
    engine.warm_up()
    assert engine._graphs.captured == 4
    for n in range(1, 7):
        np.testing.assert_allclose(np.stack(ask(engine, n)), np.stack(plain(engine, n)), atol=1e-5)
    assert engine._graphs.captured == 4
    assert engine._graphs.plain == 0


def test_a_swap_writes_into_the_memory_that_graphs_read(engine, tmp_path):
    before = ask(engine, 3)
    places = {name: p.data_ptr() for name, p in engine.policy.named_parameters()}
    put(tmp_path, 1, shift=0.1)
    assert engine.refresh()
    assert {name: p.data_ptr() for name, p in engine.policy.named_parameters()} == places
    after = ask(engine, 3)
    assert engine._graphs.captured == 1
    assert not np.allclose(np.stack(before), np.stack(after))
    np.testing.assert_allclose(np.stack(after), np.stack(plain(engine, 3)), atol=1e-5)


def test_unseeded_noise_is_drawn_for_the_questions_alone(engine):
    """Filling a bucket up must not move the generator."""
    state = engine._noise.get_state()
    ask(engine, 3, seed=None)
    drawn = engine._noise.get_state()
    engine._noise.set_state(state)
    plain(engine, 3, seed=None)
    assert torch.equal(engine._noise.get_state(), drawn)


def test_the_best_of_n_chunks_is_chosen_inside_a_bucket(tmp_path):
    """A bucket that is filled up holds the noise of every candidate of each of its rows."""
    engine = PolicyEngine(tiny_config("best_of_n_pi0", serving__max_batch=4, serving__device="cpu"), tmp_path)
    engine._graphs = GraphRunner(engine._forward, record)
    first = ask(engine, 3)
    with torch.no_grad():  # as a swap opens it: in place
        engine.policy.chooser.gate.fill_(1.0)
    chosen = ask(engine, 3)
    assert engine._graphs.captured == 1
    assert [engine._graphs.plain, len(chosen), chosen[0].shape] == [0, 3, (HORIZON, 2)]
    assert not np.allclose(np.stack(first), np.stack(chosen))
    np.testing.assert_allclose(np.stack(chosen), np.stack(plain(engine, 3)), atol=1e-5)


def test_several_samples_and_guidance_go_around_the_graphs(engine):
    running = np.zeros((3, 2), np.float32)
    assert ask(engine, 2, samples=3)[0].shape == (3, HORIZON, 2)
    assert ask(engine, 1, prefix_actions=running, inference_delay=1)[0].shape == (HORIZON, 2)
    assert engine._graphs.captured == 0


def test_what_is_captured_at_the_start_stays_and_what_comes_later_is_bounded(monkeypatch):
    runner = GraphRunner(lambda inputs: inputs["noise"] * 2, record)

    def captures(*sizes):
        before = runner.captured
        for n in sizes:
            assert runner({"noise": torch.full((n, 1), 1.0)}).sum() == 2 * n
        return runner.captured - before

    assert captures(1, 2, 4) == 3
    runner.keep()
    monkeypatch.setattr(graphs, "MAX_BUCKETS", 2)
    assert captures(3, 5, 3, 6, 3) == 3  # 6 takes the place of 5, which was used longest ago
    assert captures(1, 2, 4, 3, 6) == 0
    assert captures(5) == 1
    assert len(runner._buckets) == 3 + 2


def test_an_answer_is_not_overwritten_by_the_next():
    runner = GraphRunner(lambda inputs: inputs["noise"] * 2, record)
    first = runner({"noise": torch.ones(2, 3)})
    second = runner({"noise": torch.full((2, 3), 5.0)})
    assert first.unique().tolist() == [2.0]
    assert second.unique().tolist() == [10.0]


def test_what_stays_on_the_host_is_part_of_the_bucket():
    runner = GraphRunner(lambda inputs: inputs["noise"] * int(inputs["image_grid_thw"][0, 1]), record)
    for rows in (2, 3, 2):
        assert runner({"noise": torch.ones(1, 1), "image_grid_thw": torch.tensor([[1, rows, 2]])}).item() == rows
    assert runner.captured == 2


def test_graphs_are_refused_without_a_gpu_and_a_wrong_word_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"serving\.cuda_graphs=on: needs serving\.device=cuda, got cpu"):
        PolicyEngine(tiny_config(serving__cuda_graphs="on", serving__device="cpu"), tmp_path)
    with pytest.raises(ValueError, match=r"serving\.cuda_graphs: expected one of .* got 'yes'"):
        PolicyEngine(tiny_config(serving__cuda_graphs="yes", serving__device="cpu"), tmp_path)
