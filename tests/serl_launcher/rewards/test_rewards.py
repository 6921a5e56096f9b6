"""Reward classifiers: labels and split by hand, judging by hand, a classifier that learns, and served over sockets."""

import numpy as np
import pytest
import torch
from PIL import Image

from serl_launcher.replay.relabelled import Relabelled
from serl_launcher.rewards.judging import (
    balanced_accuracy,
    best_threshold,
    confusion,
    episode_score,
    precision_recall,
    verdict_at,
)
from serl_launcher.rewards.labels import (
    LabelledEpisode,
    label_episodes,
    outcome_labels,
    process_labels,
    split_by_episode,
)
from serl_launcher.rewards.model import RewardCard, RewardClassifier, load, save
from serl_launcher.rewards.server import RewardServer
from serl_launcher.rewards.training import Fit, Labelled, plot, train
from serl_transport.client import TrainerClient
from serl_transport.config import TrainerConfig
from serl_transport.contract.errors import SchemaMismatch
from serl_transport.contract.schema import Episode, EpisodeInfo, Outcome
from serl_transport.contract.specs import TaskSpec

SPEC = TaskSpec.from_dict(
    {
        "name": "light",
        "prompt": "switch the light on",
        "cameras": {"front": [16, 16]},
        "state_names": ["x"],
        "state_low": [0],
        "state_high": [1],
        "action_names": ["dx"],
        "action_low": [-1],
        "action_high": [1],
        "control_hz": 10,
        "max_ticks": 20,
    }
)


def card(kind="outcome", classes=2, **settings):
    return RewardCard(kind, classes, ("front",), 16, False, SPEC.to_dict(), **settings)


def episode(ordinal, success, rng, kind="outcome", n=10):
    """A bright square grows with time in a success, and stays away in a failure; noise all over."""
    images = rng.integers(0, 120, (n + 1, 16, 16, 3), dtype=np.uint8)
    for tick in range(n + 1):
        side = round(8 * tick / n) if success else 0
        images[tick, :side, :side] = 255
    label = outcome_labels(n, success, 2, 2) if kind == "outcome" else process_labels(n, success, 3)
    return LabelledEpisode(ordinal, f"e{ordinal}", success, {"front": images}, np.zeros((n + 1, 1), np.float32), label)


def episodes(n, kind="outcome"):
    rng = np.random.default_rng(0)
    return [episode(i, i % 2 == 0, rng, kind) for i in range(n)]


def test_labels_by_hand():
    assert outcome_labels(5, False, 2, 2).tolist() == [0] * 6
    assert outcome_labels(5, True, 2, 2).tolist() == [0, 0, -1, -1, 1, 1]
    assert process_labels(5, True, 3).tolist() == [0, 0, 1, 1, 2, 2]
    assert process_labels(5, False, 3).tolist() == [-1] * 6


def recorded(name, success, source, truncated_by=None):
    """An episode of three ticks as the journal gives it."""
    who = EpisodeInfo(name, "a", "b", SPEC.name, SPEC.prompt, "online", "online", 0, 0.0)
    arrays = {
        "observation.images.front": np.zeros((4, 16, 16, 3), np.uint8),
        "observation.state": np.zeros((4, 1), np.float32),
        "action": np.zeros((3, 1), np.float32),
        "next.reward": np.zeros(3, np.float32),
    }
    flags = {f"next.{key}": np.zeros(3, bool) for key in ("done", "truncated", "success")}
    return Episode(who, Outcome(success, source, truncated_by), arrays | flags)


def test_a_classifiers_own_word_is_no_label_until_a_person_gives_theirs(tmp_path):
    words = [
        recorded("fooled", True, "classifier"), recorded("silent", False, "classifier", "time_limit"),
        recorded("late", False, "human", "time_limit"), recorded("done", True, "environment"),
        recorded("stopped", False, "human", "stop"),
    ]  # fmt: skip
    found, unjudged = label_episodes(enumerate(words), ["front"], "outcome", 2, 1, 1)
    assert ([(e.episode_id, e.success) for e in found], unjudged) == ([("late", False), ("done", True)], 2)
    labels = Relabelled(tmp_path)
    labels.add({"fooled": False, "silent": False}, "ana", "2026-01-01T12:00:00+00:00")
    found, unjudged = label_episodes(enumerate(map(labels.correct, words)), ["front"], "outcome", 2, 1, 1)
    told = [(e.episode_id, e.success) for e in found]
    assert (told, unjudged) == ([("fooled", False), ("silent", False), ("late", False), ("done", True)], 0)
    assert found[0].label.tolist() == [0, 0, 0, 0]


