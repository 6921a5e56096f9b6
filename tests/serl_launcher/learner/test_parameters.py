"""Published parameters: whole or absent, strict on loading, found by checkpoint_path."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_policy

from serl_launcher.learner import checkpoint
from serl_launcher.policies.base import trainable
from serl_launcher.run.parameters import PublishedVersion, base_sha256, find_parameters, load_into, publish
from serl_launcher.run.versions import highest_number, newest_whole


def publish_policy(folder, policy, version, keep=3):
    tensors = {n: p.detach() for n, p in trainable(policy).items()}
    base = base_sha256(policy)
    return publish(folder, tensors, version=version, step=10 * version, base=base, policy="t", now=1.0, keep=keep)


def test_what_is_published_is_what_is_loaded(tmp_path):
    source, target = tiny_policy(), tiny_policy()
    with torch.no_grad():
        for p in trainable(source).values():
            p.add_(0.5)
    entry = publish_policy(tmp_path, source, 4)
    assert PublishedVersion.read(tmp_path) == entry
    assert hashlib.sha256((tmp_path / entry.file).read_bytes()).hexdigest() == entry.sha256
    metadata = load_into(target, tmp_path / entry.file, base_sha256(target))
    assert (metadata["version"], metadata["step"]) == ("4", "40")
    assert all(torch.equal(p, q) for p, q in zip(source.parameters(), target.parameters(), strict=True))


def test_a_tied_tensor_is_no_part_of_the_frozen_base():
    """As a language head that is its embedding: it is published once, and moves under both names."""
    policy = tiny_policy()
    policy.head = torch.nn.Linear(4, 4)
    policy.head.weight = policy.core.action_out_proj.weight
    before = base_sha256(policy)
    with torch.no_grad():
        policy.head.weight.add_(1)
    assert base_sha256(policy) == before
    policy.head.bias.requires_grad_(False)
    frozen = base_sha256(policy)
    with torch.no_grad():
        policy.head.bias.add_(1)
    assert base_sha256(policy) != frozen != before


def test_only_the_newest_files_are_kept(tmp_path):
    policy = tiny_policy()
    for version in range(5):
        publish_policy(tmp_path, policy, version, keep=2)
    assert sorted(p.name for p in tmp_path.glob("v*")) == [
        "v000003.json", "v000003.safetensors", "v000004.json", "v000004.safetensors",
    ]  # fmt: skip
    assert json.loads((tmp_path / "latest.json").read_text())["version"] == 4


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("core.action_out_proj.bias"), "missing core.action_out_proj.bias"),
        (lambda t: t.update(extra=torch.zeros(1)), "unknown extra"),
        (lambda t: t.update({"core.action_out_proj.bias": torch.zeros(9)}), "expected shape"),
        (lambda t: t["core.action_out_proj.bias"].fill_(float("nan")), "core.action_out_proj.bias: holds NaN"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name_and_changes_nothing(tmp_path, damage, message):
    policy = tiny_policy()
    before = {n: p.detach().clone() for n, p in policy.named_parameters()}
    tensors = {n: p.detach().clone() + 1 for n, p in trainable(policy).items()}
    damage(tensors)
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=message):
        load_into(policy, tmp_path / "bad.safetensors")
    assert all(torch.equal(before[n], p) for n, p in policy.named_parameters())


def test_another_frozen_base_is_refused(tmp_path):
    ours, theirs = tiny_policy(seed=0), tiny_policy(seed=1)
    for policy in (ours, theirs):
        policy.core.state_proj.requires_grad_(False)
    entry = publish_policy(tmp_path, theirs, 0)
    with pytest.raises(ValueError, match=r"another frozen base.*policy.seed"):
        load_into(ours, tmp_path / entry.file, base_sha256(ours))


def test_weights_that_no_action_depends_on_make_no_other_base():
    assert base_sha256(tiny_policy(seed=0)) == base_sha256(tiny_policy(seed=1))


def test_checkpoint_path_may_be_a_checkpoint_whose_average_is_taken(tmp_path):
    trained, other = tiny_policy(seed=0), tiny_policy(seed=1)
    averaged = trainable(trained)
    tensors = {f"averaged.{n}": p for n, p in averaged.items()} | {f"raw.{n}": p + 1 for n, p in averaged.items()}
    folder = checkpoint.save(tmp_path / "checkpoints", 380, tensors, {}, {}, keep=2)
    load_into(other, find_parameters(folder), base_sha256(other))
    assert all(torch.equal(p, averaged[n]) for n, p in trainable(other).items())
    (folder / "manifest.json").unlink()  # was never finished
    with pytest.raises(FileNotFoundError, match="checkpoint folder such as"):
        find_parameters(folder)


def test_checkpoint_path_may_be_a_file_a_params_folder_or_a_run(tmp_path):
    entry = publish_policy(tmp_path / "params", tiny_policy(), 0)
    want = tmp_path / "params" / entry.file
    assert find_parameters(tmp_path) == find_parameters(tmp_path / "params") == find_parameters(want) == want
    with pytest.raises(FileNotFoundError, match="checkpoint_path"):
        find_parameters(tmp_path / "nowhere")


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_damaged_version_is_named_and_the_whole_one_before_it_is_used(tmp_path, caplog):
    for version in (1, 2, 3):
        publish_policy(tmp_path, tiny_policy(), version)
    flip(tmp_path / "v000003.safetensors")
    (tmp_path / "v000002.safetensors").write_bytes(b"")
    assert newest_whole(tmp_path).version == 1
    assert "v000003.safetensors is damaged: it does not match its sha256; version 1 is taken" in caplog.text
    assert "v000002.safetensors is damaged: expected" in caplog.text
    assert highest_number(tmp_path) == 3
    assert find_parameters(tmp_path) == tmp_path / "v000001.safetensors"
    with pytest.raises(ValueError, match=r"v000003.safetensors is damaged"):
        find_parameters(tmp_path / "v000003.safetensors")
    flip(tmp_path / "v000001.safetensors")
    with pytest.raises(ValueError, match=r"no version is whole: .*v000001.safetensors is damaged"):
        find_parameters(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "empty", "older"])
def test_the_newest_version_is_found_whatever_became_of_the_pointer(tmp_path, damage):
    publish_policy(tmp_path, tiny_policy(), 1)
    older = (tmp_path / "latest.json").read_bytes()
    publish_policy(tmp_path, tiny_policy(), 2)
    if damage == "missing":
        (tmp_path / "latest.json").unlink()
    else:  # as a power cut leaves it
        (tmp_path / "latest.json").write_bytes(older if damage == "older" else b"")
    assert newest_whole(tmp_path).version == 2


def test_a_version_whose_entry_is_damaged_is_not_used_unchecked(tmp_path, caplog):
    for version in (1, 2, 3):
        publish_policy(tmp_path, tiny_policy(), version)
    for name in ("v000003.json", "latest.json"):
        (tmp_path / name).write_bytes(b"{}")
    assert newest_whole(tmp_path).version == 2
    assert "v000003.json is damaged" in caplog.text
    with pytest.raises(ValueError, match=r"v000003.json is damaged"):
        find_parameters(tmp_path / "v000003.safetensors")


def test_pruning_passes_over_a_folder_where_a_version_was(tmp_path):
    publish_policy(tmp_path, tiny_policy(), 1)
    (tmp_path / "v000001.safetensors").unlink()
    (tmp_path / "v000001.safetensors").mkdir()
    publish_policy(tmp_path, tiny_policy(), 2, keep=1)
    assert newest_whole(tmp_path).version == 2
    assert [p.name.split(".damaged-")[0] for p in tmp_path.glob("v000001*")] == ["v000001.safetensors"]
