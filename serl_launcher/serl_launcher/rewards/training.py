"""Train a reward classifier on labelled episodes, calibrate it, and say how good it is.

    journal ─▶ labels ─▶ split by episode ─▶ fit (weighted, augmented) ─▶ temperature, threshold on validation
                                                └─▶ confusion matrix, precision–recall on test ─▶ reward.json, PNGs

Called by examples/train_reward_classifier.py.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from serl_launcher.rewards.judging import (
    balanced_accuracy,
    best_threshold,
    confusion,
    episode_score,
    precision_recall,
    verdict_at,
)
from serl_launcher.rewards.labels import LabelledEpisode, Split
from serl_launcher.rewards.model import RewardCard, RewardClassifier


@dataclass(frozen=True, slots=True)
class Fit:
    """How to train."""

    steps: int = 600
    batch_size: int = 32
    lr: float = 1e-3
    shift: int = 3  # pixels of random shift, per image
    brightness: float = 0.1  # random change, share of the range
    state_noise: float = 0.02  # of the state's range

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("shift", 0), ("brightness", 0), ("state_noise", 0)):
            if not least <= getattr(self, name) < math.inf:
                raise ValueError(f"fit.{name}: expected {least} or more, got {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"fit.lr: expected a number above 0, got {self.lr}")


@dataclass(frozen=True, slots=True)
class Labelled:
    """All labelled observations of some episodes."""

    images: dict[str, np.ndarray]  # camera -> uint8[n, h, w, 3]
    state: np.ndarray  # float32[n, s]
    label: np.ndarray  # int64[n]
    succeeds: np.ndarray  # bool[n], the episode it is of ends in success

    @classmethod
    def of(cls, episodes: Sequence[LabelledEpisode]) -> "Labelled":
        keep = [e.label >= 0 for e in episodes]
        images = {
            camera: np.concatenate([e.images[camera][k] for e, k in zip(episodes, keep, strict=True)])
            for camera in episodes[0].images
        }
        state = np.concatenate([e.state[k] for e, k in zip(episodes, keep, strict=True)])
        label = np.concatenate([e.label[k] for e, k in zip(episodes, keep, strict=True)])
        return cls(images, state, label, np.repeat([e.success for e in episodes], [k.sum() for k in keep]))

    def take(self, rows: np.ndarray) -> "Labelled":
        images = {c: x[rows] for c, x in self.images.items()}
        return Labelled(images, self.state[rows], self.label[rows], self.succeeds[rows])

    def strata(self, kind: str) -> list[np.ndarray]:
        """Rows that make up equal parts of a batch, by class.

        outcome: half of class 0 comes from successful episodes. What lies just before success looks like it, and is
        rare among the observations of all the failures.
        """
        rows = [np.flatnonzero(self.label == k) for k in range(self.label.max() + 1)]
        if kind != "outcome":
            return rows
        before = [half for half in (rows[0][self.succeeds[rows[0]]], rows[0][~self.succeeds[rows[0]]]) if len(half)]
        return [*before, *[rows[1]] * len(before)]


def train(
    split: Split, card: RewardCard, fit: Fit, seed: int, tell: Callable[[str], None] = print
) -> tuple[RewardClassifier, RewardCard, dict]:
    """A trained classifier, its calibrated card and the report (JSON)."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = RewardClassifier(card)
    data = Labelled.of(split.train)
    missing = sorted(set(range(card.classes)) - set(data.label.tolist()))
    if missing:
        raise ValueError(f"no training observation of class {missing}: the episodes hold one class only")
    _fit(model, data, fit, rng, tell)
    validation = Labelled.of(split.validation)
    card = replace(card, temperature=_temperature(model, validation))
    model.card = card
    if card.kind == "outcome":
        whole, unfinished = _scores(model, split.validation), _unfinished_scores(model, split.validation)
        scores, truth = (np.concatenate(pair) for pair in zip(whole, unfinished, strict=True))
        card = model.card = replace(card, threshold=best_threshold(scores, truth))
    return model, card, report(model, split)


