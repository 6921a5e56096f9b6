"""Agents on a policy whose chunks are wider than the robot: what is padding reaches neither critics nor densities."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tiny import HORIZON, ROOT, SPEC, random_batch, random_transitions, tiny_config

from serl_launcher.agents.build import build_agent, build_policy
from serl_launcher.agents.flow_matching import imitation_loss
from serl_launcher.learner.learner import Learner
from serl_launcher.policies.base import PolicyInput
from serl_launcher.replay.learning import LearningBatch

WIDE, ROBOT, EXECUTED = 7, 2, 2


def make(algo):
    cfg = tiny_config(f"{algo}_pi0", rollout__execute_horizon=EXECUTED)
    cfg.policy = OmegaConf.load(ROOT / "config" / "policy" / "groot_tiny.yaml")
    cfg.policy.action_horizon = HORIZON
    cfg.policy.size.update({"image_size": 32, "max_action_dim": WIDE, "max_state_dim": 6})
    cfg.policy.seed = 0
    if "critics" in cfg.algo.agent:
        cfg.algo.agent.update({"warmup_steps": 0, "critics": 2, "widths": [16]})
    if "actor_period" in cfg.algo.agent:
        cfg.algo.agent.actor_period = 1
    torch.manual_seed(0)
    policy = build_policy(cfg, SPEC)
    assert (policy.action_dim, policy.robot_dim) == (WIDE, ROBOT)
    return cfg, policy, build_agent(cfg, policy, SPEC)


def prefix_of(policy, b=3):
    batch = random_batch(b)
    with torch.no_grad():
        return policy.encode(PolicyInput(batch.images, batch.state, [SPEC.prompt] * b))


@pytest.mark.parametrize("algo", ["sac", "dsrl"])
def test_critics_see_the_robots_dims_and_a_step_is_taken(algo):
    cfg, _, agent = make(algo)
    chunk = torch.randn(3, HORIZON, WIDE)
    assert agent.executed(chunk).shape == (3, EXECUTED, ROBOT)
    labels = agent.labels(random_transitions(3).action, torch.device("cpu"))
    assert labels.shape == (3, EXECUTED, ROBOT)
    optimizers = {name: instantiate(node, _partial_=True) for name, node in cfg.algo.optimizers.items()}
    learner = Learner(
        agent, lambda p: torch.optim.AdamW(p, lr=1e-3), Accelerator(cpu=True), max_grad_norm=1.0, ema_decay=0.5,
        optimizers=optimizers,
    )  # fmt: skip
    for mode in ("train", "online"):
        learner.begin_stage(mode)
        for k in range(2):
            metrics = learner.step(LearningBatch(random_batch(seed=k), random_transitions(seed=k)), 1.0)
    assert all(np.isfinite(value) for value in metrics.values())
    assert {"sac": "losses/actor", "dsrl": "losses/noise_actor"}[algo] in metrics


def test_sac_counts_the_density_of_the_robots_dims_alone():
    """With the velocity held, noise in padded dims changes nothing that is counted."""
    _, policy, agent = make("sac")
    prefix = prefix_of(policy)
    noise, step_noise = agent.draw(3, prefix)
    log_std = agent.noise_scale(policy.features(prefix))
    assert log_std.shape == (agent.settings.flow_steps, 3, 1, ROBOT)
    other = step_noise.clone()
    other[..., ROBOT:] += 5
    with torch.no_grad():
        first, second = (agent.path(prefix, noise, drawn, log_std) for drawn in (step_noise, other))
    assert torch.equal(first.log_prob, second.log_prob)
    assert torch.equal(first.chunk, second.chunk)


def test_imitation_ignores_what_the_model_says_of_padding():
    """The decoder's padded columns get no gradient."""
    _, policy, _ = make("reject_sampling")
    imitation_loss(policy, random_batch(), 2)[0].backward()
    gradient = policy.core.action_head.action_decoder.layer2.W.grad
    assert torch.count_nonzero(gradient[..., ROBOT:]) == 0
    assert torch.count_nonzero(gradient[0, :, :ROBOT]) > 0
