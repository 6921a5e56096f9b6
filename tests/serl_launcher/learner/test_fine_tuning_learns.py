"""What fine-tuning reaches: an overfit that held-out episodes show, a few episodes learned by heart, GR00T's recipe."""

import json

import pytest
import torch
import train_sft
from real_shapes import SHAPES, make
from sft_samples import make_dataset

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
POLICIES = {
    "pi0_tiny": ["policy=pi0_tiny", "policy.size.width=32", "policy.size.vision_width=32"],
    "groot_tiny": ["policy=groot_tiny", "algo=sft_groot"],
}
WORDS = ["policy.action_horizon=4", "policy.size.image_size=32", "trainer.device=cpu", "telemetry.tensorboard=false"]
WORDS += ["sft.lr=0.003", "sft.steps=400", "sft.eval_period=25", "sft.workers=0", "sft.eval_samples=40"]


@pytest.fixture(params=POLICIES)
def words(request):
    return [*POLICIES[request.param], *WORDS]


@pytest.fixture(scope="module")
def by_heart(tmp_path_factory):
    """Episodes with offsets that can only be learned by heart."""
    return make_dataset(tmp_path_factory.mktemp("data") / "data", episodes=10, habit=1.0)


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics" / "trainer.jsonl").read_text().splitlines()]


def test_held_out_loss_falls_then_rises_and_the_best_version_is_that_of_its_lowest(by_heart, words, tmp_path):
    """What is common comes first, then memory."""
    run = tmp_path / "run"
    assert train_sft.main([str(by_heart), str(run), *words, "sft.held_out=0.2"]) == 0
    curve = [(row["held_out/loss"], row["step"]) for row in rows_of(run) if "held_out/loss" in row]
    (first, _), (lowest, at), (last, _) = curve[0], min(curve), curve[-1]
    assert lowest < 0.8 * first, curve
    assert last > 1.2 * lowest, curve
    assert json.loads((run / "best" / "best.json").read_text())["step"] == at < 400
    best = json.loads((run / "best" / "latest.json").read_text())
    assert best["step"] == at


def test_two_episodes_are_learned_by_heart_and_the_overfit_check_says_so(by_heart, words, tmp_path, capsys):
    run = tmp_path / "run"
    command = [str(by_heart), str(run), *words, "sft.overfit=2", "sft.steps=1500"]
    assert train_sft.main(command) == 0
    said = capsys.readouterr().out
    assert "overfit check: the first 2 of 10 episodes train and are measured" in said
    assert "overfit check passed at step " in said
    measured = [row for row in rows_of(run) if "overfit/open_loop_mse" in row]
    assert measured[-1]["overfit/open_loop_mse"] < 0.1 * measured[0]["overfit/open_loop_mse"]
    assert not (run / "best").exists()
    assert train_sft.main(command) == 0, "it is learned already"
    assert rows_of(run)[-1]["step"] == measured[-1]["step"]


def test_groots_recipe_is_one_command(tmp_path):
    """As it is written, at tiny size: keys of the recipe that nobody overrides hold in what was trained."""
    recipe = train_sft.configured(["algo=sft_groot", "sft=groot_so101"])
    told = [recipe.sft[key] for key in ("steps", "batch_size", "warmup", "save_period")]
    assert (recipe.policy.name, *told) == ("groot_n1_7", 10_000, 32, 0.05, 1_000)
    data, run = make(tmp_path / "set", SHAPES[0], episodes=6, ticks=6), tmp_path / "run"
    words = ["algo=sft_groot", "sft=groot_so101", "policy=groot_tiny", "policy.size.image_size=32", "sft.batch_size=4"]
    assert train_sft.main([str(data), str(run), *words, "sft.steps=3", "trainer.device=cpu", "sft.log_period=1"]) == 0
    assert [row["step"] for row in rows_of(run)] == [1, 2, 3]
    (checkpoint,) = (run / "checkpoints").iterdir()
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert {group["weight_decay"] for group in state["policy"]["param_groups"]} == {0.05}
    assert (run / "modality.json").is_file(), "an export needs it"
