"""Build a GR00T: at random where that is asked for by name, else from a checkpoint, strictly.

`build_groot` (N1.7) is named by `_target_` in config/policy/groot_*.yaml; groot_n1_5.build and groot_n1_6.build call
`build` with what their release has of its own. `meta_groot` beside it makes the same policy of shapes alone;
policies.estimate finds it by that name.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from serl_launcher.policies.base import FlowPolicy
from serl_launcher.policies.checkpoint import Checkpoint, CheckpointError, check_init
from serl_launcher.policies.groot.assets import GrootAssets, read_assets
from serl_launcher.policies.groot.checkpoint import build_core, prefix_of
from serl_launcher.policies.groot.head import NEW_EMBODIMENT, GrootFlowPolicy, Inputs
from serl_launcher.policies.groot.inputs import QwenInputs, has_processor
from serl_launcher.policies.groot.trainable import flags_of, put_groot_adapters
from serl_launcher.policies.loading import load_core
from serl_launcher.policies.normalise import as_trained
from serl_launcher.policies.precision import hold
from serl_launcher.policies.relative import check_measured, has_ranges
from serl_transport.contract.specs import TaskSpec

log = logging.getLogger("policy")


@dataclass(frozen=True, slots=True)
class Release:
    """What one release of GR00T has of its own."""

    head: type[GrootFlowPolicy]
    read_assets: Callable[..., Any]  # arguments and attributes as groot.assets.read_assets
    build_core: Callable[[Checkpoint], nn.Module]
    prefix_of: Callable[[Checkpoint], str]
    inputs: Callable[..., Inputs]  # (processor, found, assets, core, size, cameras); found, assets: None at random
    ticks: int  # of a chunk
    unread: tuple[str, ...] = ()  # what names of tensors begin with that a file may have and no action depends on


def release_of(target: str) -> Release:
    """Of a policy's `_target_`: `<module>.build_groot…`, whose module has it as RELEASE."""
    return import_module(target.rpartition(".")[0]).RELEASE


def build_groot(*given: Any, **named: Any) -> GrootFlowPolicy:
    """A GR00T N1.7, as `build`."""
    return build(RELEASE, *given, **named)


def build(
    release: Release,
    name: str,
    spec: TaskSpec,
    init: str,
    seed: int,
    action_horizon: int | None,
    size: Callable,
    embodiment: int = 0,
    dropout: bool = False,
    train: str | None = None,
    lora_rank: int = 16,
    tune: dict[str, bool] | None = None,
    checkpoint: str | None = None,
    embodiment_tag: str = NEW_EMBODIMENT,
    processor: str | None = None,
    cameras: Mapping[str, str] | None = None,
    statistics: str | None = None,
    precision: str = "float32",
    trained_on: Mapping[str, Any] | None = None,
    relative: Mapping[str, Any] | None = None,
    **options: Any,
) -> GrootFlowPolicy:
    """A GR00T policy for one task; arguments as `build_pi0`. tune: GR00T's flags without `tune_`, default all True,
    where `train` does not say it: full, expert or lora.

    init `checkpoint`: weights, units and the slot of `embodiment_tag` from NVIDIA's layout or LeRobot's `groot` type;
    processor: folder or hub name of the backbone's tokenizer and image processor, the checkpoint's own when None;
    statistics: a LeRobot dataset whose statistics a new embodiment starts with, where the checkpoint has none of it;
    relative: which actions of a new embodiment, or of random weights, are relative to the state (policies.relative);
    options: attention, checkpointing, mask_padding, compile of the head. Raises ValueError in the user's words.
    """
    require_diffusers()
    check_init(init, checkpoint, action_horizon)
    check_measured(relative)
    flags = flags_of(train, tune)
    options |= {"precision": precision, "embodiment_tag": embodiment_tag, "dropout": dropout}
    if init == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            order, units = as_trained(spec, trained_on, relative)
            core = size.build(size.config_fields(spec, action_horizon))
        inputs = release.inputs(processor, None, None, core, size, order) if processor else size.inputs(order)
        policy = release.head(core, spec, inputs, units, embodiment, **options)
        policy.tune(**flags)
        return adapted(policy, train, lora_rank, seed, precision)
    found = Checkpoint.find(checkpoint)
    assets = release.read_assets(found, embodiment_tag, spec, dict(cameras or {}), statistics, relative)
    core = release.build_core(found)
    have = core.config.action_horizon
    if action_horizon not in (None, have):
        raise CheckpointError(f"policy.action_horizon={action_horizon}: the checkpoint's chunk is {have}")
    inputs = release.inputs(processor, found, assets, core, size, assets.cameras)
    options |= {"clip": assets.clip, "valid_horizon": min(assets.horizon or have, have)}
    policy = release.head(core, spec, inputs, assets.units, assets.slot, **options)
    policy.tune(**flags)
    policy.load_report = load_core(policy, found, release.prefix_of(found), policy.aliases, precision, release.unread)
    policy.checkpoint, policy.described = found, assets.described
    policy.train(policy.training)
    log.info("%s", policy.load_report)
    return adapted(policy, train, lora_rank, seed, precision)


