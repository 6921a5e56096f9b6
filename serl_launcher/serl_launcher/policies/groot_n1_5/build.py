"""Build a GR00T N1.5: at random where that is asked for by name, else from a checkpoint, strictly.

`build_groot_n1_5` is named by `_target_` in config/policy/groot_n1_5*.yaml. `meta_groot_n1_5` beside it makes the same
policy of shapes alone; policies.estimate finds it by that name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from serl_launcher.policies.checkpoint import Checkpoint, CheckpointError, check_init
from serl_launcher.policies.groot.build import adapted, require_diffusers
from serl_launcher.policies.groot.head import NEW_EMBODIMENT, Inputs
from serl_launcher.policies.groot.trainable import flags_of, put_groot_adapters
from serl_launcher.policies.groot_n1_5.checkpoint import ALIASES, POOLING, N15Assets, build_core, prefix_of, read_assets
from serl_launcher.policies.groot_n1_5.core import N15Core
from serl_launcher.policies.groot_n1_5.head import GrootN15FlowPolicy
from serl_launcher.policies.groot_n1_5.inputs import PROCESSOR, EagleInputs, Pictures
from serl_launcher.policies.loading import load_core
from serl_launcher.policies.normalise import as_trained
from serl_transport.contract.specs import TaskSpec

log = logging.getLogger("policy")


def build_groot_n1_5(
    name: str,
    spec: TaskSpec,
    init: str,
    seed: int,
    action_horizon: int | None,
    size: Callable,
    embodiment: int = 31,
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
    **options: Any,
) -> GrootN15FlowPolicy:
    """A GR00T N1.5 for one task; arguments as `build_groot`. processor: folder or hub name of Eagle's tokenizer, the
    released one's when None. Raises ValueError in the user's words."""
    require_diffusers()
    check_init(init, checkpoint, action_horizon)
    flags = flags_of(train, tune)
    options |= {"precision": precision, "embodiment_tag": embodiment_tag}
    if init == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            order, units = as_trained(spec, trained_on)
            core = size.build(size.config_fields(spec, action_horizon))
        inputs = _inputs(core, processor, order, False) if processor else size.inputs(order)
        policy = GrootN15FlowPolicy(core, spec, inputs, units, embodiment, **options)
        policy.tune(**flags)
        return adapted(policy, train, lora_rank, seed, precision)
    found = Checkpoint.find(checkpoint)
    assets, core = read_assets(found, embodiment_tag, spec, dict(cameras or {}), statistics), build_core(found)
    have = core.config.action_horizon
    if action_horizon not in (None, have):
        raise CheckpointError(f"policy.action_horizon={action_horizon}: the checkpoint's chunk is {have}")
    policy = GrootN15FlowPolicy(
        core, spec, _of(found, assets, core, size, processor), assets.units, assets.slot, **options
    )
    policy.tune(**flags)
    unread = (POOLING, *ALIASES.values())
    policy.load_report = load_core(policy, found, prefix_of(found), ALIASES, precision, unread)
    policy.checkpoint, policy.described = found, assets.described
    policy.train(policy.training)
    log.info("%s", policy.load_report)
    return adapted(policy, train, lora_rank, seed, precision)


def _of(found: Checkpoint, assets: N15Assets, core: N15Core, size: Any, processor: str | None) -> Inputs:
    """The processor that is named, in the checkpoint, or the release's; hashed words at the tiny size without one."""
    here = found.folder / "processor"
    source = processor or (str(here) if (here / "tokenizer_config.json").is_file() else None)
    if source is None and size.hashed:
        return size.inputs(assets.cameras)
    return _inputs(core, source or PROCESSOR, assets.cameras, assets.lerobot)


def _inputs(core: N15Core, source: str, cameras: tuple[str, ...], lerobot: bool) -> EagleInputs:
    vision = core.config.eagle["vision_config"]
    side = vision["image_size"]
    pictures = Pictures(side, crop=None if lerobot else 0.95, bicubic=lerobot)
    inputs = EagleInputs(source, cameras, pictures, (side // vision["patch_size"]) ** 2, quoted=lerobot)
    inputs.expect_image_token(core.backbone.image_token)
    return inputs


def meta_groot_n1_5(cfg: Mapping[str, Any], spec: TaskSpec, size: Any) -> tuple[GrootN15FlowPolicy, str]:
    """The policy of a config on the meta device (shapes without numbers), and the statistics that data must have.

    Of a checkpoint only its configuration and statistics are read. Raises ValueError in the user's words.
    """
    require_diffusers()
    flags, cameras = flags_of(cfg.get("train"), cfg.get("tune")), tuple(spec.cameras)
    if cfg.get("checkpoint"):
        found = Checkpoint.find(cfg["checkpoint"])
        core, tag = build_core(found), cfg.get("embodiment_tag") or NEW_EMBODIMENT
        cameras = read_assets(found, tag, spec, dict(cfg.get("cameras") or {}), cfg.get("statistics")).cameras
    else:
        with torch.device("meta"):
            core = size.build(size.config_fields(spec, cfg.get("action_horizon") or 16))
    with torch.device("meta"):
        precision = cfg.get("precision") or "float32"
        policy = GrootN15FlowPolicy(core, spec, size.inputs(cameras), precision=precision)
    policy.checkpointing = bool(cfg.get("checkpointing"))
    policy.tune(**flags)
    if cfg.get("train") == "lora":
        put_groot_adapters(policy.core, cfg.get("lora_rank") or 16)
    return policy, "MIN_MAX"
