"""GR00T N1.5 behind the flow-policy interface against what its public implementation gave (n1_5_reference.py)."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import make_tokenizer
from n1_5_case import AH, SIZE, SLOT, SPEC, STEPS, B, chunk_noise_time, fill, measured, observation
from safetensors.torch import load_file, save_file

from serl_launcher.policies.base import PolicyInput, flow_loss, sample
from serl_launcher.policies.checkpoint import CheckpointError
from serl_launcher.policies.groot.trainable import TUNE
from serl_launcher.policies.groot_n1_5.build import build_groot_n1_5, meta_groot_n1_5
from serl_launcher.policies.groot_n1_5.inputs import EagleInputs, Pictures
from serl_launcher.policies.groot_n1_5.sizes import FullN15Size
from serl_launcher.policies.parameter_table import parameter_table
from serl_launcher.policies.precision import hold

REFERENCE = json.loads((Path(__file__).parent / "n1_5_reference.json").read_text())
POOLING = "backbone.eagle_model.vision_model.vision_model.head."
LANGUAGE_HEAD = "backbone.eagle_model.language_model.lm_head.weight"


def random_policy(**options):
    policy = build_groot_n1_5("t", SPEC, "random", 0, AH, SIZE, embodiment=SLOT, **options)
    if options.get("train") != "lora":
        fill(policy.core)
    return policy


def loaded(folder, **options):
    return build_groot_n1_5("t", SPEC, "checkpoint", 0, None, SIZE, checkpoint=str(folder), **options)


@pytest.fixture(scope="module")
def policy():
    """Padding is attended to, as in the reference."""
    return random_policy(mask_padding=False)


def close(ours, theirs, **tolerance):
    torch.testing.assert_close(
        torch.as_tensor(ours), torch.as_tensor(theirs), **{"atol": 1e-5, "rtol": 1e-4, **tolerance}
    )


def test_the_tensors_are_those_of_the_reference_but_for_what_no_action_depends_on(policy):
    ours = {name: list(tensor.shape) for name, tensor in policy.core.state_dict().items()}
    theirs = dict(REFERENCE["tensors"])
    dropped = [name for name in theirs if name.startswith(POOLING) or name == LANGUAGE_HEAD]
    assert len(dropped) == 12
    assert ours == {name: shape for name, shape in theirs.items() if name not in dropped}


def test_features_and_samples_equal_the_references(policy):
    with torch.no_grad():
        tensors = policy.prepare(observation())
        backbone = policy._run_backbone(tensors, tensors["attention_mask"] == 1)
        prefix = policy.encode(observation())
        samples = sample(policy, prefix, chunk_noise_time()[1], steps=STEPS)
    close(measured(backbone, "backbone"), REFERENCE["backbone"])
    close(measured(prefix.hidden, "hidden"), REFERENCE["hidden"])
    close(samples, REFERENCE["samples"])


def test_loss_and_gradients_equal_the_references(policy):
    chunk, noise, t = chunk_noise_time()
    policy.zero_grad()
    keep = torch.zeros(B, AH, dtype=torch.bool)
    loss = flow_loss(policy, policy.encode(observation()), chunk, keep, torch.ones(B), noise, t).mean()
    loss.backward()
    close(loss.detach(), REFERENCE["loss"])
    theirs = {n: g for n, g in REFERENCE["gradients"].items() if not n.startswith(POOLING) and n != LANGUAGE_HEAD}
    ours = {n.removeprefix("core."): p.grad for n, p in policy.named_parameters() if p.grad is not None}
    assert set(ours) == set(theirs)
    assert len(ours) > 100
    for name, gradient in ours.items():
        close(measured(gradient, name), theirs[name], rtol=1e-3, msg=name)


def alone(given, row):
    one = slice(row, row + 1)
    return PolicyInput({c: x[one] for c, x in given.images.items()}, given.state[one], given.prompts[one])


def test_padding_changes_nothing_where_it_is_masked():
    masked, noise = random_policy(), chunk_noise_time()[1]
    with torch.no_grad():
        together = sample(masked, masked.encode(observation()), noise, steps=STEPS)
        for row in range(B):
            masked.inputs.tokenizer.length = len(observation().prompts[row].split())
            one = sample(masked, masked.encode(alone(observation(), row)), noise[row : row + 1], steps=STEPS)
            close(one, together[row : row + 1])


def test_checkpointing_changes_no_gradient_and_the_flags_say_what_trains():
    chunk, noise, t = chunk_noise_time()
    gradients = []
    for checkpointing in (False, True):
        policy = random_policy(checkpointing=checkpointing)
        keep = torch.zeros(B, AH, dtype=torch.bool)
        flow_loss(policy, policy.encode(observation()), chunk, keep, torch.ones(B), noise, t).sum().backward()
        gradients.append({n: p.grad for n, p in policy.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        close(gradients[1][name], gradient, msg=name)
    where = {
        "llm": "backbone.eagle_model.language_model.",
        "visual": "backbone.eagle_model.vision_model.",
        "projector": "action_head.action_encoder.",
        "diffusion_model": "action_head.model.",
        "vlln": "action_head.vl_self_attention.",
    }
    for flag in TUNE:
        policy.tune(**{name: name == flag for name in TUNE})
        trains = {n.removeprefix("core.") for n, p in policy.named_parameters() if p.requires_grad}
        assert [f for f, start in where.items() if any(n.startswith(start) for n in trains)] == [flag]


def test_half_precision_as_it_is_served_stays_near(policy):
    half, noise = random_policy(precision="bfloat16", mask_padding=False), chunk_noise_time()[1]
    hold(half, "bfloat16", masters=False)
    assert half.core.action_head.future_tokens.weight.dtype == torch.bfloat16
    with torch.no_grad():
        want = sample(policy, policy.encode(observation()), noise, steps=STEPS)
        close(sample(half, half.encode(observation()), noise, steps=STEPS), want, atol=0.1, rtol=0.1)


@pytest.mark.slow
def test_adapters_train_and_are_merged_into_the_export(tmp_path):
    adapted = random_policy(train="lora", lora_rank=2)
    names = [name for name, p in adapted.named_parameters() if p.requires_grad and ".lora_A" in name]
    assert any("language_model.model.layers" in name for name in names)
    assert any("action_head.model.transformer_blocks" in name for name in names)
    assert not any("vision_model" in name for name in names)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B" in name:
                parameter.fill_(0.01)
        want = sample(adapted, adapted.encode(observation()), chunk_noise_time()[1], steps=2)
        again = loaded(adapted.save(tmp_path / "out"))
        close(sample(again, again.encode(observation()), chunk_noise_time()[1], steps=2), want)


def as_nvidia_has_it(folder, kept_head=True):
    """The folder with the tensors that NVIDIA's file has beside: SigLIP's pooling head, the language head."""
    tensors = load_file(folder / "model.safetensors")
    for name, shape in REFERENCE["tensors"].items():
        if name.startswith(POOLING):
            tensors[name] = torch.ones(shape)
    embedding = LANGUAGE_HEAD.replace("lm_head", "model.embed_tokens")
    tensors[LANGUAGE_HEAD] = tensors[embedding].clone()
    if not kept_head:
        del tensors[embedding]  # tied: the file keeps one of the two
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_policy().save(tmp_path_factory.mktemp("n1_5") / "out", {"modality.json": {"state": {}}})


@pytest.mark.parametrize("kept", [True, False])
def test_a_checkpoint_gives_the_actions_that_it_was_saved_with_and_saves_what_it_loaded(folder, tmp_path, kept):
    theirs = as_nvidia_has_it(shutil.copytree(folder, tmp_path / "theirs"), kept)
    policy, again = random_policy(), loaded(theirs, tune={"llm": False, "visual": False})
    noise = chunk_noise_time()[1]
    with torch.no_grad():
        want = policy.physical_actions(sample(policy, policy.encode(observation()), noise, steps=STEPS))
        close(again.physical_actions(sample(again, again.encode(observation()), noise, steps=STEPS)), want)
    assert len(again.load_report.dropped) == 12 - (not kept)
    assert again.embodiment == SLOT
    out = again.save(tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (theirs, out))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_export_has_what_the_layout_keeps_and_no_optimizer(folder):
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "config.json",
        "backbone/config.json",
        "experiment_cfg/metadata.json",
        "model.safetensors",
        "modality.json",
        "action_head_new_embodiment.safetensors",
        "projector_new_embodiment.safetensors",
    }
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("gr00t_n1_5", ["GR00T_N1_5"])
    head = load_file(folder / "action_head_new_embodiment.safetensors")
    assert "future_tokens.weight" in head
    projector = load_file(folder / "projector_new_embodiment.safetensors")
    assert {name.split(".")[0] for name in projector} == {
        "state_encoder", "action_encoder", "action_decoder", "position_embedding",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("action_head.future_tokens.weight"), "missing action_head.future_tokens.weight"),
        (lambda t: t.update({"action_head.mask_token": torch.ones(1)}), "unknown action_head.mask_token"),
        (lambda t: t["action_head.vlln.weight"].fill_(float("nan")), "action_head.vlln.weight: holds NaN"),
        (
            lambda t: t.update({"action_head.vlln.weight": torch.ones(3)}),
            r"vlln.weight: expected shape \(32,\), got \(3,\)",
        ),
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


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        ("experiment_cfg/metadata.json", lambda c: c.pop("new_embodiment"), "no normalisation statistics of"),
        ("experiment_cfg/metadata.json",
         lambda c: c["new_embodiment"]["modalities"]["state"]["all"].update(rotation_type="quaternion"),
         r"state\.all is a rotation \(quaternion\)"),
        ("experiment_cfg/metadata.json",
         lambda c: c["new_embodiment"]["modalities"]["action"]["all"].update(absolute=False), "action.all is relative"),
        ("experiment_cfg/metadata.json",
         lambda c: c["new_embodiment"]["statistics"]["state"]["all"].update(min=[0.0]), "state have 1 dims"),
        ("backbone/config.json", lambda c: c.update(use_pixel_shuffle=True), "without pixel shuffle is read, got"),
        ("config.json", lambda c: c.pop("action_head_cfg"), "expected backbone_cfg and action_head_cfg"),
        ("config.json", lambda c: c.update(model_type="gr00t_n1"), "of type gr00t_n1_5, got 'gr00t_n1'"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_as_it_is_meant_is_refused(folder, tmp_path, file, edit, message):
    with pytest.raises(ValueError, match=message):
        loaded(edited(folder, tmp_path, file, edit))


def test_tags_cameras_and_horizon_of_another_robot(folder):
    for options, message in (
        ({"embodiment_tag": "so100"}, "GR00T N1.5 has new_embodiment, oxe_droid, agibot_genie1, gr1"),
        ({"cameras": {"front": "side"}}, "cameras: the checkpoint has"),
    ):
        with pytest.raises(ValueError, match=message):
            loaded(folder, **options)
    with pytest.raises(ValueError, match="the checkpoint's chunk is 4"):
        build_groot_n1_5("t", SPEC, "checkpoint", 0, 16, SIZE, checkpoint=str(folder))
    with pytest.raises(ValueError, match="our own layers alone, set it to sdpa"):
        random_policy(attention="eager", mask_padding=False)


def test_a_folder_of_lerobot_s_groot_type_is_read_and_written_back(folder, tmp_path):
    """As LeRobot 0.5 writes it: prefixed names, statistics in the processor's state, the base model named."""
    out = tmp_path / "lerobot"
    out.mkdir()
    tensors = {f"_groot_model.{name}": x for name, x in load_file(folder / "model.safetensors").items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    features = {f"observation.images.{camera}": {"type": "VISUAL", "shape": [3, 32, 32]} for camera in SPEC.cameras}
    config = {"type": "groot", "base_model_path": str(folder), "input_features": features, "chunk_size": 50}
    (out / "config.json").write_text(json.dumps(config))
    pack = {
        "registry_name": "groot_pack_inputs_v3",
        "config": {"embodiment_tag": "new_embodiment", "embodiment_mapping": {"new_embodiment": 31}},
        "state_file": "pre.safetensors",
    }
    (out / "policy_preprocessor.json").write_text(json.dumps({"steps": [{"registry_name": "rename"}, pack]}))
    statistics = {"observation.state": (SPEC.state_low, SPEC.state_high), "action": (SPEC.action_low, SPEC.action_high)}
    flat = {f"{k}.{end}": torch.tensor(v[i]) for k, v in statistics.items() for i, end in enumerate(("min", "max"))}
    save_file(flat, out / "pre.safetensors")
    policy, again = random_policy(), loaded(out)
    with torch.no_grad():
        noise = chunk_noise_time()[1]
        want = policy.physical_actions(sample(policy, policy.encode(observation()), noise, steps=2))
        close(again.physical_actions(sample(again, again.encode(observation()), noise, steps=2)), want)
    steps = [{"registry_name": "relative_actions_processor", "config": {"enabled": True}}, pack]
    written = again.save(tmp_path / "written")
    (out / "policy_preprocessor.json").write_text(json.dumps({"steps": steps}))
    steps = [{"registry_name": "absolute_actions_processor", "config": {"enabled": True}}]
    (out / "policy_postprocessor.json").write_text(json.dumps({"steps": steps}))
    with pytest.raises(CheckpointError, match=r"relative actions of a GR00T N1\.5 are not supported"):
        loaded(out)
    assert load_file(written / "model.safetensors").keys() == tensors.keys()
    assert (written / "pre.safetensors").is_file()


def test_a_new_embodiment_starts_with_a_datasets_statistics_and_takes_them_along(folder, tmp_path):
    base = edited(folder, tmp_path, "experiment_cfg/metadata.json", lambda c: c.pop("new_embodiment"))
    stats = {
        "observation.state": {"min": [-1, -2, 0], "max": [1, 2, 4]},
        "action": {"min": [-0.01, -1], "max": [0.01, 1]},
    }
    parts = {
        "state": {"arm": {"start": 0, "end": 2}, "gripper": {"start": 2, "end": 3}},
        "action": {"arm": {"start": 0, "end": 1}, "gripper": {"start": 1, "end": 2}},
        "video": {"front": {}, "wrist": {}},
    }
    (tmp_path / "data" / "meta").mkdir(parents=True)
    (tmp_path / "data" / "meta" / "stats.json").write_text(json.dumps(stats))
    (tmp_path / "data" / "meta" / "modality.json").write_text(json.dumps(parts))
    policy = loaded(base, statistics=str(tmp_path / "data"))
    close(policy.state_units.to_model(torch.tensor([[0.0, 2.0, 1.0]])), [[0.0, 1.0, -0.5]])
    again = loaded(policy.save(tmp_path / "out"))
    close(again.action_units.scale, [0.01, 1.0])
    entry = json.loads((tmp_path / "out" / "experiment_cfg" / "metadata.json").read_text())["new_embodiment"]
    assert list(entry["modalities"]["action"]) == ["arm", "gripper"]
    assert entry["modalities"]["state"]["arm"]["shape"] == [2]


def test_prompts_and_pictures_are_prepared_as_theirs(tmp_path):
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    source = make_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=r"its tokenizer has no token <IMG_CONTEXT>; it is not Eagle 2\.5's"):
        EagleInputs(str(source), ("front",), Pictures(28))
    words = AutoTokenizer.from_pretrained(source)
    words.add_tokens([AddedToken(w, special=True) for w in ("<IMG_CONTEXT>", "<img>", "</img>")])
    words.save_pretrained(source)
    inputs = EagleInputs(str(source), ("front", "wrist"), Pictures(28), tokens=4)
    one = "<img><IMG_CONTEXT><IMG_CONTEXT><IMG_CONTEXT><IMG_CONTEXT></img>"
    assert inputs.text("lift") == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n<image 1>{one}<image 2>{one}lift<|im_end|>\n<|im_start|>assistant\n"
    )
    inputs.quoted = True
    assert "['lift']<|im_end|>" in inputs.text("lift")
    token = inputs._ids("<IMG_CONTEXT>")[0]
    with pytest.raises(ValueError, match=rf"its <IMG_CONTEXT> is {token}, the checkpoint's is 7"):
        inputs.expect_image_token(7)
    out = inputs(
        {c: np.zeros((2, 20, 40, 3), np.uint8) for c in ("front", "wrist")}, ["go", "lift it"], torch.device("cpu")
    )
    assert (out["input_ids"] == token).sum(1).tolist() == [8, 8]
    assert out["attention_mask"][0, 0] == 0  # padded in front
    assert out["pixel_values"].shape == (4, 3, 28, 28)
    assert (out["pixel_values"] == -1).all()


def test_a_picture_loses_its_rim_and_keeps_its_middle():
    image = torch.zeros(1, 3, 40, 80, dtype=torch.uint8)
    image[..., 1:39, 2:78] = 255  # 95%: 38 × 76 of the middle
    assert Pictures(28).apply(image).min() > 0.99
    assert Pictures(28, crop=None).apply(image).min() < 0
    assert Pictures(28, crop=None, bicubic=True).apply(image).shape == (1, 3, 28, 28)


def test_the_released_size_is_counted_without_memory():
    policy, statistics = meta_groot_n1_5({"train": "expert"}, SPEC, FullN15Size())
    parts = {name: sum(p.numel() for p in module.parameters()) for name, module in policy.core.named_children()}
    assert statistics == "MIN_MAX"
    assert 1.3e9 < parts["backbone"] < 1.4e9
    assert 1.0e9 < parts["action_head"] < 1.2e9
    assert not any(p.requires_grad for p in policy.backbone.parameters())
    rows = {line[:26].strip(): line[26:].split() for line in parameter_table(policy).splitlines()[1:]}
    assert "action projections" not in rows
    assert rows["vision tower"][0] == "0"
    assert 4.0e8 < int(rows["vision tower"][1].replace(",", "")) < 4.2e8
