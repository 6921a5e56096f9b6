"""A task and a PI0 small enough for unit tests: the real classes, 16 wide, two 32 px cameras."""

from pathlib import Path

import numpy as np
from configured import composed
from omegaconf import DictConfig, OmegaConf

from serl_launcher.policies.pi0.build import build_pi0
from serl_launcher.policies.pi0.head import PI0FlowPolicy
from serl_launcher.policies.pi0.tiny import TinySize
from serl_launcher.replay.transitions import TransitionBatch
from serl_launcher.replay.views import ChunkBatch
from serl_transport.contract.specs import TaskSpec

ROOT = Path(__file__).parents[2]
HORIZON = 4
SIZE = TinySize(width=16, vision_width=16, image_size=32, patch_size=16)
SPEC = TaskSpec.from_dict(
    {
        "name": "tiny",
        "prompt": "pick up the red cube",
        "cameras": {"front": [32, 32], "wrist": [32, 32]},
        "state_names": ["a", "b", "c"],
        "state_low": [-1, -1, 0],
        "state_high": [1, 1, 2],
        "action_names": ["x", "g"],
        "action_low": [-0.02, -1],
        "action_high": [0.02, 1],
        "control_hz": 10,
        "max_ticks": 60,
    }
)


def tiny_policy(seed: int = 0) -> PI0FlowPolicy:
    return build_pi0("tiny", SPEC, "random", seed, HORIZON, SIZE)


def tiny_config(algo: str = "reject_sampling_pi0", **changes: object) -> DictConfig:
    """config/ with the tiny task and policy; `changes` are dotted keys with __ for the dots."""
    cfg = composed(f"algo={algo}")
    cfg.task = {"name": "tiny", "spec": SPEC.to_dict(), "noop_dims": None, "rate_hz": None}
    cfg.policy = OmegaConf.load(ROOT / "config" / "policy" / "pi0_tiny.yaml")
    cfg.policy.action_horizon = HORIZON
    cfg.policy.size.update({"width": 16, "vision_width": 16, "image_size": 32})
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value)
    return cfg


def random_batch(b: int = 6, seed: int = 0) -> ChunkBatch:
    rng = np.random.default_rng(seed)
    action = rng.uniform(-1, 1, (b, HORIZON, 2)).astype(np.float32)
    action[..., 0] *= 0.02
    return ChunkBatch(
        images={camera: rng.integers(0, 256, (b, 32, 32, 3), dtype=np.uint8) for camera in SPEC.cameras},
        state=rng.uniform(0, 1, (b, 3)).astype(np.float32),
        action=action,
        is_pad=np.zeros((b, HORIZON), bool),
        demo=np.zeros(b, bool),
        operator=np.zeros(b, bool),
        weight=np.ones(b, np.float32),
        prompts=[SPEC.prompt] * b,
    )


def random_transitions(b: int = 6, horizon: int = 2, seed: int = 0) -> TransitionBatch:
    """Chunk transitions of the tiny task; every third one terminated."""
    rng = np.random.default_rng(seed)
    chunk = random_batch(b, seed)
    return TransitionBatch(
        images=chunk.images,
        state=chunk.state,
        action=chunk.action[:, :horizon],
        is_pad=np.zeros((b, horizon), bool),
        reward=(np.arange(b) % 3 == 0).astype(np.float32),
        discount=np.full(b, 0.9, np.float32),
        bootstrap=np.arange(b) % 3 != 0,
        next_images=random_batch(b, seed + 1).images,
        next_state=rng.uniform(0, 1, (b, 3)).astype(np.float32),
        return_to_go=np.ones(b, np.float32),
        value_lower_bound=np.where(np.arange(b) % 3 == 0, 1, -np.inf).astype(np.float32),
        demo=np.arange(b) % 2 == 0,
        prompts=chunk.prompts,
    )
