"""Build a GR00T N1.6: at random where that is asked for by name, else from a checkpoint, strictly.

`build_groot_n1_6` is named by `_target_` in config/policy/groot_n1_6*.yaml. `meta_groot_n1_6` beside it makes the same
policy of shapes alone; policies.estimate finds it by that name. Both are groot.build's with this release's parts; its
folders have N1.7's layout (groot.assets).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from serl_launcher.policies.checkpoint import Checkpoint
from serl_launcher.policies.groot.assets import GrootAssets, read_assets
from serl_launcher.policies.groot.build import Release, build, meta
from serl_launcher.policies.groot.head import Inputs
from serl_launcher.policies.groot_n1_6.core import POOLING, SLOTS, TYPE, N16Core, build_core
from serl_launcher.policies.groot_n1_6.head import GrootN16FlowPolicy
from serl_launcher.policies.groot_n1_6.inputs import Eagle3Inputs, Pictures
from serl_transport.contract.specs import TaskSpec

NO_TOKENIZER = (
    "policy.processor: a GR00T N1.6 checkpoint holds no tokenizer; name the folder "
    "gr00t/model/modules/nvidia/Eagle-Block2A-2B-v2 of Isaac-GR00T's n1.6 release"
)


def build_groot_n1_6(*given: Any, embodiment: int = 10, **named: Any) -> GrootN16FlowPolicy:
    """A GR00T N1.6, as `groot.build.build`. processor: folder of Eagle's tokenizer, processor/ in the checkpoint when
    None."""
    return build(RELEASE, *given, embodiment=embodiment, **named)


def meta_groot_n1_6(cfg: Mapping[str, Any], spec: TaskSpec, size: Any) -> tuple[GrootN16FlowPolicy, str]:
    """A GR00T N1.6, as `groot.build.meta`."""
    return meta(RELEASE, cfg, spec, size)


def _inputs(
    processor: str | None,
    found: Checkpoint | None,
    assets: GrootAssets | None,
    core: N16Core,
    size: Any,
    cameras: tuple[str, ...],
) -> Inputs:
    """The processor that is named or in the checkpoint; hashed words at the tiny size without one."""
    here = None if found is None else found.folder / "processor"
    source = processor or (str(here) if (here / "tokenizer_config.json").is_file() else None)
    if source is None and size.hashed:
        return size.inputs(cameras)
    if source is None:
        raise ValueError(NO_TOKENIZER)
    if assets is not None and assets.frames > 1:
        raise ValueError(f"{found.folder}: {assets.frames} pictures a camera; GR00T N1.6 is read with the current one")
    pictures, formalize = (Pictures(), True) if assets is None else (assets.geometry, assets.formalize)
    inputs = Eagle3Inputs(source, cameras, pictures, formalize)
    inputs.expect_image_token(core.backbone.image_token)
    return inputs


RELEASE = Release(
    GrootN16FlowPolicy,
    partial(read_assets, types=(TYPE,), slots=SLOTS, geometry=Pictures.of),
    build_core,
    lambda found: "",
    _inputs,
    ticks=50,
    unread=(POOLING,),
)
