"""The log density of given paths through a flow, from the residuals: an oracle beside agents.flow_path."""

import torch
from torch.distributions import Normal

from serl_launcher.agents.flow_path import log_tanh_slope


def points_of(velocity, noise, step_noise, log_std, robot_dim):
    """The path from `noise` under these disturbances: float[K+1, b, ah, ad]."""
    points, steps = [noise], len(step_noise)
    for k in range(steps):
        x = points[-1] + velocity(points[-1], torch.full((len(noise),), k / steps)) / steps
        x[..., :robot_dim] += log_std[k].exp() * step_noise[k][..., :robot_dim]
        points.append(x)
    return torch.stack(points)


def path_log_prob(velocity, points, log_std, robot_dim, squash):
    """log p of paths float[K+1, b, ah, ad] (of tanh x_K when squash): float[b]."""
    steps = len(points) - 1
    total = Normal(0.0, 1.0).log_prob(points[0][..., :robot_dim]).sum((1, 2))
    for k in range(steps):
        mean = points[k] + velocity(points[k], torch.full((points.shape[1],), k / steps)) / steps
        spread = log_std[k].exp().expand_as(mean[..., :robot_dim])
        total = total + Normal(mean[..., :robot_dim], spread).log_prob(points[k + 1][..., :robot_dim]).sum((1, 2))
    return total - log_tanh_slope(points[-1][..., :robot_dim]).sum((1, 2)) if squash else total
