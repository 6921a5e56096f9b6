"""GR00T in LeRobot's own `groot` type, and the backbone's processor from a folder: what LeRobot writes we load, what we
write LeRobot loads, and both act alike. Nothing is downloaded: tokenizer and image processor are made here."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import SPEC
from checkpoints import lerobot_batch as float_batch
from safetensors.torch import load_file, save_file

from serl_launcher.policies.base import PolicyInput, sample, trainable
from serl_launcher.policies.checkpoint import CheckpointError
from serl_launcher.policies.groot.build import build_groot
from serl_launcher.policies.groot.inputs import Geometry
from serl_launcher.policies.groot.saving import save_groot
from serl_launcher.policies.groot.tiny import TinyGrootSize

ROOT = Path(__file__).parents[3]
AH, VALID = 4, 3
SPECIAL = ["<|vision_end|>", "<|vision_start|>", "<|video_pad|>", "<|image_pad|>"]  # the last four ids
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
)


def make_processor(folder: Path) -> Path:
    """Qwen3-VL's files at tiny size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessor, Qwen3VLVideoProcessor

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    first = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=first, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator(["pick up the red cube user\n"] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=first[0], eos_token=first[2])
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    shape = dict(patch_size=16, temporal_patch_size=2, merge_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    size = {"shortest_edge": 32 * 32, "longest_edge": 256 * 256}
    Qwen2VLImageProcessor(size=size, **shape).save_pretrained(folder)
    Qwen3VLVideoProcessor(size=size, **shape).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return make_processor(tmp_path_factory.mktemp("processor") / "qwen")


@pytest.fixture(scope="module")
def size(processor):
    from transformers import AutoTokenizer

    vocabulary = len(AutoTokenizer.from_pretrained(processor))
    return TinyGrootSize(image_size=64, max_state_dim=5, max_action_dim=4, vocabulary=vocabulary)


@pytest.fixture(scope="module")
def base(processor, size, tmp_path_factory):
    """A released model in NVIDIA's layout, in shards as the released one is: part of the chunk trained, clipped."""
    folder = tmp_path_factory.mktemp("base") / "n1_7"
    policy = build_groot("t", SPEC, "random", 0, AH, size, embodiment=2, processor=str(processor))
    policy.valid_horizon, policy.clip = VALID, True
    policy.inputs.geometry = Geometry(target=(64, 64), crop=(60, 60))
    return save_groot(policy, folder, shard=300_000)


@pytest.fixture(scope="module")
def theirs(base, processor, tmp_path_factory):
    """(policy, preprocessor, postprocessor, folder that LeRobot saved)."""
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.groot.configuration_groot import GrootConfig
    from lerobot.policies.groot.modeling_groot import GrootPolicy
    from lerobot.policies.groot.processor_groot import make_groot_pre_post_processors

    images = {f"observation.images.{c}": PolicyFeature(FeatureType.VISUAL, (3, 48, 64)) for c in SPEC.cameras}
    config = GrootConfig(
        base_model_path=str(base),
        input_features={**images, "observation.state": PolicyFeature(FeatureType.STATE, (3,))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (2,))},
        chunk_size=AH,
        n_action_steps=AH,
        max_state_dim=5,
        max_action_dim=4,
        device="cpu",
        use_bf16=False,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(base)  # its config names the backbone's folder
        policy = GrootPolicy(config).eval()
    before, after = make_groot_pre_post_processors(config)
    for step in before.steps:
        if hasattr(step, "model_name"):
            step.model_name = str(processor)
    folder = tmp_path_factory.mktemp("lerobot") / "saved"
    policy.save_pretrained(folder)
    before.save_pretrained(folder)
    after.save_pretrained(folder)
    return policy, before, after, folder


def load(folder, size, processor=None, **options):
    return build_groot("t", SPEC, "checkpoint", 0, None, size, checkpoint=str(folder), processor=processor, **options)


def lerobot_batch(given):
    """Pictures as bytes: of fractions LeRobot's GR00T processor cuts off what is behind the point."""
    pictures = {f"observation.images.{c}": torch.as_tensor(x).permute(0, 3, 1, 2) for c, x in given.images.items()}
    return float_batch(given) | pictures


def their_actions(theirs, given, monkeypatch):
    policy, before, after, _ = theirs
    noise = torch.randn(len(given), AH, 4, generator=torch.Generator().manual_seed(0))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda *a, **k: noise.clone())
        return after(policy.predict_action_chunk(before(lerobot_batch(given)))), noise


def our_actions(policy, given, noise):
    with torch.no_grad():
        return policy.physical_actions(sample(policy.eval(), policy.encode(given), noise, steps=4))


