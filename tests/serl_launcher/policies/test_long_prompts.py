"""A task's text that is longer than the policy reads: PI0.5 keeps its state, and the log says what is cut."""

import logging

import numpy as np
import pytest
import torch
from checkpoints import SPEC, make_tokenizer
from tiny import SPEC as TINY

from serl_launcher.policies.base import PolicyInput
from serl_launcher.policies.pi0.build import build_pi0, build_pi05
from serl_launcher.policies.pi0.pi05 import state_prompts
from serl_launcher.policies.pi0.tiny import TinyPI05Size, TinySize
from serl_launcher.policies.tokens import WordHashTokenizer

SHAPE = dict(width=16, vision_width=16, image_size=32)
LONG = "look at the table in front of the robot, take the blue ballpoint pen beside the mug and put it into the holder"


def read(policy, prompt, state):
    """The token ids that count, of one observation."""
    images = {camera: np.zeros((1, 32, 32, 3), np.uint8) for camera in policy.cameras}
    tensors = policy.prepare(PolicyInput(images, np.float32([state]), [prompt]))
    return tensors["ids"][tensors["mask"]].tolist()


@pytest.fixture(scope="module", params=["its own tokenizer", "hashed words"])
def policy(request, tmp_path_factory):
    own = request.param == "its own tokenizer"
    words = str(make_tokenizer(tmp_path_factory.mktemp("tokenizer"))) if own else None
    size = TinyPI05Size(prompt_tokens=72 if own else 16, **SHAPE)
    return build_pi05("t", SPEC if own else TINY, "random", 0, 4, size, tokenizer=words)


def test_the_padded_length_depends_on_the_text_and_not_on_the_state(policy):
    """A CUDA graph or compiled code is made for a length: one more digit must not ask for another."""
    found = []
    for state in ([-0.999, -1, 0.001], [1.0, 1.0, 2.0], [-2.0, 0.3, 1.1]):
        images = {camera: np.zeros((1, 32, 32, 3), np.uint8) for camera in policy.cameras}
        tensors = policy.prepare(PolicyInput(images, np.float32([state]), ["lift"]))
        assert not tensors["ids"][~tensors["mask"]].any()  # padding is the tokenizer's, id 0 in both
        found.append((tensors["ids"].shape[1], int(tensors["mask"].sum())))
    lengths, counts = zip(*found, strict=True)
    assert len(set(lengths)) == 1
    assert len(set(counts)) == (1 if isinstance(policy.tokenizer, WordHashTokenizer) else 3)
    assert max(counts) <= lengths[0]


def test_the_text_is_cut_the_state_is_not_and_it_is_said_once(policy, caplog):
    low, high = [-0.9, 0.1, -0.3], [0.9, -0.7, 0.2]
    with caplog.at_level(logging.WARNING, "policy"):
        first, second = (read(policy, LONG, state) for state in (low, high))
    assert first != second
    assert max(len(first), len(second)) <= policy.tokenizer.length
    bins = state_prompts([""], policy.state_units.to_model(torch.tensor([low])).numpy())[0].removeprefix("Task: ")
    behind, mask = policy.tokenizer([bins])
    behind = behind[mask].tolist()
    assert first[-len(behind) + 2 :] == behind[2:]  # whole, to the last token; the first ones join with the text
    (told,) = [r.getMessage() for r in caplog.records if "prompt of" in r.getMessage()]
    assert f"the policy reads {policy.tokenizer.length}" in told
    assert "is cut off, the state is read whole" in told


def test_a_text_that_fits_is_read_whole_and_nothing_is_said(policy, caplog):
    assert read(policy, "lift", [0, 0, 0]) != read(policy, "lift it", [0, 0, 0])
    assert "prompt of" not in caplog.text


def test_a_state_that_alone_is_too_long_is_refused(policy):
    length, policy.tokenizer.length = policy.tokenizer.length, 4
    try:
        with pytest.raises(ValueError, match=r"before any task text \(the state is in it\), the policy reads 4"):
            read(policy, "turn", [0, 0, 0])
    finally:
        policy.tokenizer.length = length


def test_pi0_says_that_the_tail_is_not_read(caplog):
    policy = build_pi0("t", TINY, "random", 0, 4, TinySize(prompt_tokens=4, **SHAPE))
    assert read(policy, "put the pen away now", [0, 0, 0]) == read(policy, "put the pen away later", [0, 0, 0])
    assert caplog.text.count("prompt of 5 tokens, the policy reads 4: its tail is cut off") == 2
