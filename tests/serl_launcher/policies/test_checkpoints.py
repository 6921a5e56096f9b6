"""PI0 and PI0.5 out to LeRobot's format and back: LeRobot loads it, the numbers agree, mistakes are named."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import AH, SIZE, SPEC, lerobot_batch, loaded_policy, make_tokenizer, observation, random_policy
from safetensors.torch import load_file, save_file

from serl_launcher.policies import loading
from serl_launcher.policies.base import frozen_hash, sample, trainable
from serl_launcher.policies.checkpoint import CheckpointError
from serl_launcher.policies.parameter_table import parameter_table
from serl_launcher.policies.pi0.tiny import shrunk


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tok") / "tokenizer")


KINDS = ["pi0", "pi05"]


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """Random weights of each kind, saved."""
    parent = tmp_path_factory.mktemp("saved")
    return {kind: random_policy(kind, tokenizer).save(parent / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def saved(kind, folders):
    return folders[kind]


@pytest.fixture(scope="module")
def saved_again(folders, tmp_path_factory):
    """What a fresh process makes of them: loaded and saved."""
    parent = tmp_path_factory.mktemp("again")
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from checkpoints import loaded_policy\n"
        "for kind, source, target in zip(*[iter(sys.argv[1:])] * 3):\n"
        "    loaded_policy(kind, Path(source)).save(Path(target))\n"
    )
    arguments = [str(part) for kind in KINDS for part in (kind, folders[kind], parent / kind)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return parent


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def chunks(policy, noise):
    with torch.no_grad():
        return policy.physical_actions(sample(policy.eval(), policy.encode(observation()), noise, steps=3))


def test_lerobots_own_loader_gives_the_same_actions(kind, saved):
    from lerobot.policies.factory import make_pre_post_processors

    if kind == "pi0":
        import lerobot.policies.pi0.modeling_pi0 as module

        cls = module.PI0Policy
    else:
        import lerobot.policies.pi05.modeling_pi05 as module

        cls = module.PI05Policy
    with shrunk(module, SIZE[kind]):
        theirs = cls.from_pretrained(saved)
    before, after = make_pre_post_processors(theirs.config, pretrained_path=str(saved))
    noise = torch.randn(2, AH, 2, generator=torch.Generator().manual_seed(0))
    want = after(theirs.predict_action_chunk(before(lerobot_batch(observation())), noise=noise, num_steps=3))
    got = chunks(loaded_policy(kind, saved), noise)
    low, high = torch.tensor(SPEC.action_low), torch.tensor(SPEC.action_high)
    torch.testing.assert_close(got, want.clamp(low, high), atol=1e-5, rtol=1e-4)
    assert (got - low).abs().max() > 1e-3


@pytest.mark.slow
def test_a_fresh_process_saves_the_same_bytes(kind, saved, saved_again):
    again = saved_again / kind
    assert sorted(p.name for p in again.iterdir()) == sorted(p.name for p in saved.iterdir())
    for path in saved.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_the_report_counts_and_the_language_heads_are_dropped(kind, saved):
    policy = loaded_policy(kind, saved)
    assert policy.load_report.matched == len(policy.core.state_dict())
    assert any("lm_head" in name for name in policy.load_report.dropped)
    assert not [name for name, _ in policy.named_parameters() if "lm_head" in name]
    assert "all matched" in str(policy.load_report)


def test_bf16_holds_fp32_masters_and_computes_nearly_the_same(kind, saved):
    noise = torch.randn(2, AH, 2, generator=torch.Generator().manual_seed(0))
    exact = loaded_policy(kind, saved, attention="sdpa")
    half = loaded_policy(kind, saved, attention="sdpa", precision="bfloat16", train="expert", checkpointing=True)
    torch.testing.assert_close(chunks(half, noise), chunks(exact, noise), atol=0.05, rtol=0.05)
    for name, p in half.named_parameters():
        if p.requires_grad:
            assert p.dtype == torch.float32, name
    frozen = dict(half.named_parameters())
    key = "core.paligemma_with_expert.paligemma.model."
    assert frozen[key + "language_model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    assert frozen[key + "vision_tower.vision_model.embeddings.position_embedding.weight"].dtype == torch.float32


@pytest.mark.parametrize("train", ["expert", "lora"])
def test_what_is_frozen_is_never_held_in_fp32(kind, saved, train, monkeypatch):
    """Adapters come after the weights: all of a LoRA policy was read in fp32, twice the memory that it settles at."""
    held = {}
    assign = loading._assign
    monkeypatch.setattr(loading, "_assign", lambda core, filled: (held.update(filled), assign(core, filled)))
    policy = loaded_policy(kind, saved, train=train, attention="sdpa", precision="bfloat16")
    end = {name.replace(".base_layer.", "."): x.dtype for name, x in policy.core.state_dict().items()}
    assert {name: x.dtype for name, x in held.items()} == {name: end[name] for name in held}
    assert torch.bfloat16 in {x.dtype for x in held.values()}


def test_expert_only_trains_the_expert_and_exports_the_rest_untouched(kind, saved, tmp_path):
    policy = loaded_policy(kind, saved, train="expert", attention="sdpa", precision="bfloat16")
    before = frozen_hash(policy)
    assert not policy.encode(observation()).hidden.requires_grad
    optimizer = torch.optim.SGD(trainable(policy).values(), lr=0.1)
    chunk = torch.randn(2, AH, 2)
    (policy.velocity(policy.encode(observation()), chunk, torch.rand(2)) - chunk).square().mean().backward()
    without = {name for name, p in policy.named_parameters() if p.requires_grad and p.grad is None}
    assert without == set(policy.dead_parameters()) & set(trainable(policy))
    optimizer.step()
    assert frozen_hash(policy) == before
    was, now = (load_file(f / "model.safetensors") for f in (saved, policy.save(tmp_path / "out")))
    assert was.keys() == now.keys()
    moved = {name for name in was if not torch.equal(was[name], now[name])}
    assert moved
    assert all(".paligemma." not in name for name in moved)


def test_the_table_names_what_trains(kind, saved):
    table = parameter_table(loaded_policy(kind, saved, train="expert"))
    rows = {line[:26].strip(): line.split() for line in table.splitlines()}
    assert int(rows["language model"][2].replace(",", "")) == 0
    assert int(rows["action expert"][2].replace(",", "")) > 0
    assert int(rows["total"][3].replace(",", "")) > 0


def change(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


KEY = "model.action_out_proj.weight"


def test_a_missing_tensor_is_named(kind, copy):
    change(copy, lambda tensors: tensors.pop(KEY))
    with pytest.raises(CheckpointError, match=r"missing action_out_proj\.weight"):
        loaded_policy(kind, copy)


def test_a_tensor_of_another_shape_is_named(kind, copy):
    change(copy, lambda tensors: tensors.update({KEY: torch.zeros(3, 5)}))
    with pytest.raises(CheckpointError, match=r"action_out_proj\.weight: expected shape \(2, 32\), got \(3, 5\)"):
        loaded_policy(kind, copy)


def test_a_nan_is_named(kind, copy):
    change(copy, lambda tensors: tensors[KEY].view(-1)[3].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=r"action_out_proj\.weight: holds NaN or Inf"):
        loaded_policy(kind, copy)


def test_an_unknown_tensor_is_named(kind, copy):
    change(copy, lambda tensors: tensors.update({"model.extra": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match="unknown extra"):
        loaded_policy(kind, copy)


def test_another_type_is_refused(kind, copy):
    config = json.loads((copy / "config.json").read_text())
    config["type"] = "smolvla"
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"expected a checkpoint of type {kind}, got 'smolvla'"):
        loaded_policy(kind, copy)


@pytest.mark.parametrize("what", ["processor", "file", "feature"])
def test_absent_statistics_are_refused(kind, copy, what):
    if what == "processor":
        (copy / "policy_preprocessor.json").unlink()
    else:
        file = next(copy.glob("policy_preprocessor_step_*_normalizer_processor.safetensors"))
        tensors = load_file(file)
        file.unlink()
        if what == "feature":
            save_file({k: v for k, v in tensors.items() if not k.startswith("observation.state")}, file)
    with pytest.raises(CheckpointError, match="normalisation statistics"):
        loaded_policy(kind, copy)


def test_weights_that_are_absent_or_a_folder_that_is_none_are_told(kind, copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        loaded_policy(kind, copy)
    with pytest.raises(CheckpointError, match="no such folder"):
        loaded_policy(kind, copy / "nothing")


def test_cameras_without_a_counterpart_are_named(kind, copy):
    config = json.loads((copy / "config.json").read_text())
    config["input_features"]["observation.images.base"] = config["input_features"].pop("observation.images.front")
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"map them with policy\.cameras"):
        loaded_policy(kind, copy)
    assert loaded_policy(kind, copy, cameras={"front": "base"}).cameras == ("wrist", "front")


def test_random_weights_and_a_checkpoint_exclude_each_other(kind, copy, tokenizer):
    with pytest.raises(ValueError, match="which one"):
        random_policy(kind, tokenizer, checkpoint=str(copy))
