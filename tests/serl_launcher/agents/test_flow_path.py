"""The log density of a flow's stochastic path: by hand, against the closed form and numerical integration."""

import math

import pytest
import torch
from path_density import path_log_prob, points_of

from serl_launcher.agents.flow_path import NoiseScale, log_tanh_slope, path_entropy, sample_path

STEPS, A, B = 3, 0.7, 0.3
STD = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)


def velocity(x, t):
    """Linear in x, so that x_K is Gaussian: x_{k+1} = (1 + A/K) x_k + (B + t)/K + σ_k ε."""
    return A * x + B + t[:, None, None]


def at(x, k):
    return velocity(x, x.new_full((len(x),), k / STEPS))


def log_std(b):
    return STD.log()[:, None, None, None].expand(STEPS, b, 1, 1)


def moments():
    """Mean and variance of x_K."""
    mean, variance = 0.0, 1.0
    for k in range(STEPS):
        mean = (1 + A / STEPS) * mean + (B + k / STEPS) / STEPS
        variance = (1 + A / STEPS) ** 2 * variance + STD[k].item() ** 2
    return mean, variance


def marginal_by_integration(ends, squash):
    """∫ p(x_0, …, x_K) dx_0 … dx_{K-1} on a grid, with path_log_prob as the only source of densities."""
    grid = torch.linspace(-7, 7, 141, dtype=torch.float64)
    dx = (grid[1] - grid[0]).item()
    inner = torch.cartesian_prod(grid[::2], grid[::2], grid[::2])  # x_0, x_1, x_2
    density = []
    for end in ends:
        points = torch.cat([inner, torch.full((len(inner), 1), end, dtype=torch.float64)], 1)
        log_p = path_log_prob(velocity, points.T[..., None, None], log_std(len(inner)), 1, squash)
        density.append(log_p.exp().sum().item() * (2 * dx) ** 3)
    return density


def test_one_step_by_hand():
    # K = 1, x_0 = 0.5, v = A·0.5 + B = 0.65, σ = 0.3, ε = 2: x_1 = 0.5 + 0.65 + 0.6 = 1.75.
    noise = torch.full((1, 1, 1), 0.5, dtype=torch.float64)
    path = sample_path(at, noise, torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64), log_std(1)[:1], 1, False)
    assert path.chunk.item() == pytest.approx(1.75)
    log_normal_0 = -0.5 * 0.25 - 0.5 * math.log(2 * math.pi)
    log_normal_1 = -0.5 * 4 - 0.5 * math.log(2 * math.pi) - math.log(0.3)
    assert path.log_prob.item() == pytest.approx(log_normal_0 + log_normal_1)
    squashed = sample_path(at, noise, torch.full((1, 1, 1, 1), 2.0), log_std(1)[:1], 1, True)
    assert squashed.chunk.item() == pytest.approx(math.tanh(1.75))
    assert squashed.log_prob.item() == pytest.approx(path.log_prob.item() - math.log(1 - math.tanh(1.75) ** 2))


def test_the_path_density_integrates_to_the_marginal_of_the_action():
    mean, variance = moments()
    ends = [mean - 1.0, mean, mean + 1.5]
    want = [math.exp(-0.5 * (e - mean) ** 2 / variance) / math.sqrt(2 * math.pi * variance) for e in ends]
    assert marginal_by_integration(ends, squash=False) == pytest.approx(want, rel=1e-3)


def test_the_squashed_density_integrates_to_the_density_of_tanh():
    mean, variance = moments()
    actions = [-0.5, 0.2, 0.9]
    ends = [math.atanh(a) for a in actions]
    normal = [math.exp(-0.5 * (e - mean) ** 2 / variance) / math.sqrt(2 * math.pi * variance) for e in ends]
    want = [p / (1 - a * a) for p, a in zip(normal, actions, strict=True)]  # change of variables
    assert marginal_by_integration(ends, squash=True) == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("squash", [False, True])
def test_a_sampled_path_carries_its_own_density(squash):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(5, 2, 3, generator=generator, dtype=torch.float64)
    step_noise = torch.randn(STEPS, 5, 2, 3, generator=generator, dtype=torch.float64)
    scale = STD.log()[:, None, None, None].expand(STEPS, 5, 1, 2)  # the third dim is padding of the model
    path = sample_path(at, noise, step_noise, scale, 2, squash)
    points = points_of(velocity, noise, step_noise, scale, 2)  # what lies beyond the robot's dims is never disturbed
    torch.testing.assert_close(path.chunk, points[-1].tanh() if squash else points[-1])
    torch.testing.assert_close(path.log_prob, path_log_prob(velocity, points, scale, 2, squash))


def test_without_noise_the_path_is_the_flows_euler_path():
    noise = torch.randn(4, 1, 1, dtype=torch.float64)
    path = sample_path(at, noise, torch.zeros(STEPS, 4, 1, 1), log_std(4), 1, False)
    x = noise
    for k in range(STEPS):
        x = x + velocity(x, torch.full((4,), k / STEPS)) / STEPS
    torch.testing.assert_close(path.chunk, x)


def test_the_entropy_of_a_path_is_the_mean_of_minus_log_p():
    torch.manual_seed(0)
    b, scale = 20_000, torch.full((STEPS, 1, 1, 1), math.log(0.2))
    path = sample_path(at, torch.randn(b, 2, 1), torch.randn(STEPS, b, 2, 1), scale.expand(-1, b, 1, 1), 1, False)
    assert -path.log_prob.mean().item() == pytest.approx(path_entropy(STEPS, 2, 0.2), abs=0.05)


def test_log_tanh_slope_far_out():
    x = torch.tensor([0.3, -2.0, 40.0])
    want = [math.log(1 - math.tanh(0.3) ** 2), math.log(1 - math.tanh(2) ** 2), 2 * math.log(2) - 80]
    assert log_tanh_slope(x).tolist() == pytest.approx(want, rel=1e-5)


def test_the_noise_scale_starts_where_told_and_stays_within_its_bounds():
    scale = NoiseScale(3, 4, 2, initial=0.1, low=0.01, high=0.5)
    torch.testing.assert_close(scale(torch.randn(5, 3)).exp(), torch.full((4, 5, 1, 2), 0.1))
    with torch.no_grad():
        scale.body[2].bias.fill_(1e4)
    assert scale(torch.randn(5, 3)).exp().max().item() == pytest.approx(0.5)
    with pytest.raises(ValueError, match="min_std < init_std < max_std"):
        NoiseScale(3, 4, 2, initial=0.1, low=0.2, high=0.5)