def test_no_episode_is_on_two_sides_and_both_classes_are_on_each():
    split = split_by_episode(episodes(20), (0.2, 0.2), "outcome", np.random.default_rng(0))
    sides = [{e.ordinal for e in side} for side in (split.train, split.validation, split.test)]
    assert sides[0] | sides[1] | sides[2] == set(range(20))
    assert sum(map(len, sides)) == 20
    for side in (split.train, split.validation, split.test):
        assert {e.success for e in side} == {True, False}


def test_a_run_with_successes_only_is_refused_in_words():
    only = [e for e in episodes(20) if e.success]
    with pytest.raises(ValueError, match=r"at least 3 failed episodes .* has 10 successful, 0 failed"):
        split_by_episode(only, (0.2, 0.2), "outcome", np.random.default_rng(0))


def test_judging_by_hand():
    table = confusion(np.array([1, 1, 1, 0]), np.array([1, 1, 0, 0]), 2)
    assert table.tolist() == [[1, 0], [1, 2]]
    assert balanced_accuracy(table) == pytest.approx((1 + 2 / 3) / 2)
    # 0.2 and 0.3 are failures, 0.6 and 0.9 successes: the middle of the gap.
    assert best_threshold(np.array([0.2, 0.3, 0.6, 0.9]), np.array([0, 0, 1, 1], bool)) == pytest.approx(0.45)
    precision, recall = precision_recall(np.array([0.9, 0.6, 0.3]), np.array([True, False, True]))
    assert precision.tolist() == pytest.approx([1, 1 / 2, 2 / 3])
    assert recall.tolist() == pytest.approx([1 / 2, 1 / 2, 1])
    assert episode_score(np.array([0.5, 0.9]), patience=3) == 0.0


def test_the_moment_of_a_verdict_by_hand():
    said = np.array([0.6, 0.1, 0.7, 0.8, 0.9])
    assert [verdict_at(said, 0.5, patience) for patience in (1, 2, 3, 4)] == [0, 3, 4, None]
    assert verdict_at(said, 0.95, 1) is None
    assert verdict_at(said[:1], 0.5, 2) is None


def test_half_of_what_is_no_success_yet_comes_from_episodes_that_will_be_one():
    rng = np.random.default_rng(0)
    data = Labelled.of([episode(0, True, rng), episode(1, False, rng)])  # labels: 7 × 0, 2 × −1, 2 × 1; 11 × 0
    before, never, *success = data.strata("outcome")
    assert (before.tolist(), never.tolist()) == (list(range(7)), list(range(9, 20)))
    assert [part.tolist() for part in success] == [[7, 8], [7, 8]]
    assert [len(part) for part in Labelled.of([episode(1, True, rng, "process")]).strata("process")] == [4, 4, 3]


def test_a_verdict_does_not_come_before_the_end():
    """The square is at three quarters of its size a little before: a threshold that only parts episodes fires there."""
    split = split_by_episode(episodes(24), (0.2, 0.2), "outcome", np.random.default_rng(0))
    model, calibrated, figures = train(split, card(), Fit(steps=60, shift=1), seed=0, tell=lambda line: None)
    assert figures["observations_early"]["worst"] <= 3  # the last two are success by their label, two before unknown
    for begun in (e for e in split.validation if e.success):
        said = model.probabilities(begun.images, begun.state)[begun.label == 0, 1]
        assert verdict_at(said, calibrated.threshold, 1) is None


