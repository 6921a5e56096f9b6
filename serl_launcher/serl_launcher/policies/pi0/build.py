"""Build a PI0 or PI0.5: at random where that is asked for by name, else from a checkpoint, strictly.

`build_pi0` and `build_pi05` are named by `_target_` in config/policy/. `meta_pi0` and `meta_pi05` beside them make the
same policy of shapes alone; policies.estimate finds them by that name.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from serl_launcher.policies.checkpoint import (
    PREPROCESSOR,
    Checkpoint,
    camera_order,
    check_init,
    mode_of,
    read_statistics,
    visual_features,
)
from serl_launcher.policies.loading import load_core
from serl_launcher.policies.normalise import as_trained
from serl_launcher.policies.pi0.checkpoint import ALIASES, anchors_of, read_config, tokenizer_name
from serl_launcher.policies.pi0.full import FullSize
from serl_launcher.policies.pi0.head import PI0FlowPolicy
from serl_launcher.policies.pi0.pi05 import PI05FlowPolicy
from serl_launcher.policies.pi0.tiny import TinySize
from serl_launcher.policies.pi0.trainable import freeze, set_trainable
from serl_launcher.policies.pi0.units import units_of, units_of_dataset
from serl_launcher.policies.precision import hold
from serl_launcher.policies.relative import Anchors, by_place, check_measured
from serl_launcher.policies.tokens import HubTokenizer, WordHashTokenizer
from serl_transport.contract.specs import TaskSpec

log = logging.getLogger("policy")


def build[Head: PI0FlowPolicy](
    head: type[Head],
    name: str,
    spec: TaskSpec,
    init: str,
    seed: int,
    action_horizon: int | None,
    size: FullSize | TinySize,
    *,
    checkpoint: str | None = None,
    tokenizer: str | None = None,
    cameras: Mapping[str, str] | None = None,
    train: str = "full",
    lora_rank: int = 16,
    attention: str = "eager",
    checkpointing: bool = False,
    precision: str = "float32",
    compile: str = "off",
    trained_on: Mapping[str, Any] | None = None,
    relative: Mapping[str, Any] | None = None,
    statistics: str | None = None,
) -> Head:
    """A policy of class `head` for one task; the arguments are the keys of config/policy/pi0*.yaml.

    init: `random` (weights from `seed`) or `checkpoint` (from `checkpoint`, a LeRobot folder or a hub name of the
    head's type); tokenizer: folder or hub name, the checkpoint's own when None; cameras: the task's camera -> the
    checkpoint's image feature, where names differ; train: full, expert or lora; trained_on: what random weights
    that a run has trained are known to; relative: which of their actions are relative to the state
    (normalise.as_trained); statistics: a LeRobot dataset, whose statistics (and `relative`) replace the
    checkpoint's, where a base goes on to a new robot. Raises ValueError in the user's words.
    """
    check_init(init, checkpoint, action_horizon)
    check_measured(relative)
    options = dict(attention=attention, checkpointing=checkpointing, precision=precision, compile=compile)
    if init == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            policy = _random(head, spec, action_horizon, size, tokenizer, trained_on, relative, options)
            set_trainable(policy, train, lora_rank)
        hold(policy, precision, masters=True)
        return policy
    if relative is not None and statistics is None:
        raise ValueError("policy.relative: a checkpoint says it itself, but with policy.statistics=<dataset>")
    found = Checkpoint.find(checkpoint)
    found.expect_type(head.kind)
    config = read_config(found, spec, action_horizon)
    units = units_of(found, spec) if statistics is None else units_of_dataset(found, spec, statistics, relative)
    wanted = [camera for camera in visual_features(found) if ".empty_camera_" not in camera]
    order = camera_order(found.folder, wanted, spec, dict(cameras or {}))
    words = HubTokenizer(tokenizer or tokenizer_name(found), config.tokenizer_max_length)
    with torch.device("meta"):
        core = size.build(config)
    policy = head(core, spec, words, units, cameras=order, **options)
    freeze(policy, train)
    policy.load_report = load_core(policy, found, "model.", ALIASES, precision)
    if train == "lora":  # adapters are no tensors of the checkpoint
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            set_trainable(policy, train, lora_rank)
        hold(policy, precision, masters=True)
    policy.checkpoint, policy.new_units = found, statistics is not None
    if policy.new_units:
        _say_task(core.config, found, spec)
        if relative is not None:
            _say_relative(core.config, spec, units.anchors, relative)
    log.info("%s", policy.load_report)
    return policy


def _random[Head: PI0FlowPolicy](
    head: type[Head],
    spec: TaskSpec,
    action_horizon: int | None,
    size: FullSize | TinySize,
    tokenizer: str | None,
    trained_on: Mapping[str, Any] | None,
    relative: Mapping[str, Any] | None,
    options: Mapping[str, Any],
) -> Head:
    """A policy of weights as they fall, with the task's ranges or those that a run has trained them to."""
    order, units = as_trained(spec, trained_on, relative)
    core, words = size(spec, action_horizon)
    if relative is not None:
        _say_relative(core.config, spec, units.anchors, relative)
    if tokenizer:
        words = HubTokenizer(tokenizer, core.config.tokenizer_max_length)
    return head(core, spec, words, units, cameras=order, **options)


def _say_task(config: Any, found: Checkpoint, spec: TaskSpec) -> None:
    """What an export of a base says once it has another robot's units: its dims, its modes of normalisation."""
    from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature

    dims = {
        "observation.state": (FeatureType.STATE, spec.state_names),
        "action": (FeatureType.ACTION, spec.action_names),
    }
    for features, key in ((config.input_features, "observation.state"), (config.output_features, "action")):
        features[key] = PolicyFeature(dims[key][0], (len(dims[key][1]),))
    for kind in ("STATE", "ACTION"):
        config.normalization_mapping[kind] = NormalizationMode(mode_of(found, PREPROCESSOR, kind))


def _say_relative(config: Any, spec: TaskSpec, anchors: Anchors, relative: Mapping[str, Any]) -> None:
    """In lerobot's words, for an export. ValueError where these cannot say it."""
    exclude, names = list(relative.get("exclude") or []), list(spec.action_names)
    if anchors != by_place(names, exclude, len(names)):
        raise ValueError(
            f"policy.relative: LeRobot's {config.type} subtracts the state at an action's own place, and the task's "
            f"states are {list(spec.state_names)}, its actions {names}: put them in one order"
        )
    config.use_relative_actions, config.relative_exclude_joints = True, exclude
    config.action_feature_names = names


def meta(
    head: type[PI0FlowPolicy], cfg: Mapping[str, Any], spec: TaskSpec, size: FullSize | TinySize
) -> tuple[nn.Module, str]:
    """The policy of a config on the meta device (shapes without numbers), and its mode of normalisation.

    Of a checkpoint only config.json and the processors are read. Raises ValueError in the user's words.
    """
    mode = head.statistics_mode
    if cfg.get("checkpoint"):
        found = Checkpoint.find(cfg["checkpoint"])
        found.expect_type(head.kind)
        config = read_config(found, spec, cfg.get("action_horizon"))
        mode = mode_of(found, PREPROCESSOR, "ACTION")
        if not cfg.get("statistics"):
            read_statistics(found, PREPROCESSOR, "action", "ACTION")
            anchors_of(found, spec)
    else:
        config = size.config(spec, cfg.get("action_horizon") or 50)
    with torch.device("meta"):
        words = WordHashTokenizer(300, config.tokenizer_max_length)
        precision = cfg.get("precision") or "float32"
        policy = head(size.build(config), spec, words, attention="sdpa", precision=precision)
    policy.checkpointing = bool(cfg.get("checkpointing"))
    set_trainable(policy, cfg.get("train") or "full", cfg.get("lora_rank") or 16)
    return policy, mode


build_pi0, build_pi05 = partial(build, PI0FlowPolicy), partial(build, PI05FlowPolicy)
meta_pi0, meta_pi05 = partial(meta, PI0FlowPolicy), partial(meta, PI05FlowPolicy)
