"""The view that an algorithm samples from, out of a run's config. Called by the trainer when it starts."""

from hydra.utils import instantiate
from omegaconf import DictConfig

from serl_launcher.replay.verdicts import VerdictLedger, rule_text
from serl_launcher.replay.views import ChunkView, View, ViewSources
from serl_launcher.run.paths import RunPaths
from serl_transport.contract.specs import TaskSpec


def build_view(cfg: DictConfig, paths: RunPaths, spec: TaskSpec, action_horizon: int) -> tuple[View, VerdictLedger]:
    """The view that `algo.view` names, over what `algo.rule` accepts, and the ledger of the rule's verdicts."""
    algo = cfg.algo
    rule, threshold = instantiate(algo.rule), instantiate(algo.threshold)
    ledger = VerdictLedger(paths.acceptance, rule_text(rule, threshold))
    accepted = ChunkView(
        rule,
        spec,
        action_horizon,
        threshold=threshold,
        weights=algo.source_weights,
        on_verdict=ledger.note,
        history=ledger.returns,
    )
    sources = ViewSources(spec, accepted, action_horizon, cfg.rollout.execute_horizon)
    return instantiate(algo.view, sources), ledger