def observe(*prompts):
    """Cameras of one shape: the library stacks them. States reach beyond the statistics."""
    rng = np.random.default_rng(0)
    images = {c: rng.integers(0, 256, (len(prompts), 48, 64, 3), dtype=np.uint8) for c in SPEC.cameras}
    return PolicyInput(images, rng.uniform(-1.5, 1.5, (len(prompts), 3)).astype(np.float32), list(prompts))


def one_prompt():
    """A batch without padding: there the library's answers are the masked ones."""
    return observe("Pick up the red cube!", "Pick up the red cube!")


@pytest.mark.parametrize("kind", ["lerobot", "nvidia"])
def test_both_layouts_act_as_lerobot_does(kind, theirs, base, size, monkeypatch):
    policy = load(theirs[3] if kind == "lerobot" else base, size)
    want, noise = their_actions(theirs, one_prompt(), monkeypatch)
    assert policy.load_report.matched == len(policy.core.state_dict())
    assert (policy.embodiment, policy.valid_horizon, policy.clip) == (2, VALID, True)
    got = our_actions(policy, one_prompt(), noise)
    low, high = torch.tensor(SPEC.action_low), torch.tensor(SPEC.action_high)
    torch.testing.assert_close(got, want[:, :VALID].clamp(low, high), atol=1e-5, rtol=1e-4)
    assert (got - low).abs().max() > 1e-3


def test_inputs_equal_the_librarys(theirs, base, size):
    """Tokens, patches and state, prompts of two lengths."""
    policy, given = load(base, size), observe("Pick up the red cube!", "lift")
    batch = theirs[1](lerobot_batch(given))
    ours = policy.prepare(given)
    valid = ours["attention_mask"].bool()
    assert ours["input_ids"].shape[1] % 16 == 0
    for row in range(len(given)):
        kept = batch["attention_mask"][row].bool()
        assert torch.equal(ours["input_ids"][row][valid[row]], batch["input_ids"][row][kept])
    assert torch.equal(ours["image_grid_thw"], batch["image_grid_thw"].cpu())
    torch.testing.assert_close(ours["pixel_values"], batch["pixel_values"], atol=1e-6, rtol=0)
    torch.testing.assert_close(ours["state"], batch["state"][:, 0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(target=(64, 64), crop=(60, 60)),
        Geometry(target=(64, 64), crop=None, shortest_edge=72, crop_fraction=0.9, letter_box=True),
        Geometry(target=(64, 64), crop=(60, 60), albumentations=True, letter_box=True),
    ],
)
def test_pictures_are_cut_as_the_library_cuts_them(geometry):
    from lerobot.policies.groot import processor_groot as library

    images = torch.randint(0, 256, (2, 3, 48, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    options = dict(
        image_crop_size=geometry.crop and list(geometry.crop),
        image_target_size=list(geometry.target),
        shortest_image_edge=geometry.shortest_edge,
        crop_fraction=geometry.crop_fraction,
        letter_box_transform=geometry.letter_box,
    )
    ours = geometry.apply(images)
    for image, got in zip(images, ours, strict=True):
        if geometry.albumentations:
            frame = library._transform_n1_7_image_for_vlm_albumentations(image.permute(1, 2, 0).numpy(), **options)
            want = torch.as_tensor(frame).permute(2, 0, 1)
        else:
            want = library._transform_n1_7_image_for_vlm_torch(image, **options)
        assert torch.equal(got, want)


def test_lerobot_loads_what_we_write_in_its_type(theirs, base, size, tmp_path, monkeypatch):
    """Every weight moved, out, into LeRobot's own policy class and processors: it acts as ours does."""
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.policies.groot.modeling_groot import GrootPolicy

    policy = load(theirs[3], size)
    with torch.no_grad():
        for p in trainable(policy).values():
            p.mul_(1.01)
    out = save_groot(policy, tmp_path / "out")
    monkeypatch.chdir(base)
    loaded = GrootPolicy.from_pretrained(out)
    before, after = make_pre_post_processors(loaded.config, pretrained_path=str(out))
    want, noise = their_actions((loaded, before, after, out), one_prompt(), monkeypatch)
    got = our_actions(policy, one_prompt(), noise)
    low, high = torch.tensor(SPEC.action_low), torch.tensor(SPEC.action_high)
    torch.testing.assert_close(got, want[:, :VALID].clamp(low, high), atol=1e-5, rtol=1e-4)


def test_lerobot_loads_what_we_write_in_nvidias_layout_in_shards(base, size, tmp_path, monkeypatch):
    from lerobot.policies.groot.modeling_groot import GrootPolicy

    out = save_groot(load(base, size), tmp_path / "out", shard=300_000)
    assert len(list(out.glob("model-*.safetensors"))) > 1
    monkeypatch.chdir(out)
    held = GrootPolicy.from_pretrained(out)._groot_model.state_dict()
    for name, tensor in load(out, size).core.state_dict().items():
        assert torch.equal(held[name], tensor), name


@pytest.fixture(scope="module")
def round_trips(theirs, base, size, tmp_path_factory):
    """layout -> (source, saved by this process, that loaded and saved by a fresh one)."""
    parent, sources = tmp_path_factory.mktemp("trips"), {"lerobot": theirs[3], "nvidia": base}
    trips = {kind: (source, parent / f"{kind}_first", parent / f"{kind}_again") for kind, source in sources.items()}
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from checkpoints import SPEC\n"
        "from serl_launcher.policies.groot.build import build_groot\n"
        "from serl_launcher.policies.groot.saving import save_groot\n"
        "from serl_launcher.policies.groot.tiny import TinyGrootSize\n"
        "for source, target in zip(*[iter(sys.argv[1:])] * 2):\n"
        "    p = build_groot('t', SPEC, 'checkpoint', 0, None, TinyGrootSize(), checkpoint=source)\n"
        "    save_groot(p, Path(target), shard=300_000)\n"
    )
    for source, first, _ in trips.values():
        save_groot(load(source, size), first, shard=300_000)
    arguments = [str(path) for _, first, again in trips.values() for path in (first, again)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return trips


def test_a_fresh_process_saves_the_same_bytes(round_trips):
    for kind, (source, first, again) in round_trips.items():
        files = sorted(p.relative_to(first) for p in first.rglob("*") if p.is_file())
        assert files == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
        for path in files:
            assert (first / path).read_bytes() == (again / path).read_bytes(), path
        for path in source.glob("model*"):
            if kind == "lerobot" or path.suffix == ".safetensors":
                assert load_file(path).keys() == load_file(first / path.name).keys()


KEY = "_groot_model.action_head.action_decoder.layer2.W"


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def copy(theirs, tmp_path):
    return Path(shutil.copytree(theirs[3], tmp_path / "copy"))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.pop(KEY), r"missing action_head\.action_decoder\.layer2\.W"),
        (lambda t: t.update({KEY: torch.zeros(2, 2)}), r"expected shape \(4, 64, 4\), got \(2, 2\)"),
        (lambda t: t[KEY].view(-1)[0].fill_(float("nan")), "holds NaN or Inf"),
        (lambda t: t.update({"_groot_model.extra": torch.zeros(1)}), "unknown extra"),
    ],
)
def test_tensors_of_lerobots_type_that_do_not_fit_are_named(copy, size, edit, words):
    change(copy, edit)
    with pytest.raises(CheckpointError, match=words):
        load(copy, size)


