"""Build a PI0 or PI0.5: at random where that is asked for by name, else from a checkpoint, strictly.

`build_pi0` and `build_pi05` (named by `_target_` in config/policy/) call `build_flow_policy`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from serl_launcher.policies.checkpoint import PREPROCESSOR, Checkpoint, CheckpointError, read_statistics
from serl_launcher.policies.loading import LoadReport, fill, materialise_buffers
from serl_launcher.policies.precision import hold, stays_float32
from serl_launcher.policies.tokens import HubTokenizer
from serl_launcher.policies.trains import choose
from serl_launcher.policies.units_of_checkpoint import units_of
from serl_transport.contract.specs import TaskSpec

log = logging.getLogger("policy")
EMBEDDING = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
ALIASES = {EMBEDDING: "paligemma_with_expert.paligemma.lm_head.weight"}


def build_flow_policy(
    head: type,
    kind: str,
    spec: TaskSpec,
    init: str,
    seed: int,
    action_horizon: int | None,
    size: Any,
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
) -> nn.Module:
    """A policy of class `head` for one task.

    init: `random` (weights from `seed`) or `checkpoint` (from `checkpoint`, a LeRobot folder or a hub name of type
    `kind`); tokenizer: folder or hub name, the checkpoint's own when None; cameras: the task's camera -> the
    checkpoint's image feature, where names differ; train: full, expert or lora. Raises ValueError in the user's words.
    """
    options = {"attention": attention, "checkpointing": checkpointing, "precision": precision, "compile": compile}
    if init == "random":
        if checkpoint:
            raise ValueError(f"policy.init=random and policy.checkpoint={checkpoint}: which one? set init=checkpoint")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            core, words = size(spec, action_horizon)
            if tokenizer:
                words = HubTokenizer(tokenizer, core.config.tokenizer_max_length)
            policy = head(core, spec, words, **options)
            choose(policy, train, lora_rank)
        hold(policy, precision, masters=True)
        return policy
    if init != "checkpoint":
        raise ValueError(f"policy.init: expected 'checkpoint' or 'random', got {init!r}")
    if not checkpoint:
        raise ValueError("policy.checkpoint: expected a LeRobot folder or a hub name (or ask for policy.init=random)")
    found = Checkpoint.find(checkpoint)
    found.expect_type(kind)
    config = _config(found, spec, action_horizon)
    units = units_of(found, spec)
    order = camera_order(found, spec, dict(cameras or {}))
    words = HubTokenizer(tokenizer or _tokenizer_name(found), config.tokenizer_max_length)
    with torch.device("meta"):
        core = size.build(config)
    _drop_language_heads(core)
    policy = head(core, spec, words, units, cameras=order, **options)
    if train != "lora":
        choose(policy, train)
    policy.load_report = load_core(policy, found, "model.", ALIASES, precision)
    if train == "lora":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            choose(policy, train, lora_rank)
        hold(policy, precision, masters=True)
    policy.checkpoint = found
    log.info("%s", policy.load_report)
    return policy


def meta_policy(cfg: Any, spec: TaskSpec, size: Any) -> tuple[nn.Module, str]:
    """The policy of a config on the meta device (shapes without numbers), and its mode of normalisation.

    Of a checkpoint only config.json and the processors are read. Raises ValueError for a policy that is none of PI0,
    PI0.5 and GR00T, whose forward passes run on shapes alone.
    """
    from serl_launcher.policies.groot.build import meta_groot
    from serl_launcher.policies.pi0.pi05 import PI05FlowPolicy
    from serl_launcher.policies.pi0.policy import PI0FlowPolicy
    from serl_launcher.policies.tokens import WordHashTokenizer

    kinds = {"build_pi0": ("pi0", PI0FlowPolicy), "build_pi05": ("pi05", PI05FlowPolicy)}
    target = cfg["_target_"].rpartition(".")[2]
    if target == "build_groot":
        return meta_groot(cfg, spec, size)
    if target not in kinds:
        known = sorted([*kinds, "build_groot"])
        raise ValueError(f"policy={cfg.get('name')}: costs are estimated for {known} only, got {target}")
    kind, head = kinds[target]
    mode = "MEAN_STD" if kind == "pi0" else "QUANTILES"
    if cfg.get("checkpoint"):
        found = Checkpoint.find(cfg["checkpoint"])
        found.expect_type(kind)
        config = _config(found, spec, cfg.get("action_horizon"))
        mode = read_statistics(found, PREPROCESSOR, "action", "ACTION").mode
    else:
        config = size.config(spec, cfg.get("action_horizon") or 50)
    with torch.device("meta"):
        core = size.build(config)
        _drop_language_heads(core)
        policy = head(core, spec, WordHashTokenizer(300, config.tokenizer_max_length), attention="sdpa")
    policy.checkpointing = bool(cfg.get("checkpointing"))
    choose(policy, cfg.get("train") or "full", cfg.get("lora_rank") or 16)
    return policy, mode


def load_core(
    policy: nn.Module, checkpoint: Checkpoint, prefix: str, aliases: dict[str, str], precision: str
) -> LoadReport:
    """Fill `policy.core`, built on the meta device. Raises CheckpointError naming what does not fit."""
    trains = {name.removeprefix("core."): p.requires_grad for name, p in policy.named_parameters()}
    sizes = {name: tensor.ndim for name, tensor in policy.core.state_dict().items()}

    def dtype(name: str) -> torch.dtype:
        half = precision == "bfloat16" and not trains.get(name) and not stays_float32(name, sizes[name])
        return torch.bfloat16 if half else torch.float32

    report = fill(policy.core, checkpoint, prefix, aliases, lambda name: name.endswith("lm_head.weight"), dtype)
    materialise_buffers(policy.core)
    return report


def _drop_language_heads(core: nn.Module) -> None:
    """790M parameters of the full model that no flow output reads; policies.saving takes them from the source."""
    core.paligemma_with_expert.paligemma.lm_head = nn.Identity()
    core.paligemma_with_expert.gemma_expert.lm_head = nn.Identity()


def _config(checkpoint: Checkpoint, spec: TaskSpec, action_horizon: int | None):
    """The checkpoint's lerobot config, checked against the task."""
    import lerobot.policies.pi0.configuration_pi0
    import lerobot.policies.pi05.configuration_pi05  # noqa: F401  registers the type
    from lerobot.configs import PreTrainedConfig

    config = PreTrainedConfig.from_pretrained(checkpoint.folder)
    if config.use_relative_actions:
        raise CheckpointError(f"{checkpoint.folder}: use_relative_actions checkpoints are not supported")
    if action_horizon is not None and action_horizon != config.chunk_size:
        raise CheckpointError(f"policy.action_horizon={action_horizon}: the checkpoint's chunk is {config.chunk_size}")
    for what, dims, limit in (
        ("state", len(spec.state_names), config.max_state_dim),
        ("action", len(spec.action_names), config.max_action_dim),
    ):
        if dims > limit:
            raise CheckpointError(f"{checkpoint.folder}: holds {what}s of at most {limit} dims, the task has {dims}")
    config.dtype, config.compile_model, config.gradient_checkpointing = "float32", False, False
    return config


