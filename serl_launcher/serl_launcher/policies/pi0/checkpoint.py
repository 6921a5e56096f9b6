"""What a PI0 or PI0.5 checkpoint says of itself, checked against the task: configuration, tokenizer, relative actions.

pi0.build reads it, pi0.saving writes under the same names.
"""

from __future__ import annotations

import json

from serl_launcher.policies.checkpoint import PREPROCESSOR, Checkpoint, CheckpointError
from serl_launcher.policies.relative import Anchors, anchors_of_steps
from serl_transport.contract.specs import TaskSpec

EMBEDDING = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
ALIASES = {EMBEDDING: "paligemma_with_expert.paligemma.lm_head.weight"}  # a file may keep either name
EXPERT_HEAD = "paligemma_with_expert.gemma_expert.lm_head.weight"


def read_config(checkpoint: Checkpoint, spec: TaskSpec, action_horizon: int | None):
    """The checkpoint's lerobot config, checked against the task."""
    import lerobot.policies.pi0.configuration_pi0
    import lerobot.policies.pi05.configuration_pi05  # noqa: F401  registers the type
    from lerobot.configs import PreTrainedConfig

    config = PreTrainedConfig.from_pretrained(checkpoint.folder)
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


def anchors_of(checkpoint: Checkpoint, spec: TaskSpec) -> Anchors | None:
    """What the checkpoint's actions are relative to; None where they are absolute. Raises CheckpointError."""
    return anchors_of_steps(checkpoint, spec, ("normalizer_processor",), ("unnormalizer_processor",))


def tokenizer_name(checkpoint: Checkpoint) -> str:
    """The tokenizer that the checkpoint's preprocessor names; a folder of that name inside the checkpoint wins."""
    name, inside = said_tokenizer(checkpoint), checkpoint.folder / "tokenizer"
    if name is None:
        raise CheckpointError(
            f"{checkpoint.folder / PREPROCESSOR}: names no tokenizer; set policy.tokenizer to a folder"
        )
    return str(inside) if inside.is_dir() else name


def said_tokenizer(checkpoint: Checkpoint) -> str | None:
    """The name of a tokenizer in the checkpoint's preprocessor."""
    steps = json.loads((checkpoint.folder / PREPROCESSOR).read_text())["steps"]
    return next((name for step in steps if (name := step.get("config", {}).get("tokenizer_name"))), None)
