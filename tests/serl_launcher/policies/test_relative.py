"""Relative actions of PI0 and PI0.5 beside LeRobot's: loss, gradient and chunk, out and back, real-time chunking."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import AH, BUILD, SIZE, lerobot_batch, make_tokenizer
from checkpoints import SPEC as ABSOLUTE

from serl_launcher.agents.flow_matching import imitation_loss
from serl_launcher.policies import realtime
from serl_launcher.policies.base import PolicyInput, sample
from serl_launcher.policies.checkpoint import CheckpointError
from serl_launcher.policies.pi0.tiny import shrunk
from serl_launcher.replay.views import ChunkBatch
from serl_transport.contract.specs import TaskSpec

B = 2
NAMES = ["j1", "j2", "Gripper.pos"]
TASK = ABSOLUTE.to_dict() | {
    "state_names": [*NAMES, "other"],
    "state_low": [-1] * 4,
    "state_high": [1] * 4,
    "action_names": NAMES,
    "action_low": [-1.2, -1.2, -1],
    "action_high": [1.2, 1.2, 1],
}
SPEC = TaskSpec.from_dict(TASK)
RELATIVE = {"exclude": ["gripper"], "low": [[-0.3, -0.5, 0]], "high": [[0.2, 0.4, 0]]}
KINDS = ["pi0", "pi05"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Random weights of each kind that learn relative actions, saved by us."""
    parent = tmp_path_factory.mktemp("relative")
    tokenizer = make_tokenizer(parent / "tokenizer")
    options = {"tokenizer": str(tokenizer), "relative": RELATIVE}
    return {k: BUILD[k](k, SPEC, "random", 0, AH, SIZE[k], **options).save(parent / k) for k in KINDS}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def saved(kind, folders):
    return folders[kind]


@pytest.fixture(scope="module")
def theirs(kind, saved):
    """(policy, preprocessor, postprocessor) as LeRobot loads them."""
    import lerobot.policies.pi0.modeling_pi0 as pi0
    import lerobot.policies.pi05.modeling_pi05 as pi05
    from lerobot.policies.factory import make_pre_post_processors

    module, cls = (pi0, pi0.PI0Policy) if kind == "pi0" else (pi05, pi05.PI05Policy)
    with shrunk(module, SIZE[kind]):
        policy = cls.from_pretrained(saved)
    return policy, *make_pre_post_processors(policy.config, pretrained_path=str(saved))


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def load(kind, folder, spec=SPEC, **options):
    return BUILD[kind](kind, spec, "checkpoint", 0, None, SIZE[kind], checkpoint=str(folder), **options)


def observe(seed=0):
    rng = np.random.default_rng(seed)
    images = {c: rng.integers(0, 256, (B, *hw, 3), dtype=np.uint8) for c, hw in SPEC.cameras.items()}
    return PolicyInput(images, rng.uniform(-0.9, 0.9, (B, 4)).astype(np.float32), ["pick up the red cube", "lift"])


def act(policy, given, noise, steps=3):
    with torch.no_grad():
        prefix = policy.encode(given)
        return policy.physical_actions(sample(policy.eval(), prefix, noise, steps), prefix.anchor)


def seeded_noise(seed=0):
    return torch.randn(B, AH, 3, generator=torch.Generator().manual_seed(seed))


def their_chunk(theirs, given, noise):
    policy, before, after = theirs
    wide = torch.nn.functional.pad(noise, (0, policy.config.max_action_dim - 3))
    return after(policy.predict_action_chunk(before(lerobot_batch(given)), noise=wide, num_steps=3))


def within(chunk):
    return chunk.clamp(torch.tensor(SPEC.action_low), torch.tensor(SPEC.action_high))


def test_the_chunk_equals_lerobots(kind, saved, theirs):
    given, noise = observe(), seeded_noise()
    policy = load(kind, saved)
    assert policy.anchors == (0, 1, None)
    got, want = act(policy, given, noise), their_chunk(theirs, given, noise)
    torch.testing.assert_close(got, within(want), atol=1e-5, rtol=1e-4)
    # The same chunk asked at another state lies elsewhere, but for the gripper.
    shifted = policy.physical_actions(torch.zeros(B, AH, 3), policy.anchor_of(torch.tensor(given.state)))
    at_rest = policy.physical_actions(torch.zeros(B, AH, 3), policy.anchor_of(torch.zeros(B, 4)))
    torch.testing.assert_close(
        shifted - at_rest, torch.tensor(given.state[:, None, :3] * [1, 1, 0], dtype=torch.float32).expand(B, AH, 3)
    )


