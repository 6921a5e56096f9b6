"""GR00T N1.6 behind the flow-policy interface against what NVIDIA's own modules gave (n1_6_case.py), out and back."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import make_tokenizer
from n1_5_case import AH, SPEC, STEPS, B, chunk_noise_time, fill, measured, observation
from n1_6_case import SIZE, SLOT, two_sizes
from safetensors.torch import load_file, save_file

from serl_launcher.policies.base import flow_loss, sample
from serl_launcher.policies.checkpoint import CheckpointError
from serl_launcher.policies.groot.build import build_groot, release_of
from serl_launcher.policies.groot.tiny import TinyGrootSize
from serl_launcher.policies.groot_n1_6.build import build_groot_n1_6, meta_groot_n1_6
from serl_launcher.policies.groot_n1_6.eagle import run_eagle3
from serl_launcher.policies.groot_n1_6.inputs import Eagle3Inputs, Pictures, sides
from serl_launcher.policies.groot_n1_6.sizes import FullN16Size
from serl_launcher.policies.parameter_table import parameter_table

REFERENCE = json.loads((Path(__file__).parent / "n1_6_reference.json").read_text())
POOLING = "backbone.model.vision_model.vision_model.head."
LANGUAGE_HEAD = "backbone.model.language_model.lm_head.weight"


def random_policy(**options):
    policy = build_groot_n1_6("t", SPEC, "random", 0, AH, SIZE, **options)
    fill(policy.core)
    return policy


def loaded(folder, size=SIZE, **options):
    return build_groot_n1_6("t", SPEC, "checkpoint", 0, None, size, checkpoint=str(folder), **options)


@pytest.fixture(scope="module")
def policy():
    """Padding is attended to, as in the reference."""
    return random_policy(mask_padding=False)


def close(ours, theirs, **tolerance):
    torch.testing.assert_close(
        torch.as_tensor(ours), torch.as_tensor(theirs), **{"atol": 1e-5, "rtol": 1e-4, **tolerance}
    )


def test_the_tensors_are_nvidias_but_for_what_no_action_depends_on(policy):
    ours = {name: list(tensor.shape) for name, tensor in policy.core.state_dict().items()}
    dropped = [name for name in REFERENCE["tensors"] if name.startswith(POOLING) or name == LANGUAGE_HEAD]
    assert len(dropped) == 12
    assert ours == {name: shape for name, shape in REFERENCE["tensors"].items() if name not in dropped}


def test_features_and_samples_equal_nvidias(policy):
    with torch.no_grad():
        tensors = policy.prepare(observation())
        backbone = policy._run_backbone(tensors, tensors["attention_mask"] == 1)
        prefix = policy.encode(observation())
        samples = sample(policy, prefix, chunk_noise_time()[1], steps=STEPS)
        ids, views = two_sizes()
        given = (ids, ids >= 0, views, policy.image_token, torch.float32, False)
        wide = run_eagle3(policy.backbone.model, *given, *policy._backbone_layers)
    close(measured(backbone, "backbone"), REFERENCE["backbone"])
    close(measured(prefix.hidden, "hidden"), REFERENCE["hidden"])
    close(samples, REFERENCE["samples"])
    close(measured(wide, "two sizes"), REFERENCE["two_sizes"], atol=1e-4)


def test_loss_and_gradients_equal_nvidias(policy):
    chunk, noise, t = chunk_noise_time()
    policy.zero_grad()
    keep = torch.zeros(B, AH, dtype=torch.bool)
    loss = flow_loss(policy, policy.encode(observation()), chunk, keep, torch.ones(B), noise, t).mean()
    loss.backward()
    close(loss.detach(), REFERENCE["loss"])
    ours = {n.removeprefix("core."): p.grad for n, p in policy.named_parameters() if p.grad is not None}
    assert set(ours) == set(REFERENCE["gradients"])
    assert len(ours) > 100
    for name, gradient in ours.items():
        close(measured(gradient, name), REFERENCE["gradients"][name], rtol=1e-3, msg=name)


def test_a_state_that_is_left_out_is_a_learned_token(policy, monkeypatch):
    """Only with dropout, and only then is the token trained."""
    token = "core.action_head.mask_token"
    assert policy.dead_parameters() == {token}
    assert not dict(policy.named_parameters())[token].requires_grad
    dropping = random_policy(dropout=True).train()
    monkeypatch.setattr(torch, "rand", lambda *a, **k: torch.tensor([0.1, 0.3, 0.1]).view(3, 1, 1))
    prefix = dropping.encode(observation())
    learned = dropping.core.action_head.mask_token[0, 0]
    left_out = (prefix.state_features[:, 0] == learned).all(-1)
    assert left_out.tolist() == [True, False, True]
    dropping.tune(llm=True, visual=True, projector=False, diffusion_model=True, vlln=True)
    assert not learned.requires_grad or not dropping.core.action_head.mask_token.requires_grad


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As NVIDIA's file has it, with SigLIP's pooling head and the tied language head beside."""
    out = random_policy().save(tmp_path_factory.mktemp("n1_6") / "out", {"modality.json": {"state": {}}})
    tensors = load_file(out / "model.safetensors")
    for name, shape in REFERENCE["tensors"].items():
        if name.startswith(POOLING):
            tensors[name] = torch.ones(shape)
    tensors[LANGUAGE_HEAD] = tensors[LANGUAGE_HEAD.replace("lm_head", "model.embed_tokens")].clone()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_a_checkpoint_gives_the_actions_that_it_was_saved_with_and_saves_what_it_loaded(folder, tmp_path):
    policy, again = random_policy(), loaded(folder, tune={"llm": False, "visual": False})
    noise = chunk_noise_time()[1]
    with torch.no_grad():
        want = policy.physical_actions(sample(policy, policy.encode(observation()), noise, steps=STEPS))
        close(again.physical_actions(sample(again, again.encode(observation()), noise, steps=STEPS)), want)
    assert len(again.load_report.dropped) == 12
    assert again.embodiment == SLOT
    out = again.save(tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (folder, out))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == {
        "config.json", "backbone/config.json", "statistics.json", "processor_config.json", "embodiment_id.json",
        "modality.json", "model.safetensors", "action_head_new_embodiment.safetensors",
    }  # fmt: skip
    assert json.loads((out / "config.json").read_text())["model_type"] == "Gr00tN1d6"


