"""Policy and agent from a run's config: the one place that knows which of the two an `algo` yaml extends.

The trainer and the policy server both call `build_policy`, so that what is trained is what is served.
"""

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from serl_launcher.agents.base import Agent, feature_dim
from serl_launcher.policies.base import FlowPolicy
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
    """The agent of the settings that `algo.agent` names. Hydra refuses a setting that is unknown or missing."""
    settings = instantiate(cfg.algo.agent, _convert_="all")
    return settings.build(policy, spec, cfg.rollout.execute_horizon)