def test_loss_and_gradients_equal_lerobots_training_forward(kind, saved, theirs, monkeypatch):
    """LeRobot's preprocessor and `forward` on absolute actions, beside our loss on the same batch."""
    given, rng = observe(1), np.random.default_rng(2)
    action = (given.state[:, None, :3] + rng.uniform(-0.3, 0.3, (B, AH, 3))).astype(np.float32)
    noise, t = seeded_noise(3), torch.tensor([0.3, 0.8])
    policy, before, _ = theirs
    monkeypatch.setattr(policy.model, "sample_noise", lambda shape, device: noise)
    monkeypatch.setattr(policy.model, "sample_time", lambda n, device: 1 - t)
    policy.zero_grad()
    want, _ = policy.forward(before(lerobot_batch(given) | {"action": torch.tensor(action)}))
    want.backward()
    ours = load(kind, saved, train="full")
    monkeypatch.setattr("serl_launcher.agents.shares.normal", lambda shape, device: noise)
    monkeypatch.setattr("serl_launcher.agents.shares.times", lambda n, device: t)
    ones, pad = np.ones(B, np.float32), np.zeros((B, AH), bool)
    batch = ChunkBatch(given.images, given.state, action, pad, ones > 0, ones > 1, ones, given.prompts)
    got, _ = imitation_loss(ours, batch, 1)
    got.backward()
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    theirs_by_name = {f"core.{name.removeprefix('model.')}": p.grad for name, p in policy.named_parameters()}
    compared = 0
    for name, p in ours.named_parameters():
        mine, other = (torch.zeros_like(p) if g is None else g for g in (p.grad, theirs_by_name[name]))
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-3, msg=name)
        compared += int(mine.abs().sum() > 0)
    assert compared > 40


def test_what_lerobot_saves_we_load_and_what_we_load_we_save(kind, saved, theirs, tmp_path):
    policy, before, after = theirs
    for part in (policy, before, after):
        part.save_pretrained(tmp_path / "theirs")
    shutil.copytree(saved.parent / "tokenizer", tmp_path / "theirs" / "tokenizer")
    given, noise = observe(4), seeded_noise(5)
    ours = load(kind, tmp_path / "theirs")
    torch.testing.assert_close(act(ours, given, noise), within(their_chunk(theirs, given, noise)), atol=5e-5, rtol=1e-4)
    again = ours.save(tmp_path / "again")
    for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
        assert (again / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    assert load(kind, again).anchors == (0, 1, None)


def edit_step(folder, file, names, **changes):
    path = folder / file
    content = json.loads(path.read_text())
    for step in content["steps"]:
        if step.get("registry_name") in names:
            step["config"] |= changes
            step["registry_name"] = changes.get("registry_name", step["registry_name"])
            step["config"].pop("registry_name", None)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("file", "changes", "told"),
    [
        ("policy_postprocessor.json", {"enabled": False}, "relative in policy_preprocessor.json, absolute in policy_p"),
        ("policy_preprocessor.json", {"action_names": ["j2", "j1", "Gripper.pos"]}, "its actions are ['j2', 'j1'"),
        ("policy_preprocessor.json", {"action_names": ["j1", "j2"]}, "its actions are ['j1', 'j2']"),
    ],
)
def test_processors_that_contradict_each_other_or_the_task_are_refused(kind, copy, file, changes, told):
    edit_step(copy, file, ("relative_actions_processor", "absolute_actions_processor"), **changes)
    with pytest.raises(CheckpointError) as refused:
        load(kind, copy)
    assert told in str(refused.value)


def test_the_steps_former_name_is_read(kind, copy):
    edit_step(
        copy, "policy_preprocessor.json", ("relative_actions_processor",), registry_name="delta_actions_processor"
    )
    assert load(kind, copy).anchors == (0, 1, None)


def test_a_task_whose_states_are_in_another_order_is_refused(kind, saved):
    other = TaskSpec.from_dict(TASK | {"state_names": ["j2", "j1", "Gripper.pos", "other"]})
    with pytest.raises(CheckpointError, match=r"'j1' is relative to state dim 0 \(j2\), its own is dim 1"):
        load(kind, saved, other)
    commands = TaskSpec.from_dict(
        TASK | {"action_names": ["dx", "dy", "Gripper.pos"], "targets": {"Gripper.pos": "other"}}
    )
    with pytest.raises(CheckpointError, match=r"'dx' is relative to a state, but by task\.spec\.targets it is no"):
        load(kind, saved, commands)


