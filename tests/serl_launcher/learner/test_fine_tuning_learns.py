"""What fine-tuning reaches: an overfit that held-out episodes show, and the recipe for a GR00T at tiny size."""

import json

import pytest
import train_sft
from sft_samples import make_dataset

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_held_out_loss_falls_then_rises_and_the_best_version_is_that_of_its_lowest(tmp_path):
    """Eight episodes whose offsets can only be learned by heart: what is common comes first, then memory."""
    data = make_dataset(tmp_path / "data", episodes=10, habit=1.0)
    words = ["policy=pi0_tiny", "policy.action_horizon=4", "policy.size.image_size=32", "policy.size.width=32"]
    words += ["policy.size.vision_width=32", "trainer.device=cpu", "telemetry.tensorboard=false", "sft.lr=0.003"]
    words += ["sft.steps=400", "sft.held_out=0.2", "sft.eval_period=25", "sft.workers=0", "sft.eval_samples=40"]
    run = tmp_path / "run"
    assert train_sft.main([str(data), str(run), *words]) == 0
    rows = [json.loads(line) for line in (run / "metrics" / "trainer.jsonl").read_text().splitlines()]
    curve = [(row["held_out/loss"], row["step"]) for row in rows if "held_out/loss" in row]
    (first, _), (lowest, at), (last, _) = curve[0], min(curve), curve[-1]
    assert lowest < 0.8 * first
    assert last > 1.2 * lowest
    assert json.loads((run / "best" / "best.json").read_text())["step"] == at < 400
    best = json.loads((run / "best" / "latest.json").read_text())
    assert best["step"] == at
