"""One tiny GR00T N1.6: with n1_5_case's weights and batch, what n1_6_reference.json was recorded on.

It was recorded once from NVIDIA's own modules (Isaac-GR00T, its n1.6 release, under transformers 4.51.3): tensors'
shapes, backbone features, samples, loss and every gradient of the tiny model, and the backbone on pictures of two
sizes; flash-attn's packed attention over a picture was computed by torch's.
"""

import torch
from n1_5_case import B, wave

from serl_launcher.policies.groot_n1_6.sizes import TinyN16Size

SIZE = TinyN16Size(
    image_size=56, width=32, vision_width=16, head_width=32, max_state_dim=5, max_action_dim=4, state_dropout=0.2
)
SLOT = 10


def two_sizes() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Ids int64[b, l] around a picture of 2 × 3 tokens and one of 2 × 2, and the pictures."""
    image, start, end = 63, 62, 61
    row = [end, *[image] * 6, start, end, *[image] * 4, start, 5, 6, 7]
    return torch.tensor([row] * B), [wave("wide", (B, 3, 56, 84)), wave("square", (B, 3, 56, 56))]