def test_real_time_chunking_anchors_the_running_chunk_anew(kind, saved, theirs, monkeypatch):
    """As LeRobot re-expresses what is left of a chunk; asked at two states in one batch, each row by its own."""
    from lerobot.policies.rtc.relative import reanchor_relative_rtc_prefix
    from lerobot.processor import NormalizerProcessorStep, RelativeActionsProcessorStep

    from serl_launcher.serving.engine import PolicyEngine
    from serl_launcher.serving.query import Query

    policy, given = load(kind, saved).eval().requires_grad_(False), observe(6)
    left = np.random.default_rng(7).uniform(-0.5, 0.5, (B, 3, 3)).astype(np.float32)
    engine = PolicyEngine.__new__(PolicyEngine)
    engine.policy, engine.spec, engine.device, engine._steps, engine._graphs = policy, SPEC, policy.device, 3, None
    seen = []
    guided = realtime.sample_realtime

    def watched(policy, prefix, noise, steps, known, mask):
        seen.append(known)
        return guided(policy, prefix, noise, steps, known, mask)

    monkeypatch.setattr("serl_launcher.serving.engine.sample_realtime", watched)
    images = [{c: x[row] for c, x in given.images.items()} for row in range(B)]
    queries = [
        Query(images[k], given.state[k], given.prompts[k], seed=k, prefix_actions=left[k], inference_delay=2)
        for k in range(B)
    ]
    answers = engine.act(queries)
    steps = theirs[1].steps
    relative = next(s for s in steps if isinstance(s, RelativeActionsProcessorStep))
    normaliser = next(s for s in steps if isinstance(s, NormalizerProcessorStep))
    for row in range(B):
        want = reanchor_relative_rtc_prefix(
            torch.tensor(left[row : row + 1]), torch.tensor(given.state[row]), relative, normaliser, "cpu"
        )
        torch.testing.assert_close(seen[0][row : row + 1, :3, :3], want, atol=1e-5, rtol=1e-5)
    plain_queries = [Query(images[k], given.state[k], given.prompts[k], seed=k) for k in range(B)]
    plain = engine.act(plain_queries)
    for row in range(B):  # steered towards what is executed of the running chunk, wherever the arm is by now
        guided_error, plain_error = (np.abs(x[row][:2] - left[row][:2]).mean() for x in (answers, plain))
        assert guided_error < plain_error
    engine._graphs, engine._sizes = engine._forward, (1, 2, 4)  # the path of CUDA graphs, filled up to four rows
    by_graph = engine.act([*plain_queries, plain_queries[0]])
    for row in range(B):
        np.testing.assert_allclose(by_graph[row], plain[row], atol=1e-5)
    engine._graphs = None
    alone = engine.act([Query(images[1], given.state[1], given.prompts[1], seed=1, samples=2)])[0]
    np.testing.assert_allclose(alone[0], plain[1], atol=1e-5)


def test_an_anchor_is_never_forgotten_or_made_up(kind, saved):
    policy, chunk = load(kind, saved), torch.zeros(B, AH, 3)
    with pytest.raises(ValueError, match="relative to a state"):
        policy.physical_actions(chunk)
    with pytest.raises(ValueError, match="relative to a state"):
        policy.normalise_actions(chunk)


@pytest.mark.parametrize(
    ("relative", "told"),
    [
        (
            {"exclude": ["gripper"]},
            r"policy\.relative: the ranges .* come from a dataset: examples/train_sft\.py measures them",
        ),
        (RELATIVE | {"exclude": ["griper"]}, r"policy\.relative\.exclude: no action is called 'griper'"),
        (RELATIVE | {"exclude": [""]} | {"exclude": ["j", "grip"]}, "leaves no action"),
        (RELATIVE | {"means": []}, r"policy\.relative: expected exclude, low and high, got 'means'"),
    ],
)
def test_a_wish_that_cannot_be_met_is_refused(relative, told):
    with pytest.raises(ValueError, match=told):
        BUILD["pi0"]("t", SPEC, "random", 0, AH, SIZE["pi0"], relative=relative)


def test_a_checkpoint_is_not_told_what_it_says_itself(kind, saved):
    with pytest.raises(ValueError, match=r"policy\.relative: a checkpoint says it itself"):
        load(kind, saved, relative=RELATIVE)