def camera_order(checkpoint: Checkpoint, spec: TaskSpec, mapping: dict[str, str]) -> tuple[str, ...]:
    """The task's cameras in the checkpoint's order. Raises CheckpointError naming cameras without a counterpart."""
    features = checkpoint.config.get("input_features") or {}
    visual = [key for key, feature in features.items() if feature.get("type") == "VISUAL"]
    unknown = [camera for camera in mapping if camera not in spec.cameras]
    if unknown:
        raise ValueError(f"policy.cameras: the task has no camera {unknown[0]!r}; it has {sorted(spec.cameras)}")
    of = {mapping.get(camera, camera): camera for camera in spec.cameras}
    of = {key if key.startswith("observation.") else f"observation.images.{key}": camera for key, camera in of.items()}
    wanted = [key for key in visual if ".empty_camera_" not in key]
    if set(of) != set(wanted):
        raise CheckpointError(
            f"cameras: the checkpoint has {wanted}, the task gives {sorted(of)}; map them with policy.cameras"
        )
    return tuple(of[key] for key in wanted)


def _tokenizer_name(checkpoint: Checkpoint) -> str:
    """The tokenizer that the checkpoint's preprocessor names; a folder of that name inside the checkpoint wins."""
    import json

    path = checkpoint.folder / PREPROCESSOR
    for step in json.loads(path.read_text())["steps"]:
        name = step.get("config", {}).get("tokenizer_name")
        if name:
            inside = checkpoint.folder / "tokenizer"
            return str(inside) if inside.is_dir() else name
    raise CheckpointError(f"{path}: names no tokenizer; set policy.tokenizer to a folder")


Size = Callable[[TaskSpec, int], tuple[nn.Module, Any]]
