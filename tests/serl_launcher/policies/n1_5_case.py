"""One tiny GR00T N1.5 with weights that follow from their names, and one batch: what the reference was run on."""

import zlib

import numpy as np
import torch

from serl_launcher.policies.base import PolicyInput
from serl_launcher.policies.groot_n1_5.sizes import TinyN15Size
from serl_transport.contract.specs import TaskSpec

SPEC = TaskSpec.from_dict(
    {
        "name": "t",
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
SIZE = TinyN15Size(image_size=28, width=32, vision_width=16, head_width=32, max_state_dim=5, max_action_dim=4)
B, AH, WIDE, AD, SLOT = 3, 4, 4, 2, 31
STEPS = 4


def wave(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Numbers in [−1, 1] that a name and a shape determine, on every machine."""
    crc = zlib.crc32(name.encode())
    angles = np.arange(int(np.prod(shape)), dtype=np.float64) * (0.3 + crc % 1009 / 1009) + crc % 97
    return torch.from_numpy(np.sin(angles).reshape(shape).astype(np.float32))


@torch.no_grad()
def fill(module: torch.nn.Module) -> None:
    """Give every parameter its wave, at a scale that keeps signals alive."""
    for name, parameter in module.named_parameters():
        if parameter.ndim < 2:
            parameter.copy_(
                0.1 * wave(name, tuple(parameter.shape))
                + (("norm" in name or "vlln" in name) and name.endswith("weight"))
            )
        else:
            fan_in = parameter.shape[-2] if name.endswith(".W") else parameter[0].numel()
            parameter.copy_(wave(name, tuple(parameter.shape)) * (0.5 if "embed" in name else 1.2 * fan_in**-0.5))


def observation() -> PolicyInput:
    shape = (B, 32, 32, 3)
    images = {camera: ((wave(camera, shape).numpy() + 1) * 127).astype(np.uint8) for camera in SPEC.cameras}
    return PolicyInput(images, wave("state", (B, 3)).numpy(), ["pick up", "pick up the red cube", "lift"])


def chunk_noise_time() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A batch of the flow loss: float32[b, ah, ad of the model] twice, and times float32[b]."""
    chunk = wave("chunk", (B, AH, WIDE))
    chunk[..., AD:] = 0
    return chunk, 1.5 * wave("noise", (B, AH, WIDE)), torch.tensor([0.1, 0.45, 0.83])


def measured(gradient: torch.Tensor, name: str) -> list[float]:
    """A gradient in two numbers: its length, and what it is along a direction of its own."""
    return [float(gradient.norm()), float((gradient * wave(f"along {name}", tuple(gradient.shape))).sum())]