def test_an_outcome_classifier_learns_is_calibrated_and_survives_saving(tmp_path):
    split = split_by_episode(episodes(24), (0.2, 0.2), "outcome", np.random.default_rng(0))
    model, calibrated, figures = train(split, card(), Fit(steps=60, shift=1), seed=0, tell=lambda line: None)
    assert figures["episode_balanced_accuracy"] == 1.0
    assert figures["frame_balanced_accuracy"] > 0.9
    assert 0 < calibrated.threshold < 1
    save(tmp_path, model, calibrated, figures)
    plot(figures, "outcome", tmp_path)
    for name in ("confusion.png", "precision_recall.png"):
        assert Image.open(tmp_path / name).size[0] > 100
    again, test = load(tmp_path), split.test[0]
    assert again.card == calibrated
    np.testing.assert_allclose(
        again.probabilities(test.images, test.state), model.probabilities(test.images, test.state), rtol=1e-5
    )


def test_a_process_classifier_learns_the_stages():
    split = split_by_episode(episodes(40, "process"), (0.2, 0.2), "process", np.random.default_rng(0))
    _, _, figures = train(split, card("process", 3), Fit(steps=150, shift=0), seed=0, tell=lambda line: None)
    assert np.array(figures["frame_confusion"]).shape == (3, 3)
    assert figures["frame_balanced_accuracy"] > 0.8


@pytest.mark.parametrize("size", [1, 15, 16, 40, 100])
def test_any_image_size_fits(size):
    model = RewardClassifier(RewardCard("outcome", 2, ("front",), size, False, SPEC.to_dict()))
    said = model.probabilities({"front": np.zeros((1, 16, 16, 3), np.uint8)}, np.zeros((1, 1), np.float32))
    assert said.shape == (1, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, r"fit\.batch_size: expected 1 or more, got 0"),
        ({"steps": 0}, r"fit\.steps: expected 1 or more"),
        ({"lr": 0.0}, r"fit\.lr: expected a number above 0"),
        ({"lr": float("nan")}, r"fit\.lr: expected a number above 0, got nan"),
    ],
)
def test_a_fit_that_cannot_work_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Fit(**settings)


def test_a_loss_that_is_no_number_ends_the_training():
    split = split_by_episode(episodes(24), (0.2, 0.2), "outcome", np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"the loss is nan at step \d+: fit\.lr=1e\+30 is too high"):
        train(split, card(), Fit(steps=20, lr=1e30), seed=0, tell=lambda line: None)


def test_shares_that_leave_nothing_to_train_on_are_refused():
    with pytest.raises(ValueError, match="validation_share, test_share: expected above 0 and below 1 in sum"):
        split_by_episode(episodes(20), (0.6, 0.4), "outcome", np.random.default_rng(0))


def test_a_folder_without_a_classifier_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"reward.json"):
        load(tmp_path / "nothing")


@pytest.fixture
def served():
    torch.manual_seed(0)
    model = RewardClassifier(card(threshold=0.3)).eval()
    reward = RewardServer(model, SPEC, TrainerConfig(port_number=0, broadcast_port=0, request_types=["reward"]))
    reward.server.start(threaded=True)
    client = TrainerClient("a", "127.0.0.1", reward.server.config, spec=SPEC)
    yield model, client
    client.stop()
    reward.server.stop()


def test_the_server_answers_what_the_model_says(served):
    model, client = served
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    state = np.zeros(1, np.float32)
    answer = client.request("reward", {"images": {"front": image}, "state": state})
    want = model.probabilities({"front": image[None]}, state[None])[0]
    np.testing.assert_allclose(answer["probabilities"], want, rtol=1e-5)
    assert (answer["kind"], answer["threshold"], answer["patience"]) == ("outcome", 0.3, 1)
    with pytest.raises(SchemaMismatch, match="reward: expected"):
        client.request("reward", {"images": {}, "state": state})


def test_a_classifier_of_another_task_is_refused():
    other = TaskSpec.from_dict(SPEC.to_dict() | {"state_low": [-1]})
    with pytest.raises(ValueError, match="another task"):
        RewardServer(RewardClassifier(card()), other, TrainerConfig(port_number=0, broadcast_port=0))
