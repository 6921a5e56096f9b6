"""Build a GR00T N1.5: at random where that is asked for by name, else from a checkpoint, strictly.

`build_groot_n1_5` is named by `_target_` in config/policy/groot_n1_5*.yaml. `meta_groot_n1_5` beside it makes the same
policy of shapes alone; policies.estimate finds it by that name. Both are groot.build's with this release's parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serl_launcher.policies.checkpoint import Checkpoint
from serl_launcher.policies.groot.build import Release, build, meta
from serl_launcher.policies.groot.head import Inputs
from serl_launcher.policies.groot_n1_5.checkpoint import POOLING, N15Assets, build_core, prefix_of, read_assets
from serl_launcher.policies.groot_n1_5.core import N15Core
from serl_launcher.policies.groot_n1_5.head import GrootN15FlowPolicy
from serl_launcher.policies.groot_n1_5.inputs import PROCESSOR, EagleInputs, Pictures
from serl_transport.contract.specs import TaskSpec


def build_groot_n1_5(*given: Any, embodiment: int = 31, **named: Any) -> GrootN15FlowPolicy:
    """A GR00T N1.5, as `groot.build.build`. processor: folder or hub name of Eagle's tokenizer, the released one's when
    None."""
    return build(RELEASE, *given, embodiment=embodiment, **named)


def meta_groot_n1_5(cfg: Mapping[str, Any], spec: TaskSpec, size: Any) -> tuple[GrootN15FlowPolicy, str]:
    """A GR00T N1.5, as `groot.build.meta`."""
    return meta(RELEASE, cfg, spec, size)


def _inputs(
    processor: str | None,
    found: Checkpoint | None,
    assets: N15Assets | None,
    core: N15Core,
    size: Any,
    cameras: tuple[str, ...],
) -> Inputs:
    """The processor that is named, in the checkpoint, or the release's; hashed words at the tiny size without one."""
    here = None if found is None else found.folder / "processor"
    source = processor or (str(here) if (here / "tokenizer_config.json").is_file() else None)
    if source is None and size.hashed:
        return size.inputs(cameras)
    vision, lerobot = core.config.eagle["vision_config"], assets is not None and assets.lerobot
    side = vision["image_size"]
    pictures = Pictures(side, crop=None if lerobot else 0.95, bicubic=lerobot)
    tokens = (side // vision["patch_size"]) ** 2
    inputs = EagleInputs(source or PROCESSOR, cameras, pictures, tokens, quoted=lerobot)
    inputs.expect_image_token(core.backbone.image_token)
    return inputs


RELEASE = Release(GrootN15FlowPolicy, read_assets, build_core, prefix_of, _inputs, ticks=16, unread=(POOLING,))
