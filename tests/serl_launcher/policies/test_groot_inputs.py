"""What runs on the host before GR00T's first layer: pictures as the library's processor makes them, prompts once."""

import numpy as np
import pytest
import torch
from test_groot_lerobot import make_processor

from serl_launcher.policies.groot.inputs import Geometry, PatchRule, QwenInputs, by_size
from serl_launcher.policies.groot.prompts import PromptRows, left_padded

CPU = torch.device("cpu")
RELEASED = {"shortest_edge": 65536, "longest_edge": 16777216}  # Qwen3-VL's


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    from transformers import Qwen2VLImageProcessor

    folder = make_processor(tmp_path_factory.mktemp("processor") / "qwen")
    shape = dict(patch_size=16, temporal_patch_size=2, merge_size=2, image_mean=[0.5, 0.4, 0.3], image_std=[0.5] * 3)
    Qwen2VLImageProcessor(size=RELEASED, **shape).save_pretrained(folder)
    return str(folder)


def pictures(b, **sizes):
    rng = np.random.default_rng(0)
    return {camera: rng.integers(0, 256, (b, h, w, 3), dtype=np.uint8) for camera, (h, w) in sizes.items()}


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize(
    "sizes",
    [
        dict(front=(224, 224), side=(224, 224), wrist=(224, 224)),  # grown to the least number of pixels
        dict(front=(480, 640), side=(100, 180), wrist=(480, 640)),
        dict(front=(256, 256), wrist=(250, 270)),  # one grid in the end
    ],
)
def test_pictures_of_real_sizes_are_the_librarys(processor, sizes, frames):
    inputs = QwenInputs(processor, tuple(sizes), Geometry(target=None), frames=frames)
    images = pictures(2, **sizes)
    ours = inputs(images, ["lift", "lift"], CPU)
    order = [torch.as_tensor(images[c][b]).permute(2, 0, 1) for b in range(2) for _ in range(frames) for c in sizes]
    theirs = inputs.pictures(images=order, return_tensors="pt")
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
    assert torch.equal(ours["image_grid_thw"], theirs["image_grid_thw"])
    tokens = theirs["image_grid_thw"].prod(-1).view(2, -1).sum(1) // 4
    image = inputs.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert torch.equal((ours["input_ids"] == image).sum(1), tokens)


def test_a_known_prompt_costs_no_tokenizer(processor, monkeypatch):
    inputs = QwenInputs(processor, ("front",), Geometry(target=None))
    small, large = pictures(2, front=(256, 256)), pictures(2, front=(256, 320))
    texts = {prompt: inputs._text(prompt, (64,)) for prompt in ("Lift!", "pick up the red cube")}
    first, both = inputs(small, ["Lift!"] * 2, CPU), inputs(small, [*texts], CPU)
    wide = inputs(large, ["Lift!"] * 2, CPU)
    want = inputs.tokenizer([*texts.values()], padding=True, pad_to_multiple_of=16, return_tensors="pt")
    assert torch.equal(both["input_ids"], want["input_ids"])
    assert torch.equal(both["attention_mask"], want["attention_mask"])
    assert torch.equal(
        first["input_ids"][0][first["attention_mask"][0] == 1], both["input_ids"][0][both["attention_mask"][0] == 1]
    )
    monkeypatch.setattr(inputs, "tokenizer", None)
    for images, prompts, before in ((small, ["Lift!"] * 2, first), (large, ["Lift!"] * 2, wide)):
        again = inputs(images, prompts, CPU)
        assert all(torch.equal(again[name], before[name]) for name in before)
    assert inputs(pictures(1, front=(256, 256)), ["Lift!"], CPU)["input_ids"].shape[0] == 1
    with pytest.raises(AttributeError, match="apply_chat_template"):
        inputs(small, ["another"] * 2, CPU)


def test_rows_that_are_kept_can_be_saved_for_a_backward_pass():
    rows = PromptRows(lambda prompts: left_padded([[1, 2]] * len(prompts), 0, 4))
    with torch.inference_mode():
        kept = rows(["a"], CPU)
    assert kept["input_ids"].tolist() == [[0, 0, 1, 2]]
    assert not kept["input_ids"].is_inference()
    assert rows(["a", "a"], CPU)["attention_mask"].tolist() == [[0, 0, 1, 1]] * 2


def test_cameras_of_one_size_are_one_batch():
    seen = []

    def change(images):
        seen.append(tuple(images.shape))
        return images[..., 0, 0].float()

    images = pictures(2, front=(32, 48), side=(64, 32), wrist=(32, 48))
    out = by_size(images, ("wrist", "side", "front"), CPU, change)
    assert sorted(seen) == [(2, 3, 64, 32), (4, 3, 32, 48)]
    for camera, got in zip(("wrist", "side", "front"), out, strict=True):
        assert np.array_equal(got.numpy(), images[camera][:, 0, 0].astype(np.float32))


def test_a_processor_that_leaves_out_a_step_is_refused(processor):
    from transformers import Qwen2VLImageProcessor

    with pytest.raises(ValueError, match=r"policy\.processor=here: do_normalize is false"):
        PatchRule.of(Qwen2VLImageProcessor(size=RELEASED, do_normalize=False), "here")
