"""The trainer of a run's config: the one place where the learner's room reads `cfg`. Called by the role's entry.

policy ─▶ agent ─▶ learner ─┬─▶ publisher ─▶ checkpoints ─▶ faults, rollback guard ─▶ Trainer
ring ─▶ view ─▶ data ───────┴────────────────────────────────────────────────────────┘
"""

import logging
from functools import partial

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from serl_launcher.agents.build import build_agent, build_policy
from serl_launcher.learner.augment import Augment
from serl_launcher.learner.data import TrainingData
from serl_launcher.learner.engines import make_accelerator, make_engine
from serl_launcher.learner.faults import Faults
from serl_launcher.learner.guard import EvaluationWatch, RollbackGuard, evaluation_goals
from serl_launcher.learner.learner import Learner
from serl_launcher.learner.operated import LiveRun, Operated
from serl_launcher.learner.profile import Profile, be_deterministic
from serl_launcher.learner.publisher import Publisher
from serl_launcher.learner.resume import TrainerCheckpoints
from serl_launcher.learner.stage import StageProgress
from serl_launcher.learner.step_log import StepLog
from serl_launcher.learner.trainer import Trainer
from serl_launcher.policies.base import FlowPolicy
from serl_launcher.policies.parameter_table import parameter_table
from serl_launcher.replay.relabelled import Relabelled
from serl_launcher.replay.rulebook import RuleBook, judge_journal
from serl_launcher.replay.verdicts import VerdictLedger, rule_text
from serl_launcher.replay.views import ChunkView, View, ViewSources
from serl_launcher.run.acts import ActsLedger
from serl_launcher.run.config import task_spec
from serl_launcher.run.internal import InternalClient
from serl_launcher.run.paths import RunPaths
from serl_launcher.telemetry.metrics import MetricsWriter
from serl_transport.contract.specs import TaskSpec

log = logging.getLogger("trainer")


def build_trainer(cfg: DictConfig, paths: RunPaths, gateway: InternalClient) -> Trainer:
    """A trainer that goes on from what it finds in the run folder, by the config and what people changed of it.

    Raises ValueError, FileNotFoundError or Hydra's InstantiationException for a mistake in config or checkpoint.
    """
    run, words = LiveRun(ActsLedger(paths.root), cfg), Relabelled(paths.root)
    cfg = run.config
    settings = cfg.trainer
    torch.set_num_threads(settings.threads)
    torch.manual_seed(cfg.seed)
    if settings.deterministic:
        be_deterministic()
    rng = np.random.default_rng(cfg.seed)
    spec = task_spec(cfg)
    policy = build_policy(cfg, spec)
    learner = build_learner(cfg, policy, spec)
    make_view = partial(build_view, paths=paths, spec=spec, action_horizon=policy.action_horizon, words=words)
    augment = Augment(**settings.augment)
    data = TrainingData(*make_view(cfg), rng, cfg.algo.min_accepted, learner.prepare, learner.device, augment)
    stages = StageProgress(run.stages)
    publisher = Publisher(paths.params, learner, policy, name=cfg.policy.name, keep=settings.keep_params)
    checkpoints = TrainerCheckpoints(paths.checkpoints, learner, stages, publisher, rng, settings.keep_checkpoints)
    log.info("parameters of %s\n%s", cfg.policy.name, parameter_table(policy))
    checkpoints.resume(cfg.checkpoint_path)
    watch = EvaluationWatch(paths.params, evaluation_goals(cfg.schedule.stages), settings.rollback_margin)
    return Trainer(
        gateway,
        learner,
        data,
        stages,
        publisher,
        checkpoints,
        Faults(checkpoints, publisher),
        RollbackGuard(watch, learner, publisher, checkpoints),
        StepLog(MetricsWriter(paths, cfg), settings.log_period),
        Operated(run, words, data, stages, watch, learner, make_view),
        Profile(paths.root / "profile", after=settings.profile_after, steps=settings.profile * settings.profile_steps),
    )


def build_view(
    cfg: DictConfig, paths: RunPaths, spec: TaskSpec, action_horizon: int, words: Relabelled
) -> tuple[View, VerdictLedger]:
    """The view that `algo.view` names, over what `algo.rule` and people accept, and the ledger of their verdicts."""
    algo = cfg.algo
    rule, threshold = instantiate(algo.rule), instantiate(algo.threshold)
    ledger = VerdictLedger(paths.acceptance, rule_text(rule, threshold))
    if ledger.incomplete:
        log.warning("%s has lost lines: every episode of the journal is judged anew", paths.acceptance)
        for verdict in judge_journal(RuleBook(rule, spec, instantiate(algo.threshold)), paths.root, spec):
            ledger.note(verdict)
    accepted = ChunkView(
        rule,
        spec,
        action_horizon,
        threshold=threshold,
        weights=algo.source_weights,
        on_verdict=ledger.note,
        history=ledger.returns,
        words=words.word_of,
    )
    sources = ViewSources(spec, accepted, action_horizon, cfg.rollout.execute_horizon, words.word_of)
    return instantiate(algo.view, sources), ledger


def build_learner(cfg: DictConfig, policy: FlowPolicy, spec: TaskSpec) -> Learner:
    """The agent of `algo` on `trainer.device`, with the optimizers that `trainer` and `algo` name."""
    accelerator = make_accelerator(cfg)
    optimizer = partial(instantiate, _partial_=True)
    return Learner(
        build_agent(cfg, policy, spec).to(accelerator.device),
        optimizer(cfg.trainer.optimizer),
        accelerator,
        max_grad_norm=cfg.trainer.max_grad_norm,
        ema_decay=cfg.trainer.ema_decay,
        optimizers={name: optimizer(row) for name, row in (cfg.algo.get("optimizers") or {}).items()},
        engine=make_engine(cfg, accelerator),
    )
