"""Actions relative to a pose: beside LeRobot's conversion and scipy's rotations, and through a GR00T checkpoint."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from serl_launcher.learner.relative import relative_ticks
from serl_launcher.policies.base import PolicyInput, flow_loss, sample
from serl_launcher.policies.checkpoint import CheckpointError
from serl_launcher.policies.groot.build import build_groot
from serl_launcher.policies.groot.saving import save_groot
from serl_launcher.policies.groot.tiny import TinyGrootSize
from serl_launcher.policies.poses import absolute_pose, relative_pose
from serl_transport.contract.specs import TaskSpec

EEF = ["x", "y", "z", *(f"r{k}" for k in range(6))]
SPEC = TaskSpec.from_dict(
    {
        "name": "t",
        "prompt": "lift",
        "cameras": {"front": [32, 32]},
        "state_names": ["j", *EEF, "grip"],
        "state_low": [-1] * 11,
        "state_high": [1] * 11,
        "action_names": ["grip", *EEF, "j"],
        "action_low": [-1, *[-2] * 3, *[-1] * 6, -1],
        "action_high": [1, *[2] * 3, *[1] * 6, 1],
        "control_hz": 10,
        "max_ticks": 60,
    }
)
B, AH = 2, 3
SIZE = TinyGrootSize(layers=1, vision_layers=1, head_layers=2, width=32, head_width=32, image_size=32)


def random_poses(*shape, seed=0):
    """Positions and rotations, the latter as orthonormal rows: float32[…, 9]."""
    rng = np.random.default_rng(seed)
    rotations = Rotation.random(int(np.prod(shape)), random_state=rng).as_matrix()[:, :2].reshape(*shape, 6)
    return np.concatenate([rng.uniform(-1, 1, (*shape, 3)), rotations], -1).astype(np.float32)


def rough(poses):
    """As a network gives them: rows neither of length 1 nor at right angles."""
    return (poses + 0.2 * np.random.default_rng(9).standard_normal(poses.shape)).astype(np.float32)


def test_the_absolute_pose_is_lerobots():
    from lerobot.policies.groot.utils import relative_eef_to_absolute

    action, reference = rough(random_poses(4, 6)), rough(random_poses(4, seed=1))
    got = absolute_pose(torch.tensor(action), torch.tensor(reference)[:, None])
    np.testing.assert_allclose(got, relative_eef_to_absolute(action, reference), atol=1e-6)


def test_the_relative_pose_is_the_inverse_transformation_of_scipy():
    """T_ref⁻¹ · T, as Isaac-GR00T's poses subtract."""
    pose, reference = random_poses(5), random_poses(5, seed=1)
    turned = [Rotation.from_matrix(np.stack([p[3:6], p[6:9], np.cross(p[3:6], p[6:9])])) for p in (*pose, *reference)]
    got = relative_pose(torch.tensor(pose), torch.tensor(reference)).numpy()
    for k, (a, r) in enumerate(zip(turned[:5], turned[5:], strict=True)):
        np.testing.assert_allclose(got[k, :3], r.inv().apply(pose[k, :3] - reference[k, :3]), atol=1e-6)
        np.testing.assert_allclose(got[k, 3:].reshape(2, 3), (r.inv() * a).as_matrix()[:2], atol=1e-6)
    np.testing.assert_allclose(absolute_pose(torch.tensor(got), torch.tensor(reference)), pose, atol=1e-6)