def test_lerobots_type_without_statistics_is_refused(copy, size):
    path = copy / "policy_preprocessor.json"
    content = json.loads(path.read_text())
    for step in content["steps"]:
        if step["registry_name"] == "groot_n1_7_pack_inputs_v1":
            step["config"]["raw_stats"] = None
            (copy / step["state_file"]).unlink()
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="no normalisation statistics"):
        load(copy, size)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"no policy_preprocessor\.json, so no normalisation statistics"):
        load(copy, size)


def test_flat_statistics_of_lerobots_type_are_read(copy, size):
    """As LeRobot saves a fine-tune whose base had none for its embodiment."""
    path = copy / "policy_preprocessor.json"
    content = json.loads(path.read_text())
    pack = next(s for s in content["steps"] if s["registry_name"] == "groot_n1_7_pack_inputs_v1")
    pack["config"] |= {"raw_stats": None, "modality_config": None, "video_modality_keys": None}
    values = {"min": [-1.0, -1, 0], "max": [1.0, 1, 0]}  # the last state never moved
    tensors = {f"observation.state.{k}": torch.tensor(v) for k, v in values.items()}
    tensors |= {"action.min": torch.tensor([-0.02, -1]), "action.max": torch.tensor([0.02, 1])}
    save_file(tensors, copy / pack["state_file"])
    path.write_text(json.dumps(content))
    policy = load(copy, size)
    assert policy.cameras == ("front", "wrist")
    np.testing.assert_allclose(policy.state_units.to_model(torch.tensor([0.5, -1, 0.3])), [0.5, -1, 0], atol=1e-6)


def test_cameras_without_a_counterpart_are_named(base, size, tmp_path):
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    path = copy / "processor_config.json"
    path.write_text(path.read_text().replace('"front"', '"ego_view"'))
    with pytest.raises(CheckpointError, match=r"map them with policy\.cameras"):
        load(copy, size)
    assert load(copy, size, cameras={"front": "ego_view"}).cameras == ("front", "wrist")


