"""Supervised fine-tuning of the three tiny policies on a LeRobot dataset."""

import importlib.util
import sys
from functools import partial

import numpy as np
import pytest
import torch
import train_sft
from accelerate import Accelerator
from lerobot.datasets import LeRobotDatasetMetadata
from sft_samples import EPISODES, TICKS, add_modality, make_dataset

from serl_launcher.agents.flow_matching import FlowMatchingAgent
from serl_launcher.learner.learner import Learner, Schedule
from serl_launcher.learner.modality import Modality
from serl_launcher.learner.sft import Chunks, Columns, batches, open_dataset, spec_of, train
from serl_launcher.policies.base import frozen_hash
from serl_launcher.policies.groot.build import build_groot
from serl_launcher.policies.groot.tiny import TinyGrootSize
from serl_launcher.policies.pi0.build import build_pi0, build_pi05
from serl_launcher.policies.pi0.tiny import TinyPI05Size, TinySize

AH = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "sft")


def chunks_of(folder, max_samples=None):
    meta = LeRobotDatasetMetadata("local/sft", root=folder)
    modality = Modality.read(folder)
    if modality:
        columns, names = modality.columns, (modality.names("state"), modality.names("action"))
    else:
        columns, names = Columns({c: f"observation.images.{c}" for c in ("front", "wrist")}, *PLAIN), (None, None)
    return Chunks(folder, spec_of(meta, columns, *names), AH, columns, max_samples)


PLAIN = [("observation.state", slice(None))], [("action", slice(None))]


@pytest.fixture(scope="module")
def chunks(folder):
    """The whole dataset, opened once."""
    return chunks_of(folder)


@pytest.fixture(scope="module")
def few(folder):
    """Its first five samples."""
    return chunks_of(folder, max_samples=5)


def test_chunks_are_the_recorded_actions_and_end_with_the_episode(chunks):
    assert len(chunks) == EPISODES * TICKS
    middle, last = chunks[TICKS + 3], chunks[TICKS - 2]
    phase = (np.arange(4) + 3) / TICKS
    np.testing.assert_allclose(middle["action"][:, 1], 3 * phase - 1, atol=1e-6)
    np.testing.assert_allclose(middle["state"], [3 / TICKS, 0.5, np.sin(9 / TICKS)], atol=1e-6)
    assert middle["is_pad"].tolist() == [False] * 4
    assert last["is_pad"].tolist() == [False, False, True, True]
    batch = chunks.collate([middle, last])
    assert batch.is_pad.tolist() == [[False] * 4, [False, False, True, True]]
    assert batch.weight.tolist() == [1, 1]
    assert middle["image.front"].dtype == np.uint8
    assert middle["image.front"][-1, -1].tolist() == [100, 100, 100]


def test_batches_are_shuffled_by_seed_and_a_dataset_too_small_is_told(chunks, few):
    first, again, other = (next(batches(chunks, 8, seed)) for seed in (1, 1, 2))
    assert np.array_equal(first.state, again.state)
    assert not np.array_equal(first.state, other.state)
    with pytest.raises(ValueError, match="5 samples do not fill a batch of 8"):
        next(batches(few, 8, 0))


def test_max_samples_takes_the_first_ones(folder, chunks, few):
    assert (len(few), len(chunks_of(folder, max_samples=10**6))) == (5, EPISODES * TICKS)
    seen = {tuple(state) for _, batch in zip(range(4), batches(few, 5, 0), strict=False) for state in batch.state}
    assert seen == {tuple(chunks[k]["state"]) for k in range(5)}


def test_modality_json_selects_half_open_ranges(tmp_path):
    folder = make_dataset(tmp_path / "sft")
    add_modality(folder)
    chunks = chunks_of(folder)
    assert chunks.spec.state_names == ("tail.0", "tail.1", "head.0")
    assert list(chunks.spec.cameras) == ["ego"]
    np.testing.assert_allclose(chunks[3]["state"], [0, np.sin(9 / TICKS), 3 / TICKS], atol=1e-6)
    path = folder / "meta" / "modality.json"
    path.write_text(path.read_text().replace('"end": 3', '"end": 1'))
    with pytest.raises(ValueError, match=r"state\.tail: expected 0 <= start < end, got 1 and 1"):
        Modality.read(folder)
    path.write_text(path.read_text().replace('"end": 1}', '"end": 9}'))
    with pytest.raises(ValueError, match=r"dataset: state: expected \d+ dims as in modality\.json, got \d"):
        chunks_of(folder)
    path.write_text(path.read_text().replace("front", "top"))
    with pytest.raises(ValueError, match=r"no column 'observation\.images\.top'"):
        chunks_of(folder)


TINY = dict(width=64, vision_width=32, image_size=32)
BUILDS = {
    "pi0": partial(build_pi0, size=TinySize(**TINY), train="expert"),
    "pi0_full": partial(build_pi0, size=TinySize(**TINY)),
    "pi05": partial(build_pi05, size=TinyPI05Size(**TINY)),
    "groot": partial(build_groot, size=TinyGrootSize(image_size=32), tune={"llm": False, "visual": False}),
}


def test_a_torchcodec_that_does_not_load_is_not_told_of(folder, monkeypatch, caplog, capfd):
    """As where FFmpeg is absent: pyav reads the videos, and nobody sees a page of tracebacks."""
    monkeypatch.setitem(sys.modules, "torchcodec", None)  # importing it raises ImportError
    assert open_dataset(folder)._video_backend == "pyav"
    assert "torchcodec" not in caplog.text + "".join(capfd.readouterr())


@pytest.mark.slow
@pytest.mark.parametrize("kind", BUILDS)
def test_the_loss_falls_to_a_fifth_and_frozen_parts_stay_bit_equal(kind, chunks):
    if kind == "groot" and importlib.util.find_spec("diffusers") is None:
        pytest.skip("GR00T's action head needs lerobot[groot]")
    torch.manual_seed(0)
    policy = BUILDS[kind](kind, chunks.spec, "random", 0, AH)
    before = frozen_hash(policy)
    learner = Learner(
        FlowMatchingAgent(policy, noise_samples=4),
        partial(torch.optim.AdamW, lr=3e-3, weight_decay=1e-4),
        Accelerator(cpu=True),
        max_grad_norm=1.0,
        ema_decay=0.99,
    )
    steps = 400
    losses = [m["losses/flow"] for m in train(learner, chunks, steps, 8, 0, Schedule(steps=steps, warmup=20))]
    assert np.mean(losses[-20:]) <= 0.2 * np.mean(losses[:3]), (losses[:3], np.mean(losses[-20:]))
    assert frozen_hash(policy) == before


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("sft.stps=4", "unknown key 'sft.stps' in 'sft.stps=4'; did you mean 'steps'"),
        ("sft.steps=abc", "sft.steps in 'sft.steps=abc' must be a whole number, at least 1 (default 1000), got 'abc'"),
        ("sft.lr=-1", "a number, at least 0 (default 0.0005), got '-1'"),
        ("trainer.max_grad_norm=abc", "trainer.max_grad_norm in 'trainer.max_grad_norm=abc' must be"),
        ("sft.batch_size=1000", "60 samples do not fill a batch of 1000"),
    ],
)
def test_a_word_that_is_wrong_is_one_message_and_leaves_the_output_free(folder, tmp_path, capsys, word, told):
    assert train_sft.main([str(folder), str(tmp_path / "out"), "policy=pi0_tiny", word]) == 2
    said = capsys.readouterr().err
    assert said.startswith("train_sft: ")
    assert told in said
    assert not (tmp_path / "out").exists()