def test_what_is_no_rotation_stays_finite_for_labels_that_do_not_count():
    zero = torch.zeros(9, requires_grad=True)
    relative = relative_pose(zero, torch.tensor(random_poses(1)[0]))
    relative.sum().backward()
    assert torch.isfinite(relative).all()
    assert torch.isfinite(zero.grad).all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """NVIDIA's layout with three action parts: grip absolute, eef relative as a pose, j relative to a joint."""
    policy = build_groot("t", SPEC, "random", 0, AH, SIZE)
    out = save_groot(policy, tmp_path_factory.mktemp("poses") / "n1_7")
    width = {"grip": 1, "eef": 9, "j": 1}

    def ranges(dims):
        return {name: [sign] * dims for name, sign in (("min", -1.0), ("max", 1.0), ("mean", 0.0), ("std", 1.0))}

    def said(rep, kind="non_eef", form="default", **more):
        return {"rep": rep, "type": kind, "format": form, **more}

    by_tick = {"min": [[-0.5] * 3 + [-1.0] * 6] * AH, "max": [[0.5] * 3 + [1.0] * 6] * AH}
    statistics = {what: {key: ranges(n) for key, n in width.items()} for what in ("state", "action")}
    statistics["state"] = {key: statistics["state"][key] for key in ("j", "eef", "grip")}
    statistics["relative_action"] = {"eef": by_tick, "j": {"min": [[-0.2]] * AH, "max": [[0.4]] * AH}}
    parts = {what: {"modality_keys": list(statistics[what]), "delta_indices": [0]} for what in ("state", "action")}
    parts["action"] |= {
        "delta_indices": list(range(AH)),
        "action_configs": [said("ABSOLUTE"), said("RELATIVE", "EEF", "XYZ_ROT6D", state_key="eef"), said("RELATIVE")],
    }
    parts["video"] = {"modality_keys": ["front"], "delta_indices": [0]}
    kwargs = {"modality_configs": {"new_embodiment": parts}, "use_relative_action": True, "clip_outliers": True}
    (out / "statistics.json").write_text(json.dumps({"new_embodiment": statistics}))
    (out / "processor_config.json").write_text(json.dumps({"processor_kwargs": kwargs}))
    return out


def load(folder):
    return build_groot("t", SPEC, "checkpoint", 0, None, SIZE, checkpoint=str(folder))


@pytest.fixture(scope="module")
def policy(folder):
    return load(folder)


@pytest.fixture
def unclipped(policy, monkeypatch):
    """What lies beyond the checkpoint's statistics is not cut, and so comes back."""
    monkeypatch.setattr(policy, "clip", False)
    return policy


def observe(seed=2):
    rng = np.random.default_rng(seed)
    state = rng.uniform(-0.5, 0.5, (B, 11)).astype(np.float32)
    state[:, 1:10] = random_poses(B, seed=seed)
    return PolicyInput({"front": rng.integers(0, 256, (B, 32, 32, 3), dtype=np.uint8)}, state, ["lift"] * B)


def test_a_checkpoints_chunk_is_what_lerobot_decodes(policy):
    from lerobot.policies.groot.utils import relative_eef_to_absolute

    given = observe()
    assert (policy.anchors, policy.poses) == ((None, *range(1, 10), 0), (1,))
    with torch.no_grad():
        prefix = policy.encode(given)
        chunk = sample(policy, prefix, torch.randn(B, AH, 11, generator=torch.Generator().manual_seed(0)), 2)
        got = policy.physical_actions(chunk, prefix.anchor).numpy()
    units = chunk.clamp(-1, 1).numpy()
    np.testing.assert_allclose(got[..., 0], units[..., 0], atol=1e-6)
    relative = units[..., 1:10] * ([0.5] * 3 + [1] * 6)
    np.testing.assert_allclose(
        got[..., 1:10], relative_eef_to_absolute(relative, given.state[:, 1:10]).clip(-2, 2), atol=1e-5
    )
    np.testing.assert_allclose(got[..., 10], (0.1 + 0.3 * units[..., 10] + given.state[:, :1]).clip(-1, 1), atol=1e-5)


def test_a_running_chunk_is_expressed_anew_from_the_pose_of_the_new_question(unclipped):
    """Real-time chunking, labels, take-over and replay: absolute and physical outside, whatever the anchor."""
    policy = unclipped
    first, second = (policy.anchor_of(torch.tensor(observe(seed).state)) for seed in (2, 3))
    running = first + torch.zeros(B, AH, 11)
    running[..., 1:10] = torch.tensor(random_poses(B, AH, seed=5)) * torch.tensor([0.2] * 3 + [1] * 6)
    one, other = policy.normalise_actions(running, first), policy.normalise_actions(running, second)
    assert (one - other).abs().max() > 0.1
    for chunk, anchor in ((one, first), (other, second)):
        torch.testing.assert_close(policy.physical_actions(chunk, anchor), running, atol=1e-5, rtol=1e-5)


