"""GR00T N1.7 in NVIDIA's layout: out, into lerobot's own loader, back in, and mistakes named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import SPEC, observation
from safetensors.torch import load_file, save_file

from serl_launcher.policies.base import sample, trainable
from serl_launcher.policies.checkpoint import CheckpointError
from serl_launcher.policies.groot.build import build_groot
from serl_launcher.policies.groot.saving import save_groot
from serl_launcher.policies.groot.tiny import TinyGrootSize

SIZE = TinyGrootSize(image_size=32, max_state_dim=5, max_action_dim=4)
AH = 4
KEY = "action_head.action_decoder.layer2.W"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    policy = build_groot("t", SPEC, "random", 0, AH, SIZE, embodiment=2)
    folder = tmp_path_factory.mktemp("groot") / "saved"
    return save_groot(policy, folder, {"trainer_state.json": {"global_step": 7}})


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def load(folder, **options):
    return build_groot("t", SPEC, "checkpoint", 0, None, SIZE, checkpoint=str(folder), **options)


def chunks(policy):
    noise = torch.randn(2, AH, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return policy.physical_actions(sample(policy, policy.encode(observation()), noise, 4))


def test_it_comes_back_as_it_went(saved, tmp_path):
    want, policy = chunks(build_groot("t", SPEC, "random", 0, AH, SIZE, embodiment=2)), load(saved)
    torch.testing.assert_close(chunks(policy), want, atol=1e-6, rtol=1e-5)
    assert policy.embodiment == 2
    again = save_groot(policy, tmp_path / "again")
    for path in saved.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (again / path.relative_to(saved)).read_bytes(), path.name
    assert load_file(saved / "action_head_new_embodiment.safetensors").keys()


def test_lerobots_own_loader_reads_it(saved, monkeypatch):
    from lerobot.policies.groot.groot_n1_7 import GR00TN17

    monkeypatch.chdir(saved)  # config.json names the backbone's config relative to the folder
    theirs = GR00TN17.from_pretrained(str(saved)).state_dict()
    for name, tensor in load(saved).core.state_dict().items():
        assert torch.equal(tensor.to(theirs[name].dtype), theirs[name]), name


def test_only_what_was_tuned_moves_in_an_export(saved, tmp_path):
    policy = load(saved, tune={"llm": False, "visual": False, "diffusion_model": False, "vlln": False})
    with torch.no_grad():
        for p in trainable(policy).values():
            p.add_(1)
    was, now = (load_file(f / "model.safetensors") for f in (saved, save_groot(policy, tmp_path / "out")))
    moved = {name for name in was if not torch.equal(was[name], now[name])}
    assert moved
    assert all("coder" in name or "position_embedding" in name for name in moved)


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.pop(KEY), "missing action_head"),
        (lambda t: t.update({KEY: torch.zeros(2, 2)}), r"expected shape \(4, 64, 4\), got \(2, 2\)"),
        (lambda t: t[KEY].view(-1)[0].fill_(float("nan")), "holds NaN or Inf"),
    ],
)
def test_tensors_that_do_not_fit_are_named(copy, edit, words):
    change(copy, edit)
    with pytest.raises(CheckpointError, match=words):
        load(copy)


def test_another_type_absent_statistics_and_an_unknown_tag_are_refused(copy):
    with pytest.raises(CheckpointError, match=r"'gr1'.*statistics"):
        load(copy, embodiment_tag="gr1")
    (copy / "statistics.json").unlink()
    with pytest.raises(CheckpointError, match="no normalisation statistics"):
        load(copy)
    config = json.loads((copy / "config.json").read_text()) | {"model_type": "gr00t_n1_5"}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"expected a checkpoint of type Gr00tN1d7 or groot, got 'gr00t_n1_5'"):
        load(copy)