def _fit(model: RewardClassifier, data: Labelled, fit: Fit, rng: np.random.Generator, tell: Callable) -> None:
    """Class-balanced batches: rare successes weigh as much as the rest; see `Labelled.strata`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=fit.lr, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, fit.lr, total_steps=fit.steps)
    rows = data.strata(model.card.kind)
    share = -(-fit.batch_size // len(rows))
    model.train()
    for step in range(fit.steps):
        batch = data.take(np.concatenate([rng.choice(r, share) for r in rows]))
        images = {camera: _augment(model.pixels(x), fit) for camera, x in batch.images.items()}
        state = torch.as_tensor(batch.state)
        state = state + fit.state_noise * model.state_units.scale * torch.randn_like(state)
        loss = torch.nn.functional.cross_entropy(model.logits(images, state), torch.as_tensor(batch.label))
        if not loss.isfinite():
            raise ValueError(f"the loss is {loss.item()} at step {step + 1}: fit.lr={fit.lr:g} is too high, lower it")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == fit.steps - 1:
            tell(f"step {step + 1} of {fit.steps}: loss {loss.item():.4f}")


def _augment(x: Tensor, fit: Fit) -> Tensor:
    """A random shift with repeated edges, and brightness: float32[b, 3, h, w]."""
    b, _, h, w = x.shape
    padded = torch.nn.functional.pad(x, [fit.shift] * 4, mode="replicate")
    offset = torch.randint(0, 2 * fit.shift + 1, (b, 2))
    rows, columns = offset[:, :1] + torch.arange(h), offset[:, 1:] + torch.arange(w)
    moved = padded[torch.arange(b)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return moved + 2 * fit.brightness * (torch.rand(b, 1, 1, 1) - 0.5)


@torch.no_grad()
def _temperature(model: RewardClassifier, data: Labelled) -> float:
    """The temperature of highest validation likelihood, on a grid."""
    model.eval()
    logits, label = model(data.images, data.state), torch.as_tensor(data.label)
    grid = torch.logspace(-1, 1, 41)
    losses = [torch.nn.functional.cross_entropy(logits / t, label).item() for t in grid]
    return float(grid[int(np.argmin(losses))])


def _scores(model: RewardClassifier, episodes: Sequence[LabelledEpisode]) -> tuple[np.ndarray, np.ndarray]:
    scores = [episode_score(model.probabilities(e.images, e.state)[:, 1], model.card.patience) for e in episodes]
    return np.array(scores), np.array([e.success for e in episodes])


def _unfinished_scores(model: RewardClassifier, episodes: Sequence[LabelledEpisode]) -> tuple[np.ndarray, np.ndarray]:
    """Of successes as far as they are known not to be one yet: a verdict there ends an episode too early."""
    scores = []
    for e in episodes:
        yet = e.label == 0
        if e.success and yet.any():
            said = model.probabilities({camera: x[yet] for camera, x in e.images.items()}, e.state[yet])
            scores.append(episode_score(said[:, 1], model.card.patience))
    return np.array(scores), np.zeros(len(scores), bool)


def _early(model: RewardClassifier, episodes: Sequence[LabelledEpisode]) -> list[int]:
    """For each success that is recognised: how many observations before its end the verdict comes."""
    card = model.card
    found = [
        (len(e.label) - 1, verdict_at(model.probabilities(e.images, e.state)[:, 1], card.threshold, card.patience))
        for e in episodes
        if e.success
    ]
    return [end - at for end, at in found if at is not None]


def report(model: RewardClassifier, split: Split) -> dict:
    """Figures on the held-out test episodes, JSON."""
    card, test = model.card, Labelled.of(split.test)
    said = model.probabilities(test.images, test.state)
    chosen = (said[:, 1] >= card.threshold) if card.kind == "outcome" else said.argmax(1)
    frames = confusion(test.label, chosen, card.classes)
    figures = {
        "episodes": {"train": len(split.train), "validation": len(split.validation), "test": len(split.test)},
        "frame_confusion": frames.tolist(),
        "frame_balanced_accuracy": balanced_accuracy(frames),
    }
    if card.kind == "outcome":
        scores, truth = _scores(model, split.test)
        episodes = confusion(truth, scores >= card.threshold, 2)
        precision, recall = precision_recall(scores, truth)
        early = _early(model, split.test) or [0]
        figures |= {
            "episode_confusion": episodes.tolist(),
            "episode_balanced_accuracy": balanced_accuracy(episodes),
            "observations_early": {"median": float(np.median(early)), "worst": max(early)},
            "precision": precision.tolist(),
            "recall": recall.tolist(),
        }
    return figures


def plot(figures: dict, kind: str, folder: Path) -> None:
    """confusion.png, and precision_recall.png for an outcome classifier."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    table = np.array(figures["episode_confusion" if kind == "outcome" else "frame_confusion"])
    figure, axes = plt.subplots(figsize=(4, 4))
    axes.imshow(table, cmap="Blues")
    for (row, column), n in np.ndenumerate(table):
        axes.text(column, row, str(n), ha="center", va="center", color="black" if n < table.max() / 2 else "white")
    axes.set(xlabel="said", ylabel="truth", title=f"held-out {'episodes' if kind == 'outcome' else 'observations'}")
    axes.set_xticks(range(len(table)))
    axes.set_yticks(range(len(table)))
    figure.savefig(folder / "confusion.png", dpi=120, bbox_inches="tight")
    plt.close(figure)
    if kind == "outcome":
        figure, axes = plt.subplots(figsize=(4, 4))
        axes.plot(figures["recall"], figures["precision"], marker="o")
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02), title="held-out episodes")
        figure.savefig(folder / "precision_recall.png", dpi=120, bbox_inches="tight")
        plt.close(figure)
