"""Policy and agent from a run's config: the one place that knows which of the two an `algo` yaml extends.

The trainer and the policy server both call `build_policy`, so that what is trained is what is served.
"""

from __future__ import annotations

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from serl_launcher.agents.base import Agent
from serl_launcher.policies.base import FlowPolicy, PolicyInput
from serl_transport.contract.specs import TaskSpec


def build_policy(cfg: DictConfig, spec: TaskSpec) -> FlowPolicy:
    """`policy`, extended by `algo.served` where the algorithm trains a part beside the flow."""
    policy = instantiate(cfg.policy, spec=spec)
    extension = cfg.get("algo") and cfg.algo.get("served")
    if not extension:
        return policy
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        return instantiate(extension, policy=policy, feature_dim=feature_dim(policy, spec))


def build_agent(cfg: DictConfig, policy: FlowPolicy, spec: TaskSpec) -> Agent:
    """`algo.agent`; one that learns values is told the size of the features and the executed horizon."""
    further = {}
    if cfg.algo.get("transitions"):
        further = {"feature_dim": feature_dim(policy, spec), "horizon": cfg.rollout.execute_horizon}
    return instantiate(cfg.algo.agent, policy=policy, prompt=spec.prompt, **further)


@torch.no_grad()
def feature_dim(policy: FlowPolicy, spec: TaskSpec) -> int:
    """f of `policy.features`, asked with one blank observation."""
    images = {camera: np.zeros((1, h, w, 3), np.uint8) for camera, (h, w) in spec.cameras.items()}
    state = np.zeros((1, len(spec.state_names)), np.float32)
    return policy.features(policy.encode(PolicyInput(images, state, [spec.prompt]))).shape[-1]