def adapted[P: FlowPolicy](policy: P, train: str | None, rank: int, seed: int, precision: str) -> P:
    """A GR00T with adapters where it trains by them, held in its precision; they are no tensors of a checkpoint."""
    if train == "lora":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            put_groot_adapters(policy.core, rank)
    hold(policy, precision, masters=True)
    return policy


def _inputs(
    processor: str | None,
    found: Checkpoint | None,
    assets: GrootAssets | None,
    core: Any,
    size: Any,
    cameras: tuple[str, ...],
) -> Inputs:
    """The checkpoint's processor: the one that is named, in or beside the folder, of the backbone; at the tiny size
    hashed words where no file is at hand."""
    if found is None:
        return QwenInputs(processor, cameras, size.geometry())
    places = [found.folder / "processor", found.folder, Path(assets.processor or "processor")]
    source = processor or next((str(folder) for folder in places if has_processor(folder)), None)
    if source is None and size.hashed:
        return size.inputs(cameras)
    source = source or assets.processor or core.config.model_name
    return QwenInputs(source, cameras, assets.geometry, assets.formalize, assets.frames)


RELEASE = Release(GrootFlowPolicy, read_assets, build_core, prefix_of, _inputs, ticks=40)


def meta_groot(cfg: Mapping[str, Any], spec: TaskSpec, size: Any) -> tuple[GrootFlowPolicy, str]:
    """A GR00T N1.7, as `meta`."""
    return meta(RELEASE, cfg, spec, size)


def meta(release: Release, cfg: Mapping[str, Any], spec: TaskSpec, size: Any) -> tuple[GrootFlowPolicy, str]:
    """The policy of a config on the meta device (shapes without numbers), and the statistics that data must have.

    Of a checkpoint only its configuration and statistics are read. Raises ValueError in the user's words.
    """
    require_diffusers()
    flags, mode, cameras, valid = flags_of(cfg.get("train"), cfg.get("tune")), "MIN_MAX", tuple(spec.cameras), None
    if cfg.get("checkpoint"):
        found = Checkpoint.find(cfg["checkpoint"])
        core = release.build_core(found)
        wanted = cfg.get("relative")  # a cost does not depend on ranges that are still to be measured
        wanted = wanted if wanted is not None and has_ranges(wanted) else None
        tag, mapping = cfg.get("embodiment_tag") or NEW_EMBODIMENT, dict(cfg.get("cameras") or {})
        assets = release.read_assets(found, tag, spec, mapping, cfg.get("statistics"), wanted)
        mode, cameras, valid = assets.mode, assets.cameras, assets.horizon
    else:
        with torch.device("meta"):
            core = size.build(size.config_fields(spec, cfg.get("action_horizon") or release.ticks))
    with torch.device("meta"):
        precision = cfg.get("precision") or "float32"
        policy = release.head(core, spec, size.inputs(cameras), valid_horizon=valid, precision=precision)
    policy.checkpointing = bool(cfg.get("checkpointing"))
    policy.tune(**flags)
    if cfg.get("train") == "lora":
        put_groot_adapters(policy.core, cfg.get("lora_rank") or 16)
    return policy, mode


def require_diffusers() -> None:
    """Raise ValueError that names the command when the package behind GR00T's action head is missing."""
    if importlib.util.find_spec("diffusers") is None or importlib.util.find_spec("tree") is None:
        raise ValueError("policy: GR00T needs the packages diffusers and dm-tree: pip install 'lerobot[groot]==0.6.1'")
