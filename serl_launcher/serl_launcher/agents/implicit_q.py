"""Values learned from what was done: they weigh what is imitated, or choose among chunks when served.

    critic    train stage and warm-up: the return that followed                then: r + γ^k V(s')
    value     the expectile of min Q̄(s, a) over the chunks of the data
    flow      flow matching on accepted chunks; `algo=advantage_weighted_*` weighs each by exp(A / β), A = min Q̄ − V
    served    `algo=best_of_n_*`: of n chunks the one of most value (agents.choosing); else the plain flow

docs/algorithms/advantage_weighted.md and best_of_n.md. No gradient of a value enters the flow, so imitation cannot
drown it, and no chunk is sampled in training, so a step costs little more than imitation's.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from serl_launcher.agents.base import ParameterGroup, feature_dim
from serl_launcher.agents.flow_matching import imitation_loss
from serl_launcher.agents.observations import next_observation, observation
from serl_launcher.agents.values import ValueAgent, ValueSettings, critic_metrics
from serl_launcher.critics.ensemble import ChunkCritic
from serl_launcher.critics.losses import expectile_loss, td_loss
from serl_launcher.policies.base import FlowPolicy, Prefix, trainable
from serl_launcher.policies.transfer import to_device
from serl_launcher.replay.learning import LearningBatch
from serl_launcher.replay.transitions import TransitionBatch
from serl_launcher.replay.views import ChunkBatch
from serl_transport.contract.specs import TaskSpec


@dataclass(frozen=True, kw_only=True)
class ImplicitQSettings(ValueSettings):
    """`algo.agent` of advantage_weighted_* and best_of_n_*, whose yamls have the values."""

    expectile: float  # τ of V: 0.5 is the mean over the data's chunks, towards 1 their best
    advantage_scale: float | None  # β, of the return: a chunk worth so much less weighs 1/e; None: nothing is weighed
    most_weight: float  # a weight is cut here

    def __post_init__(self) -> None:
        if not 0 < self.expectile < 1:
            raise ValueError(f"algo.agent.expectile: expected above 0 and below 1, got {self.expectile!r}")
        for name in ("advantage_scale", "most_weight"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"algo.agent.{name}: expected a number above 0, got {value!r}")

    def build(self, policy: FlowPolicy, task: TaskSpec, horizon: int) -> "ImplicitQAgent":
        return ImplicitQAgent(policy, self, feature_dim=feature_dim(policy, task), horizon=horizon)


class ImplicitQAgent(ValueAgent):
    """Critics of IQL (Kostrikov et al., 2110.06169) on a flow: weights of AWR (Peng et al., 1910.00177), or the choice
    of IDQL (Hansen-Estruch et al., 2304.10573).

    policy: with a `chooser` module (agents.choosing.add_chooser) its critics are trained and served.
    """

    added_to_policy = ("chooser.",)
    """Prefixes of parameters that a plain policy's checkpoint lacks; they then keep their initial values."""
    settings: ImplicitQSettings

    def __init__(self, policy: FlowPolicy, settings: ImplicitQSettings, *, feature_dim: int, horizon: int) -> None:
        self._chooses = hasattr(policy, "chooser")
        critic = policy.chooser.critic if self._chooses else None
        if critic is not None and critic.horizon != horizon:
            raise ValueError(f"algo.served.horizon: expected rollout.execute_horizon {horizon}, got {critic.horizon}")
        super().__init__(policy, settings, feature_dim=feature_dim, horizon=horizon, critic=critic)
        self.value = ChunkCritic(feature_dim, 0, policy.robot_dim, 1, settings.widths)  # of a chunk of no ticks

    def forward(self, batch: LearningBatch, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses of `critic`, and of `policy` where something is accepted, and metrics."""
        losses = {}
        losses["critic"], metrics = self.critic_loss(batch.transitions)
        metrics["batch/transition_demo_share"] = torch.as_tensor(batch.transitions.demo).float().mean()
        if batch.imitation is not None:
            weighs = self.warm and self.settings.advantage_scale is not None
            weigh = partial(self.weights, batch.imitation, metrics) if weighs else None
            losses["policy"], more = imitation_loss(self.policy, batch.imitation, self.settings.noise_samples, weigh)
            metrics |= more
        return losses, metrics

    def critic_loss(self, batch: TransitionBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error of Q to the return that followed, or to r + γ^k V(s') once warm, and V's expectile loss."""
        prefix = self.observe(observation(batch))
        features, device = self.policy.features(prefix), prefix.state.device
        labels, is_pad = self.labels(batch.action, device, prefix.anchor), to_device(batch.is_pad, device)
        with torch.no_grad():
            target = self.backup(batch) if self.warm else to_device(batch.return_to_go, device)
            worth = self.target(features, labels, is_pad).min(0).values
        q, v = self.critic(features, labels, is_pad), self.of_state(features)
        loss = td_loss(q, target)
        metrics = critic_metrics(loss, q, target, batch.bootstrap) | {"critic/value": v.detach().mean()}
        return loss + expectile_loss(v, worth, self.settings.expectile), metrics

    def backup(self, batch: TransitionBatch) -> Tensor:
        """y = r + γ^k V(s'): float32[b], without gradient."""
        features = self.policy.features(self.observe(next_observation(batch)))
        return self.target_of(batch, self.of_state(features))

    def of_state(self, features: Tensor) -> Tensor:
        """V: float32[b]. features: float32[b, f]."""
        return self.value(features, features.new_zeros(len(features), 0, self.value.action_dim)).squeeze(0)

    @torch.no_grad()
    def weights(self, batch: ChunkBatch, metrics: dict[str, Tensor], prefix: Prefix) -> Tensor:
        """min(exp(A / β), most) of accepted chunks: float32[b]. metrics: is told how they lie.

        The critics see the ticks that are executed; one that is no label counts as padding, as in a transition.
        """
        device, h = prefix.state.device, self.horizon
        features = self.policy.features(prefix)
        labels = self.labels(batch.action, device, prefix.anchor)[:, :h]
        q = self.target(features, labels, to_device(batch.is_pad, device)[:, :h]).min(0).values
        advantage = q - self.of_state(features)
        weight = (advantage / self.settings.advantage_scale).exp().clamp(max=self.settings.most_weight)
        metrics["advantage/mean"], metrics["advantage/std"] = advantage.mean(), advantage.std(correction=0)
        metrics["advantage/weight"] = weight.mean()
        metrics["advantage/effective"] = weight.sum().square() / (len(weight) * weight.square().sum()).clamp(min=1e-12)
        return weight

    def groups(self) -> dict[str, ParameterGroup]:
        flow = {n: p for n, p in trainable(self.policy).items() if not n.startswith(self.added_to_policy)}
        name = "chooser.critic" if self._chooses else "critic"
        critics = dict(self.critic.named_parameters(name)) | dict(self.value.named_parameters("value"))
        return {"policy": ParameterGroup(flow), "critic": ParameterGroup(critics, scheduled=False)}

    @torch.no_grad()
    def after_step(self, taken: Tensor) -> None:
        super().after_step(taken)
        if self._chooses and self.online:
            # Opened once the critic is warm; served as soon as the published average follows.
            self.policy.chooser.gate.fill_(float(int(self.online_steps) > self.settings.warmup_steps))
