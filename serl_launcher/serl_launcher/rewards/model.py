"""The reward classifier: a small convolutional network over all cameras, optionally with the robot's state.

Two kinds share it: `outcome` (classes: not yet, success) and `process` (n stages of the task). Trained by
rewards.training, served by rewards.server, audited by tools/audit_reward.py.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from serl_launcher.policies.normalise import Affine
from serl_launcher.run.files import DamagedFileError, read_sealed, sha256_of, write_sealed, write_whole
from serl_launcher.run.parameters import save_tensors
from serl_transport.contract.specs import TaskSpec

KINDS = ("outcome", "process")
MODEL, CARD = "reward.safetensors", "reward.json"


@dataclass(frozen=True, slots=True)
class RewardCard:
    """What a trained classifier is, beside its weights (reward.json)."""

    kind: str  # outcome | process
    classes: int  # 2 for outcome; stages of a process
    cameras: tuple[str, ...]  # that it looks at, in order
    image_size: int  # pixels, square; larger or smaller images are resized
    use_state: bool  # does it read observation.state
    task: dict  # the TaskSpec it was trained on, as a dict
    temperature: float = 1.0  # logits are divided by it (Guo et al., 1706.04599)
    threshold: float = 0.5  # outcome: probability from which an observation counts as success
    patience: int = 1  # outcome: observations in a row that must

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.classes < 2:
            raise ValueError(f"reward.kind: expected one of {', '.join(KINDS)} with 2 or more classes, got {self.kind}")
        if self.image_size < 1 or self.patience < 1:
            raise ValueError(f"image_size, patience: expected 1 or more, got {self.image_size} and {self.patience}")

    @property
    def spec(self) -> TaskSpec:
        return TaskSpec.from_dict(self.task)


class RewardClassifier(nn.Module):
    """logits float32[b, classes] of observations."""

    def __init__(self, card: RewardCard, width: int = 32) -> None:
        super().__init__()
        self.card = card
        spec = card.spec
        channels = [3, width, width, 2 * width, 2 * width]
        layers: list[nn.Module] = []
        for a, b in pairwise(channels):
            layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(4, b), nn.SiLU()]
        self.eye = nn.Sequential(*layers)
        grid = -(-card.image_size // 16)  # each of the four convolutions halves the size, rounding up
        self.state_units = Affine.from_bounds(spec.state_low, spec.state_high)
        size = len(card.cameras) * 2 * width * grid * grid + (len(spec.state_names) if card.use_state else 0)
        self.head = nn.Sequential(
            nn.Dropout(0.1), nn.Linear(size, 64), nn.LayerNorm(64), nn.SiLU(), nn.Linear(64, card.classes)
        )

    def forward(self, images: Mapping[str, np.ndarray | Tensor], state: np.ndarray | Tensor) -> Tensor:
        """images: camera -> uint8[b, h, w, 3]; state: float32[b, s], physical units."""
        return self.logits({camera: self.pixels(images[camera]) for camera in self.card.cameras}, state)

    def logits(self, pixels: Mapping[str, Tensor], state: np.ndarray | Tensor) -> Tensor:
        """The same from what `pixels` returns."""
        parts = [self.eye(pixels[camera]).flatten(1) for camera in self.card.cameras]
        if self.card.use_state:
            parts.append(self.state_units.to_model(torch.as_tensor(state, device=parts[0].device)))
        return self.head(torch.cat(parts, dim=-1))

    def pixels(self, images: np.ndarray | Tensor) -> Tensor:
        """uint8[b, h, w, 3] -> float32[b, 3, size, size] in [−1, 1]."""
        x = torch.as_tensor(images, device=self.state_units.offset.device).permute(0, 3, 1, 2).float().div(127.5).sub(1)
        size = self.card.image_size
        return x if x.shape[-2:] == (size, size) else nn.functional.interpolate(x, (size, size), mode="area")

    @torch.no_grad()
    def probabilities(self, images: Mapping[str, np.ndarray], state: np.ndarray) -> np.ndarray:
        """Calibrated float32[b, classes]."""
        self.eval()
        return (self(images, state) / self.card.temperature).softmax(-1).cpu().numpy()


def save(folder: Path, model: RewardClassifier, card: RewardCard, report: dict) -> None:
    """Weights, card and the training's report; the card last, so that a folder without one never existed."""
    weights = {k: v.contiguous() for k, v in model.state_dict().items()}
    write_whole(folder / MODEL, lambda part: save_tensors(weights, part), durable=True)
    write_sealed(folder / CARD, asdict(card) | {"report": report, "sha256": sha256_of(folder / MODEL)}, indent=2)


def load(folder: str | Path) -> RewardClassifier:
    """A saved classifier. Raises FileNotFoundError or ValueError in the user's words; a damaged file is named."""
    folder = Path(folder)
    values = read_sealed(folder / CARD)
    if values is None:
        raise FileNotFoundError(
            f"reward.model={folder}: expected a folder with {CARD}, as train_reward.sh writes; there is none"
        )
    values.pop("report", None)
    digest = values.pop("sha256", None)  # None: of an older release
    try:
        card = RewardCard(**(values | {"cameras": tuple(values["cameras"])}))
    except (TypeError, KeyError) as error:
        raise DamagedFileError(f"{folder / CARD} is no card of a reward model: {error}") from None
    model = RewardClassifier(card)
    try:
        if digest is not None and sha256_of(folder / MODEL) != digest:
            raise DamagedFileError(f"{folder / MODEL} is damaged: it does not match its sha256; train it again")
        model.load_state_dict(load_file(folder / MODEL))
    except (SafetensorError, OSError) as error:
        raise DamagedFileError(f"{folder / MODEL} cannot be read: {error}; train it again") from None
    except RuntimeError as error:
        raise ValueError(f"{folder / MODEL} does not fit {CARD}: {str(error).splitlines()[-1].strip()}") from None
    return model.eval()
