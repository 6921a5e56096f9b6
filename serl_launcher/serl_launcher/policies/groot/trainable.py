"""What of a GR00T trains: by GR00T's own flags (`policy.tune`), or by the words that PI0 knows (`policy.train`).

groot.build calls it: `flags_of` before the weights are read, `put_groot_adapters` after.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from serl_launcher.policies.adapters import put_adapters

TUNE = ("llm", "visual", "projector", "diffusion_model", "vlln")
MODES = {  # policy.train -> the flags that are on
    "full": TUNE,
    "expert": ("projector", "diffusion_model", "vlln"),
    "lora": ("projector",),
}
LORA_TARGETS = (
    r".*\.language_model\.(model\.)?layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
    r"|.*action_head\.(model|vl_self_attention)\.transformer_blocks\.\d+\.(attn1\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))"
)


def flags_of(train: str | None, tune: Mapping[str, bool] | None) -> dict[str, bool]:
    """All of GR00T's flags. train: full, expert (everything behind the backbone) or lora (the projections of the
    embodiment, and adapters); None: as `tune` says, where a flag that is not given is True.

    Raises ValueError naming an unknown word or flag.
    """
    if train is not None:
        if train not in MODES:
            raise ValueError(
                f"policy.train: expected one of {list(MODES)}, or null (as policy.tune says), got {train!r}"
            )
        return {key: key in MODES[train] for key in TUNE}
    given = dict(tune or {})
    unknown = [key for key in given if key not in TUNE]
    if unknown:
        raise ValueError(f"policy.tune: unknown flag {unknown[0]!r}; the flags are {list(TUNE)}")
    return {key: bool(given.get(key, True)) for key in TUNE}


def put_groot_adapters(core: nn.Module, rank: int) -> None:
    """Adapters on every attention and MLP projection of the language model and the action head's transformers."""
    put_adapters(core, LORA_TARGETS, rank)
