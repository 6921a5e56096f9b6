"""The view that an algorithm samples from, out of a run's config. Called by the trainer when it starts."""

from __future__ import annotations

from hydra.utils import instantiate
from omegaconf import DictConfig

from serl_launcher.replay.learning import LearningView
from serl_launcher.replay.transitions import TransitionView
from serl_launcher.replay.verdicts import VerdictLedger, rule_text
from serl_launcher.replay.views import ChunkView
from serl_launcher.run.paths import RunPaths
from serl_transport.contract.specs import TaskSpec


def build_view(
    cfg: DictConfig, paths: RunPaths, spec: TaskSpec, action_horizon: int
) -> tuple[ChunkView | LearningView, VerdictLedger]:
    """The acceptance view of `algo`, with transitions beside it where the algorithm learns values, and its verdicts."""
    algo, rule = cfg.algo, instantiate(cfg.algo.rule)
    threshold = instantiate(algo.threshold) if algo.get("threshold") else None
    ledger = VerdictLedger(paths.acceptance, rule_text(rule, threshold))
    imitation = ChunkView(
        rule,
        spec,
        action_horizon,
        threshold=threshold,
        weights=algo.get("source_weights"),
        on_verdict=ledger.note,
        history=ledger.returns,
    )
    if not algo.get("transitions"):
        return imitation, ledger
    settings = algo.transitions
    transitions = TransitionView(spec, cfg.rollout.execute_horizon, settings.gamma, settings.demo_share)
    return LearningView(imitation, transitions, settings.min_online), ledger