def test_an_absent_processor_names_its_key(base, size, tmp_path):
    with pytest.raises(ValueError, match=r"policy\.processor=.*nowhere: cannot be loaded"):
        load(base, size, processor=str(tmp_path / "nowhere"))


def test_a_users_fine_tune_from_data_to_an_export(base, processor, size, tmp_path, capsys):
    """train_sft with the yaml of the released model on a dataset with modality.json, at tiny size in bf16; then out."""
    import export_checkpoint
    import train_sft
    from sft_samples import add_modality, make_dataset

    data = make_dataset(tmp_path / "data")
    add_modality(data)
    parts = json.loads((data / "meta" / "modality.json").read_text())
    parts["video"]["wrist"] = {"original_key": "observation.images.wrist"}
    (data / "meta" / "modality.json").write_text(json.dumps(parts))
    overrides = [
        "algo=sft_groot",
        "policy=groot_n1_7",
        f"policy.checkpoint={base}",
        f"policy.processor={processor}",
        "+policy.cameras.ego=front",
        "policy.size._target_=serl_launcher.policies.groot.tiny.TinyGrootSize",
        "trainer.device=cpu",
        "sft.steps=2",
        "sft.batch_size=3",
        "sft.max_samples=9",
    ]
    run = tmp_path / "run"
    assert train_sft.main([str(data), str(run), *overrides]) == 0, capsys.readouterr().err
    assert "9 samples of 3 episodes" in capsys.readouterr().out
    out = tmp_path / "out"
    assert export_checkpoint.main([str(run), str(out)]) == 0, capsys.readouterr().err
    names = {path.name for path in out.iterdir()}
    assert {"trainer_state.json", "experiment_cfg", "modality.json", "action_head_new_embodiment.safetensors"} <= names
    assert {"config.json", "statistics.json", "processor_config.json", "processor"} <= names
    assert not [path for path in out.rglob("*") if "optimizer" in path.name]
    assert json.loads((out / "trainer_state.json").read_text()) == {"global_step": 2}
    moved = {
        name
        for name, tensor in load(base, size).core.state_dict().items()
        if not torch.equal(load_stored(out, name), tensor)
    }
    assert any(name.startswith("action_head.model.") for name in moved)
    assert all(name.startswith("action_head.") for name in moved)


def test_a_new_embodiment_starts_with_a_datasets_statistics(base, size, tmp_path):
    """As users of the released base do it; the export then stands alone."""
    meta = tmp_path / "data" / "meta"
    meta.mkdir(parents=True)
    ends = {
        "observation.state": {"min": [-2.0, 0, 1], "max": [2.0, 4, 3], "q01": [-1.0, 0, 1], "q99": [1.0, 4, 3]},
        "action": {"min": [-0.5, 0], "max": [0.5, 2], "q01": [-0.4, 0], "q99": [0.4, 2]},
    }
    (meta / "stats.json").write_text(json.dumps(ends))
    parts = {
        "state": {"tail": {"start": 1, "end": 3}, "head": {"start": 0, "end": 1}},
        "action": {"arm": {"start": 0, "end": 2}},
        "video": {"front": {}, "wrist": {}},
    }
    (meta / "modality.json").write_text(json.dumps(parts))
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    (copy / "embodiment_id.json").write_text(json.dumps({"new_embodiment": 2, "mine": 1}))
    with pytest.raises(CheckpointError, match=r"embodiment 'mine'.*set policy\.statistics"):
        load(copy, size, embodiment_tag="mine")
    policy = load(copy, size, embodiment_tag="mine", statistics=str(tmp_path / "data"))
    assert policy.embodiment == 1
    np.testing.assert_allclose(policy.state_units.to_physical(torch.ones(3)), [4, 3, 2])
    np.testing.assert_allclose(policy.action_units.to_physical(-torch.ones(2)), [-0.5, 0])
    out = save_groot(policy, tmp_path / "out")
    again = load(out, size, embodiment_tag="mine")
    assert torch.equal(again.state_units.offset, policy.state_units.offset)
    assert torch.equal(again.action_units.scale, policy.action_units.scale)
    assert load(out, size).embodiment == 2
    with pytest.raises(CheckpointError, match=r"policy\.statistics=.*no LeRobot dataset"):
        load(copy, size, embodiment_tag="mine", statistics=str(tmp_path))


def load_stored(folder, name):
    from serl_launcher.policies.checkpoint import Checkpoint

    return Checkpoint.find(str(folder)).tensor(name)
