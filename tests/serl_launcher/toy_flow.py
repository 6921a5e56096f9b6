"""A flow policy without images, for tests whose answer is known: velocity is a small network of (state, x, t)."""

from __future__ import annotations

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from serl_launcher.learner.learner import Learner
from serl_launcher.policies.base import FlowPolicy, PolicyInput, Prefix
from serl_launcher.replay.learning import LearningBatch
from serl_launcher.replay.transitions import TransitionBatch
from serl_launcher.replay.views import ChunkBatch


class ToyFlow(FlowPolicy):
    """No library's core; features are the state itself."""

    def __init__(self, state_dim: int = 1, ah: int = 1, ad: int = 1, width: int = 32) -> None:
        nn.Module.__init__(self)
        self.action_horizon, self.action_dim, self.robot_dim = ah, ad, ad
        self.anchors, self.poses = None, ()
        flat = ah * ad
        self.net = nn.Sequential(
            nn.Linear(state_dim + flat + 1, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, flat),
        )

    def encode(self, observation: PolicyInput, features: bool = True) -> Prefix:
        state = torch.as_tensor(observation.state)
        empty = torch.zeros(len(state), 0)
        return Prefix([], empty.bool(), empty[..., None], state)

    def velocity(self, prefix: Prefix, x_t: Tensor, t: Tensor) -> Tensor:
        return self.net(torch.cat([prefix.state, x_t.flatten(1), t[:, None]], -1)).view_as(x_t)

    def features(self, prefix: Prefix) -> Tensor:
        return prefix.state

    def normalise_actions(self, chunk: Tensor, anchor: Tensor | None = None) -> Tensor:
        return chunk

    def physical_actions(self, chunk: Tensor, anchor: Tensor | None = None) -> Tensor:
        return chunk.clamp(-1, 1)


@torch.no_grad()
def take_average(learner) -> None:
    """The averaged parameters, which are what is served, in the place of the trained ones."""
    for name, parameter in learner.agent.trainable_state().items():
        parameter.copy_(learner.averaged[name])


def transitions(state, action, reward, next_state, discount, bootstrap) -> TransitionBatch:
    """A batch without images from float arrays [b, s], [b, h, ad], [b], [b, s], [b], [b]."""
    b, h = action.shape[:2]
    return TransitionBatch(
        images={},
        state=np.asarray(state, np.float32),
        action=np.asarray(action, np.float32),
        is_pad=np.zeros((b, h), bool),
        reward=np.asarray(reward, np.float32),
        discount=np.asarray(discount, np.float32),
        bootstrap=np.asarray(bootstrap, bool),
        next_images={},
        next_state=np.asarray(next_state, np.float32),
        return_to_go=np.asarray(reward, np.float32),
        value_lower_bound=np.asarray(reward, np.float32),
        demo=np.zeros(b, bool),
        prompts=[""] * b,
    )


def chunks(state, action) -> ChunkBatch:
    """Accepted chunks without images."""
    b, h = action.shape[:2]
    return ChunkBatch(
        images={},
        state=np.asarray(state, np.float32),
        action=np.asarray(action, np.float32),
        is_pad=np.zeros((b, h), bool),
        demo=np.zeros(b, bool),
        operator=np.zeros(b, bool),
        weight=np.ones(b, np.float32),
        prompts=[""] * b,
    )


def learn_left_and_right(agent: nn.Module) -> None:
    """Online steps of two modes, left and right, of which only right is worth something; what is served is in place."""
    rng = np.random.default_rng(0)
    learner = Learner(
        agent, lambda p: torch.optim.Adam(p, lr=3e-3), Accelerator(cpu=True), max_grad_norm=10.0, ema_decay=0.9
    )
    learner.begin_stage("online")
    for _ in range(250):
        side = rng.choice([-0.5, 0.5], (64, 1, 1)).repeat(2, 1) + rng.normal(0, 0.05, (64, 2, 1))
        state, reward = np.zeros((64, 1)), (side.mean((1, 2)) > 0).astype(np.float32)
        batch = transitions(state, side, reward, state, np.ones(64), np.zeros(64))
        learner.step(LearningBatch(chunks(state, side), batch), 1.0)
    take_average(learner)
