"""Chunk critics: the backup by hand, the pad mask, independence of the members, calibration."""

import math

import pytest
import torch

from serl_launcher.critics.ensemble import ChunkCritic
from serl_launcher.critics.losses import cal_ql, chunk_target, pessimistic, td_loss


def test_the_backup_at_running_terminated_truncated_and_padded_chunks():
    # h = 3, γ = 0.5, Q̄ = 8 everywhere.
    #                        running        terminated   truncated after 2   padded: one tick, terminated
    reward = torch.tensor([1 + 0.5 + 0.25, 1.0, 1 + 0.5, 4.0])
    discount = torch.tensor([0.125, 0.125, 0.25, 0.5])
    bootstrap = torch.tensor([True, False, True, False])
    target = chunk_target(reward, discount, bootstrap, torch.full((4,), 8.0))
    assert target.tolist() == [1.75 + 1.0, 1.0, 1.5 + 2.0, 4.0]


def test_a_target_that_is_not_bootstrapped_ignores_a_broken_next_value():
    target = chunk_target(torch.ones(1), torch.ones(1), torch.tensor([False]), torch.tensor([math.nan]))
    assert target.tolist() == [1.0]


def test_padded_ticks_do_not_reach_the_value_but_their_number_does():
    torch.manual_seed(0)
    critic = ChunkCritic(5, 3, 2, n=2, widths=(16,))
    features, chunk = torch.randn(4, 5), torch.randn(4, 3, 2)
    is_pad = torch.tensor([[False, True, True]] * 4)
    other = torch.where(is_pad[..., None], torch.full_like(chunk, math.nan), chunk)
    assert torch.equal(critic(features, chunk, is_pad), critic(features, other, is_pad))
    zeros = torch.where(is_pad[..., None], torch.zeros_like(chunk), chunk)
    assert not torch.allclose(critic(features, zeros), critic(features, zeros, is_pad))


def test_members_are_independent_and_equal_a_plain_network():
    torch.manual_seed(0)
    critic = ChunkCritic(4, 1, 2, n=3, widths=(8, 8))
    features, chunk = torch.randn(6, 4), torch.randn(6, 1, 2)
    q = critic(features, chunk)
    x = torch.cat([features, chunk.flatten(1), torch.zeros(6, 1)], -1)
    for layer in critic.layers:
        x = torch.nn.functional.layer_norm(x @ layer.weight[1] + layer.bias[1], (8,))
        x = torch.nn.functional.silu(x)
    torch.testing.assert_close(q[1], (x @ critic.head.weight[1] + critic.head.bias[1])[:, 0])
    q[1].sum().backward()
    gradient = critic.layers[0].weight.grad
    assert gradient[1].abs().sum() > 0
    assert gradient[[0, 2]].abs().sum() == 0


def test_a_chunk_of_another_length_is_named():
    with pytest.raises(ValueError, match=r"expected a chunk of shape \[b, 2, 3\], got \(1, 4, 3\)"):
        ChunkCritic(1, 2, 3, n=2, widths=(4,))(torch.zeros(1, 1), torch.zeros(1, 4, 3))


def test_td_loss_by_hand():
    q = torch.tensor([[1.0, 2.0], [3.0, 0.0]], requires_grad=True)
    # ½ · mean((0, 2, 2, 0)²) against y = (1, 0)
    loss = td_loss(q, torch.tensor([1.0, 0.0]))
    assert loss.item() == pytest.approx(0.5 * (0 + 4 + 4 + 0) / 4)
    loss.backward()
    torch.testing.assert_close(q.grad, torch.tensor([[0.0, 0.5], [0.5, 0.0]]))


def test_the_minimum_over_drawn_members():
    q = torch.tensor([[1.0, 5.0], [2.0, 4.0], [3.0, 3.0]])
    assert pessimistic(q, 3).tolist() == [1.0, 3.0]
    torch.manual_seed(0)
    drawn = {tuple(pessimistic(q, 2).tolist()) for _ in range(30)}
    assert drawn == {(1.0, 4.0), (1.0, 3.0), (2.0, 3.0)}


def test_calibration_stops_pushing_below_the_data_returns():
    data, random = torch.zeros(1, 1), torch.full((1, 1, 1), -50.0)
    low = torch.full((1, 1, 1), -5.0, requires_grad=True)
    high = torch.full((1, 1, 1), 5.0, requires_grad=True)
    # The policy's value lies below the return of the data, 2: the term is a constant there.
    loss = cal_ql(data, low, random, torch.tensor([2.0]))
    assert loss.item() == pytest.approx(2 - math.log(2), abs=1e-4)
    loss.backward()
    assert low.grad.item() == 0
    cal_ql(data, high, random, torch.tensor([2.0])).backward()
    assert high.grad.item() == pytest.approx(1.0, abs=1e-4)


def test_the_policys_chunks_count_as_much_as_uniform_ones():
    policy = torch.full((1, 1, 2), 0.9, requires_grad=True)
    random = torch.full((1, 1, 2), 0.9, requires_grad=True)
    cal_ql(torch.zeros(1, 1), policy, random, torch.tensor([0.5])).backward()
    torch.testing.assert_close(policy.grad, random.grad)