def test_its_relative_actions_travel_with_the_checkpoint(tmp_path):
    """By the same files as N1.7's: its recipe is relative by default."""
    relative = {"exclude": ["g"], "low": [[-0.1, 0]] * AH, "high": [[0.3, 0]] * AH}
    policy = random_policy(relative=relative)
    again = loaded(policy.save(tmp_path / "out"))
    assert again.anchors == policy.anchors == (0, None)
    with torch.no_grad():
        chunk = chunk_noise_time()[0]
        for one in (policy, again):
            assert torch.equal(one.action_units.scale, policy.action_units.scale)
        prefix = again.encode(observation())
        close(again.physical_actions(chunk, prefix.anchor), policy.physical_actions(chunk, prefix.anchor))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("action_head.mask_token"), "missing action_head.mask_token"),
        (lambda t: t.update({"action_head.vl_self_attention.x": torch.ones(1)}), "unknown action_head.vl_self_att"),
        (lambda t: t["action_head.vlln.weight"].fill_(float("nan")), "action_head.vlln.weight: holds NaN"),
        (lambda t: t.update({"action_head.vlln.weight": torch.ones(3)}), r"expected shape \(32,\), got \(3,\)"),
    ],
)
def test_every_tensor_is_accounted_for(folder, tmp_path, change, message):
    broken = shutil.copytree(folder, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    change(tensors)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        loaded(broken)


def edited(folder, tmp_path, file, edit):
    out = shutil.copytree(folder, tmp_path / "edited")
    content = json.loads((out / file).read_text())
    edit(content)
    (out / file).write_text(json.dumps(content))
    return out


def keywords(**said):
    return lambda content: content["processor_kwargs"].update(said)


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        ("backbone/config.json", lambda c: c["vision_config"].update(use_rope=True), r"got \{'use_rope': True"),
        ("config.json", lambda c: c.update(reproject_vision=True), "reproject_vision: only false is read"),
        ("config.json", lambda c: c.update(model_type="Gr00tN1d7"), "of type Gr00tN1d6, got 'Gr00tN1d7'"),
        ("statistics.json", lambda c: c.clear(), "no normalisation statistics of embodiment 'new_embodiment'"),
        ("processor_config.json", keywords(use_albumentations=False), "use_albumentations: only true is read"),
        ("processor_config.json", keywords(use_albumentations=True, shortest_image_edge=None), "no size of pictures"),
        ("processor_config.json", keywords(apply_sincos_state_encoding=True,
            modality_configs={"new_embodiment": {"state": {"sin_cos_embedding_keys": ["all"]}}}), "sine and cosine"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_as_it_is_meant_is_refused(folder, tmp_path, file, edit, message):
    with pytest.raises(ValueError, match=message):
        loaded(edited(folder, tmp_path, file, edit))


def test_slots_of_a_release_that_lists_few_and_a_tokenizer_that_is_not_there(folder, tmp_path):
    """The released embodiment_id.json has no new_embodiment; NVIDIA's code knows its slot."""
    bare = edited(folder, tmp_path, "embodiment_id.json", lambda c: c.clear())
    assert loaded(bare).embodiment == SLOT
    with pytest.raises(ValueError, match=r"holds no tokenizer; name the folder .*Eagle-Block2A-2B-v2"):
        loaded(bare, size=FullN16Size())
    shutil.rmtree(bare / "backbone")
    with pytest.raises(CheckpointError, match=r"backbone 'backbone' and no backbone/config.json beside it"):
        loaded(bare)


def test_a_folder_of_n1_6_is_recognised_and_another_releases_policy_refuses_it(folder):
    from tools.sources import policy_of

    assert policy_of(folder) == "groot_n1_6"
    with pytest.raises(CheckpointError, match=r"Gr00tN1d7 or groot, got 'Gr00tN1d6'; policy=groot_n1_6 reads that"):
        build_groot("t", SPEC, "checkpoint", 0, None, TinyGrootSize(), checkpoint=str(folder))
    assert release_of("serl_launcher.policies.groot_n1_6.build.build_groot_n1_6").ticks == 50


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A folder with Eagle's special tokens, and how many tokens there are; a picture's is the last."""
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    source = make_tokenizer(tmp_path_factory.mktemp("eagle") / "tokenizer")
    words = AutoTokenizer.from_pretrained(source)
    words.add_tokens([AddedToken(w, special=True) for w in ("<img>", "</img>", "<IMG_CONTEXT>")])
    words.save_pretrained(source)
    return source, len(words)


def test_an_export_takes_the_tokenizer_along(tokenizer, tmp_path):
    """Its source may lack it, as NVIDIA's folders do."""
    source, vocabulary = tokenizer
    size = replace(SIZE, vocabulary=vocabulary)
    first = build_groot_n1_6("t", SPEC, "random", 0, AH, size, processor=str(source)).save(tmp_path / "first")
    shutil.rmtree(first / "processor")
    with pytest.raises(ValueError, match=rf"its <IMG_CONTEXT> is {vocabulary - 1}, the checkpoint's is 63"):
        loaded(random_policy().save(tmp_path / "other"), processor=str(source))
    again = loaded(loaded(first, size, processor=str(source)).save(tmp_path / "second"), size)
    assert isinstance(again.inputs, Eagle3Inputs)
    assert again.inputs.pictures == Pictures()
    assert again.encode(observation()).hidden.isfinite().all()


def test_prompts_and_pictures_are_prepared_as_theirs(tokenizer):
    source = tokenizer[0]
    pictures = Pictures(shortest_image_edge=64, crop_fraction=0.95)
    inputs = Eagle3Inputs(str(source), ("front", "wrist"), pictures)
    assert inputs.text("Lift it, now!", (2, 1)) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nlift it now"
        "<image 1><img><IMG_CONTEXT><IMG_CONTEXT></img><image 2><img><IMG_CONTEXT></img><|im_end|>\n"
    )
    images = {"front": np.zeros((2, 48, 64, 3), np.uint8), "wrist": np.full((2, 40, 40, 3), 255, np.uint8)}
    out = inputs(images, ["go", "lift it"], torch.device("cpu"))
    token = inputs._ids("<IMG_CONTEXT>")[0]
    assert (out["input_ids"] == token).sum(1).tolist() == [2 * 3 + 2 * 2] * 2  # 56 × 84 and 56 × 56 pixels
    assert out["attention_mask"][0, 0] == 0  # padded in front
    assert (out["pixel_values_0"].shape, out["pixel_values_1"].shape) == ((2, 3, 56, 84), (2, 3, 56, 56))
    assert (out["pixel_values_0"] == -1).all()
    assert (out["pixel_values_1"] == 1).all()


def test_sides_are_those_of_eagles_processor():
    """Multiples of 28 by rounding, at least 4 tokens, at most 4096 (its smart_resize)."""
    assert [sides(256, 256), sides(256, 340), sides(266, 10)] == [(252, 252), (252, 336), (280, 28)]
    assert sides(30, 30) == (56, 56)
    assert np.prod(sides(2000, 3000)) <= 4096 * 28**2


def test_the_released_size_is_that_of_the_released_file():
    """nvidia/GR00T-N1.6-3B: two files of 4.99 and 1.58 GB in bf16, with pooling head and language head."""
    policy, statistics = meta_groot_n1_6({"train": "expert"}, SPEC, FullN16Size())
    held = sum(p.numel() for p in policy.core.parameters())
    width, inner, vocabulary = 1152, 4304, 151680 * 2048
    pooling = width + 4 * (width**2 + width) + 2 * width + 2 * width * inner + inner + width
    assert abs(2 * (held + pooling + vocabulary) / 1e9 - 6.57) < 0.01
    assert statistics == "MIN_MAX"
    assert not any(p.requires_grad for p in policy.backbone.parameters())
    rows = {line[:26].strip(): line[26:].split() for line in parameter_table(policy).splitlines()[1:]}
    assert "action projections" not in rows
    assert 4.0e8 < int(rows["vision tower"][1].replace(",", "")) < 4.2e8
