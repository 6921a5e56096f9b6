"""Supervised fine-tuning of the tiny policies on a LeRobot dataset."""

import importlib.util
from functools import partial

import numpy as np
import pytest
import torch
import train_sft
from accelerate import Accelerator
from sft_samples import EPISODES, TICKS, make_dataset

from serl_launcher.agents.flow_matching import FlowMatchingAgent
from serl_launcher.datasets.dataset import Dataset
from serl_launcher.learner.learner import Learner, Schedule
from serl_launcher.learner.sampling import ShuffledRows, batches, seed_noise
from serl_launcher.learner.sft import Chunks
from serl_launcher.policies.base import frozen_hash
from serl_launcher.policies.groot.build import build_groot
from serl_launcher.policies.groot.tiny import TinyGrootSize
from serl_launcher.policies.groot_n1_5.build import build_groot_n1_5
from serl_launcher.policies.groot_n1_5.sizes import TinyN15Size
from serl_launcher.policies.groot_n1_6.build import build_groot_n1_6
from serl_launcher.policies.groot_n1_6.sizes import TinyN16Size
from serl_launcher.policies.pi0.build import build_pi0, build_pi05
from serl_launcher.policies.pi0.tiny import TinyPI05Size, TinySize

AH = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "sft")


def chunks_of(folder):
    data = Dataset(folder)
    return Chunks(data.rows(data.spec()), AH)


@pytest.fixture(scope="module")
def chunks(folder):
    """The whole dataset, opened once."""
    return chunks_of(folder)


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


TINY = dict(width=64, vision_width=32, image_size=32)
BUILDS = {
    "pi0": partial(build_pi0, size=TinySize(**TINY), train="expert"),
    "pi0_full": partial(build_pi0, size=TinySize(**TINY)),
    "pi05": partial(build_pi05, size=TinyPI05Size(**TINY)),
    "groot": partial(build_groot, size=TinyGrootSize(image_size=32), tune={"llm": False, "visual": False}),
    "groot_n1_6": partial(build_groot_n1_6, size=TinyN16Size(image_size=28), tune={"llm": False, "visual": False}),
    "groot_n1_5": partial(build_groot_n1_5, size=TinyN15Size(image_size=28), tune={"llm": False, "visual": False}),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BUILDS)
def test_the_loss_falls_to_a_fifth_and_frozen_parts_stay_bit_equal(kind, chunks):
    if "groot" in kind and importlib.util.find_spec("diffusers") is None:
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
    losses, schedule = [], Schedule(steps=steps, warmup=20)
    for step, batch in enumerate(batches(chunks, ShuffledRows(np.arange(len(chunks)), 8, 0, 0, steps), workers=0)):
        seed_noise(0, step)
        losses.append(learner.step(batch, schedule.scale(step))["losses/flow"].item())
    assert np.mean(losses[-20:]) <= 0.2 * np.mean(losses[:3]), (losses[:3], np.mean(losses[-20:]))
    assert frozen_hash(policy) == before


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("sft.stps=4", "unknown key 'sft.stps' in 'sft.stps=4'; did you mean 'sft.steps'"),
        ("sft.steps=abc", "sft.steps in 'sft.steps=abc' must be a whole number (default 1000), got 'abc'"),
        ("sft.steps=0", "sft.steps: expected a whole number of at least 1, got 0"),
        ("sft=groot_so100", "no sft is called 'groot_so100'; did you mean 'groot_so101'"),
        ("checkpoint_path=runs/old", "fine-tuning begins from policy.checkpoint=<folder>"),
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
