"""The trainer of a run's config: the one place where the learner's room reads `cfg`. Called by the role's entry.

policy ─▶ agent ─▶ learner ─┬─▶ publisher ─▶ checkpoints ─▶ faults, rollback guard ─▶ Trainer
ring ─▶ view ─▶ data ───────┴────────────────────────────────────────────────────────┘
"""

import logging
from functools import partial

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from serl_launcher.agents.build import build_agent, build_policy
from serl_launcher.learner.augment import Augment
from serl_launcher.learner.data import Heard, TrainingData
from serl_launcher.learner.engines import make_accelerator, make_engine
from serl_launcher.learner.faults import Faults
from serl_launcher.learner.guard import EvaluationWatch, RollbackGuard, evaluation_goals
from serl_launcher.learner.learner import Learner
from serl_launcher.learner.operated import LiveRun, Operated, only
from serl_launcher.learner.profile import Profile, be_deterministic
from serl_launcher.learner.publisher import Publisher
from serl_launcher.learner.ranks import Ranks
from serl_launcher.learner.resume import TrainerCheckpoints
from serl_launcher.learner.stage import StageProgress, StageSettings
from serl_launcher.learner.step_log import StepLog
from serl_launcher.learner.together import Follower, Together, Words, told
from serl_launcher.learner.trainer import Trainer
from serl_launcher.policies.base import FlowPolicy
from serl_launcher.policies.parameter_table import parameter_table
from serl_launcher.replay.followed_ring import FollowedRing
from serl_launcher.replay.relabelled import Relabelled
from serl_launcher.replay.ring import RingReader
from serl_launcher.replay.rulebook import RuleBook, judge_journal
from serl_launcher.replay.verdicts import VerdictLedger, rule_text
from serl_launcher.replay.views import ChunkView, View, ViewSources
from serl_launcher.run.acts import ActsLedger
from serl_launcher.run.config import task_spec
from serl_launcher.run.first_host import FirstHost
from serl_launcher.run.internal import InternalClient
from serl_launcher.run.paths import RunPaths
from serl_launcher.telemetry.metrics import MetricsWriter
from serl_transport.contract.specs import TaskSpec

log = logging.getLogger("trainer")


def build_trainer(cfg: DictConfig, paths: RunPaths, gateway: InternalClient | None) -> "Trainer | Follower":
    """A trainer that goes on from what it finds in the run folder, by the config and what people changed of it.

    Of several ranks 0 is the trainer, and the others are its followers, who need no gateway.
    Raises ValueError, FileNotFoundError or Hydra's InstantiationException for a mistake in config or checkpoint.
    """
    own = cfg
    make_accelerator(cfg)  # opens the devices' group, before the hosts' one
    ranks = Ranks.joined()
    if ranks.first:
        run, words = LiveRun(ActsLedger(paths.root), cfg), Relabelled(paths.root)
        cfg, said = run.config, words
        if ranks.world > 1:
            ranks.agree([OmegaConf.to_container(cfg, resolve=True), told(words.words)])
    else:
        config, heard = ranks.agree()
        cfg, said = OmegaConf.create(config), Words(heard)
    settings = cfg.trainer
    torch.set_num_threads(settings.threads)
    torch.manual_seed(cfg.seed)
    if settings.deterministic:
        be_deterministic()
    rng = np.random.default_rng(cfg.seed)
    spec = task_spec(cfg)
    policy = build_policy(cfg, spec)
    learner = build_learner(cfg, policy, spec)
    make_view = partial(
        build_view, paths=paths, spec=spec, action_horizon=policy.action_horizon, words=said, first=ranks.first
    )
    augment = Augment(**settings.augment)
    open_ring = partial(followed, paths=paths, patience_s=own.follower.patience_s) if ranks.host else RingReader
    first_host = FirstHost(own, paths) if ranks.host else None
    data = TrainingData(
        *make_view(cfg), rng, cfg.algo.min_accepted, learner.prepare, learner.device, augment, ranks, open_ring
    )
    stages = StageProgress(only(settings, StageSettings))
    publisher = Publisher(paths.params, learner, policy, name=cfg.policy.name, keep=settings.keep_params)
    keep = settings.keep_checkpoints, settings.keep_checkpoints_every
    checkpoints = TrainerCheckpoints(paths.checkpoints, learner, stages, publisher, rng, *keep, settings.batch_size)
    steps = settings.profile * settings.profile_steps
    profile = Profile(paths.root / "profile", after=settings.profile_after, steps=steps, rank=ranks.rank)
    heard_by = None if ranks.first else said
    together = Together(ranks, learner, data, checkpoints, make_view, heard_by, first_host, profile)
    if not ranks.first:
        name = ranks.agree()  # rank 0 has resumed, and mended what a kill left aside
        if first_host:
            first_host.resume_from(name)
        checkpoints.resume(cfg.checkpoint_path)
        return Follower(together)
    log.info("parameters of %s\n%s", cfg.policy.name, parameter_table(policy))
    ranks.agree(checkpoints.resume(cfg.checkpoint_path))
    watch = EvaluationWatch(paths.params, evaluation_goals(cfg.schedule.stages), settings.rollback_margin)
    return Trainer(
        gateway,
        together,
        stages,
        publisher,
        checkpoints,
        Faults(checkpoints, publisher, together),
        RollbackGuard(watch, together, publisher, checkpoints),
        StepLog(MetricsWriter(paths, cfg), settings.log_period),
        Operated(run, words, data, stages, watch, together),
    )


def followed(ring: str, paths: RunPaths, patience_s: float) -> FollowedRing:
    """The ring of another host than the first, whatever the first one's is called."""
    return FollowedRing(paths.status, patience_s)


def build_view(
    cfg: DictConfig, paths: RunPaths, spec: TaskSpec, action_horizon: int, words: Relabelled | Words, first: bool = True
) -> tuple[View, VerdictLedger | Heard]:
    """The view that `algo.view` names, over what `algo.rule` and people accept, and the ledger of their verdicts, which
    the first rank keeps."""
    algo = cfg.algo
    rule, threshold = instantiate(algo.rule), instantiate(algo.threshold)
    ledger = _ledger(cfg, paths, spec) if first else Heard()
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


def _ledger(cfg: DictConfig, paths: RunPaths, spec: TaskSpec) -> VerdictLedger:
    rule, threshold = instantiate(cfg.algo.rule), instantiate(cfg.algo.threshold)
    ledger = VerdictLedger(paths.acceptance, rule_text(rule, threshold))
    if ledger.incomplete:
        log.warning("%s has lost lines: every episode of the journal is judged anew", paths.acceptance)
        for verdict in judge_journal(RuleBook(rule, spec, threshold), paths.root, spec):
            ledger.note(verdict)
    return ledger


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