def test_a_label_that_does_not_count_may_be_no_pose(policy):
    given, pad = observe(), torch.zeros(B, AH, dtype=torch.bool)
    pad[:, 1:] = True
    prefix, labels = policy.encode(given), torch.zeros(B, AH, 11)
    labels[:, 0, 1:10] = torch.tensor(random_poses(B))
    chunk = policy.normalise_actions(labels, prefix.anchor)
    loss = flow_loss(policy, prefix, chunk, pad, torch.ones(B), torch.zeros_like(chunk), torch.full((B,), 0.5))
    loss.sum().backward()
    assert torch.isfinite(loss).all()


def test_a_datasets_relative_poses_are_the_policys(unclipped):
    """What fine-tuning, preflight and why hold the statistics against."""
    policy = unclipped
    rng, rows = np.random.default_rng(0), AH + 2
    state, action = rng.uniform(-0.3, 0.3, (2, rows, 11)).astype(np.float32)
    state[:, 1:10], action[:, 1:10] = random_poses(rows, seed=6), random_poses(rows, seed=7)
    ticks = list(relative_ticks(state, action, [(0, rows)], policy.anchors, AH, poses=policy.poses))
    anchor = policy.anchor_of(torch.tensor(state[:3]))
    windows = torch.tensor(np.stack([action[k : k + AH] for k in range(3)]))
    want = policy.action_units.to_physical(policy.normalise_actions(windows, anchor))
    np.testing.assert_allclose(np.stack(ticks, 1), want, atol=1e-5)


def test_an_export_says_it_again(policy, folder, tmp_path):
    again = load(save_groot(policy, tmp_path / "out"))
    assert (again.anchors, again.poses) == (policy.anchors, policy.poses)
    assert "_poses" in again.state_dict()  # parameters fit only what they were trained relative to


def refused(folder, tmp_path, change):
    out = tmp_path / "copy"
    out.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            (out / path.name).hardlink_to(path)
    for name in ("processor_config.json", "statistics.json"):
        content = json.loads((folder / name).read_text())
        change(content)
        (out / name).unlink()
        (out / name).write_text(json.dumps(content))
    return Path(out)


def parts_of(content):
    return content.get("processor_kwargs", {}).get("modality_configs", {}).get("new_embodiment")


def form(content, **said):
    if parts := parts_of(content):
        parts["action"]["action_configs"][1].update(said)


def state_of(content, dims):
    if "new_embodiment" in content:
        of = content["new_embodiment"]["state"]
        of["eef"], of["grip"] = ({k: (x * 9)[:n] for k, x in of[p].items()} for p, n in (("j", dims), ("j", 10 - dims)))


def encoded(content, what, keys, **flags):
    if parts := parts_of(content):
        parts[what].update(keys)
        content["processor_kwargs"].update(flags)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: form(c, format="XYZ_ROTVEC"), r"'eef' is relative as a pose \(eef, xyz\+rotvec, 9 dims\); only eef"),
        (lambda c: form(c, format="DEFAULT"), r"\(eef, default, 9 dims\); only eef, xyz\+rot6d, of 9 is read"),
        (lambda c: state_of(c, 7), "'eef' of 9 dims is relative to state 'eef': 7 dims"),
        (lambda c: encoded(c, "state", {"sin_cos_embedding_keys": ["j"]}, apply_sincos_state_encoding=True),
         r"state parts \['j'\] are encoded as sine and cosine"),
        (lambda c: encoded(c, "action", {"mean_std_embedding_keys": ["j"]}),
         r"action parts \['j'\] are normalised by mean and deviation"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_as_meant_is_refused(folder, tmp_path, change, told):
    with pytest.raises(CheckpointError, match=told):
        load(refused(folder, tmp_path, change))
