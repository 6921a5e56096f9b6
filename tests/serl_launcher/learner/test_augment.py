"""Pictures changed at random: by hand-computed shifts, against torchvision's colours, the same after a kill."""

import numpy as np
import pytest
import torch
from tiny import random_batch
from torchvision.transforms.v2 import functional
from trainer_rig import make, put

from serl_launcher.learner.augment import Augment, brighter, contrasted, saturated, shifted, turned
from serl_launcher.replay.learning import LearningBatch

OFF = {"shift": 0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
CPU = torch.device("cpu")


def test_a_picture_is_shifted_as_padded_and_cropped():
    picture = torch.arange(9, dtype=torch.uint8).view(1, 3, 3, 1).expand(3, 3, 3, 3)
    #  0 1 2     down by one: each pixel is the one below it      right by two: the right edge is repeated
    #  3 4 5
    #  6 7 8
    moved = shifted(picture, torch.tensor([[1, 0], [0, 2], [-1, -1]]))[..., 0]
    assert moved[0].tolist() == [[3, 4, 5], [6, 7, 8], [6, 7, 8]]
    assert moved[1].tolist() == [[2, 2, 2], [5, 5, 5], [8, 8, 8]]
    assert moved[2].tolist() == [[0, 0, 1], [0, 0, 1], [3, 3, 4]]
    by = torch.tensor([[-4, 3]])
    large = torch.randint(0, 256, (1, 20, 24, 3), dtype=torch.uint8)
    padded = torch.nn.functional.pad(large.permute(0, 3, 1, 2).float(), [4] * 4, mode="replicate")
    assert torch.equal(shifted(large, by).permute(0, 3, 1, 2).float(), padded[..., 0:20, 7:31])


@pytest.mark.parametrize(
    ("ours", "theirs", "draw"),
    [
        (brighter, functional.adjust_brightness, 1.3),
        (contrasted, functional.adjust_contrast, 0.6),
        (contrasted, functional.adjust_contrast, 1.4),
        (saturated, functional.adjust_saturation, 1.5),
        (saturated, functional.adjust_saturation, 0.0),
        (turned, functional.adjust_hue, 0.08),
        (turned, functional.adjust_hue, -0.5),
    ],
)
def test_colours_are_those_of_torchvision(ours, theirs, draw):
    pictures = torch.rand(5, 6, 7, 3)
    pictures[0] = 0.4  # grey: no hue
    pictures[1, ..., 1] = pictures[1, ..., 0]  # two channels alike
    mine = ours(pictures, torch.full((5, 1, 1, 1), draw))
    for picture, found in zip(pictures, mine, strict=True):
        torch.testing.assert_close(found.permute(2, 0, 1), theirs(picture.permute(2, 0, 1), draw), atol=1e-5, rtol=1e-5)


def test_each_camera_and_sample_has_draws_of_its_own_and_a_rank_its_rows_of_them():
    augment = Augment(**OFF | {"shift": 3, "hue": 0.1})
    batch = random_batch(6)
    same = {camera: np.repeat(batch.images["front"][:1], 6, 0) for camera in batch.images}
    for camera, pictures in same.items():
        batch.images[camera] = pictures
    whole = augment(batch, np.random.default_rng(1), CPU).images
    pictures = [row.numpy().tobytes() for x in whole.values() for row in x]
    assert len(set(pictures)) == len(pictures)
    part = type(batch)(**{f: getattr(batch, f) for f in batch.__dataclass_fields__} | {
        "images": {camera: x[2:4] for camera, x in same.items()}})  # fmt: skip
    mine = augment(part, np.random.default_rng(1), CPU, slice(2, 4), 6).images
    assert all(torch.equal(mine[camera], whole[camera][2:4]) for camera in whole)


def test_nothing_is_drawn_or_copied_where_all_is_off():
    batch, rng = random_batch(3), np.random.default_rng(0)
    before = rng.bit_generator.state
    assert Augment(**OFF)(batch, rng, CPU) is batch
    assert rng.bit_generator.state == before


def test_what_comes_of_a_transition_is_changed_apart_from_what_it_was_chosen_from(tmp_path, ring):
    put(ring, 0, "demo")
    trainer, _ = make(tmp_path, ring, "sac_pi0")
    trainer.data.refresh(str(ring.path))
    drawn = trainer.data._view.sample(np.random.default_rng(0), 4)
    assert isinstance(drawn, LearningBatch)
    for camera in drawn.transitions.images:
        drawn.transitions.next_images[camera][:] = drawn.transitions.images[camera]
    changed = Augment(**OFF | {"shift": 4})(drawn, np.random.default_rng(0), CPU).transitions
    assert any(not torch.equal(changed.images[c], changed.next_images[c]) for c in changed.images)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [("shift", 1.5, "whole number of pixels"), ("shift", -1, "at least 0"), ("hue", 0.6, "from 0 to 0.5"),
     ("contrast", "much", "from 0 to 1"), ("brightness", True, "from 0 to 1")],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_its_key(key, value, told):
    with pytest.raises(ValueError, match=rf"trainer\.augment\.{key}: expected .*{told}.*, got {value!r}"):
        Augment(**OFF | {key: value})


def test_a_resumed_run_sees_the_same_pictures(tmp_path, ring):
    for k in range(3):
        put(ring, k, "demo")
    changes = {"trainer__augment__shift": 2, "trainer__augment__saturation": 0.5}
    first, _ = make(tmp_path, ring, **changes)
    first.data.refresh(str(ring.path))
    first.data.sample(4)
    first.checkpoints.save()
    second, _ = make(tmp_path, ring, **changes)
    second.data.refresh(str(ring.path))
    for _ in range(2):
        mine, theirs = (trainer.data.sample(4).prepared["pixels"] for trainer in (first, second))
        assert torch.equal(mine, theirs)
