"""Data that cannot be trained on, or not in the units of a checkpoint, is named before the first step."""

import re
from types import SimpleNamespace

import numpy as np
import preflight
import pytest
import train_sft
from checkpoints import make_tokenizer
from hydra.utils import instantiate
from safetensors.torch import load_file, save_file
from sft_samples import make_dataset

from serl_launcher.datasets.source import Source
from serl_launcher.learner.fit_check import Ranges, misfits
from serl_launcher.policies.estimate import meta_policy
from serl_launcher.policies.normalise import Affine, Units
from serl_transport.contract.specs import TaskSpec

META = {"_target_": "serl_launcher.policies.pi0.build.build_pi0"}
SPEC = {"name": "t", "prompt": "lift", "cameras": {"front": [32, 32], "wrist": [32, 32]}, "control_hz": 10}
SPEC |= {"state_names": ["a", "b", "c"], "state_low": [-1] * 3, "state_high": [1] * 3, "max_ticks": 60}
SPEC |= {"action_names": ["x", "g"], "action_low": [-1] * 2, "action_high": [1] * 2}
NAMES = SimpleNamespace(state_names=("a", "b"), action_names=("x", "gripper"))


def ranges(state=((-1, -1), (1, 1)), action=((-1, -1), (1, 1))):
    return Ranges(*(tuple(np.array(end, float) for end in ends) for ends in (state, action)))


def units(scale=(0.5, 0.5), offset=(0.0, 0.0)):
    return Units(Affine([0.0, 0.0], [0.5, 0.5]), Affine(offset, scale))


@pytest.mark.parametrize(
    ("given", "data", "told"),
    [
        (units(), ranges(), None),
        (units(scale=(0.5, 1e-8), offset=(0, 1)), ranges(action=((-1, 1), (1, 1))), None),  # still, at the same place
        (units(scale=(0.5, 1e-8), offset=(0, 10)), ranges(), r"action dim 1 \(gripper\).*from -1 to 1.*never moved"),
        (units(scale=(0.5, 1e-8)), ranges(action=((-1, 3), (1, 3))), r"action dim 1 \(gripper\).*never moved"),
        (units(scale=(0.5, 1e30)), ranges(), r"action dim 1 \(gripper\).*never moved"),
        (units(scale=(0.5, 0.01)), ranges(), r"action dim 1.*-100 to 100 in the checkpoint's units"),
        (units(offset=(99, 0)), ranges(), r"action dim 0 \(x\).*-200 to -196"),
        (units(scale=(200.0, 300.0)), ranges(), r"the dim that moves most spans 0\.01"),
        (units(), ranges(state=((-1, -50), (1, 50))), r"state dim 1 \(b\)"),
    ],
)
def test_units_that_do_not_fit_are_named_by_dim(given, data, told):
    found = misfits(given, data, NAMES)
    assert len(found) == (told is not None), found
    assert told is None or re.search(told, found[0]), found


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A dataset, and a checkpoint that was trained on it, as a user has them."""
    folder = tmp_path_factory.mktemp("fit")
    data, tokenizer = make_dataset(folder / "data"), make_tokenizer(folder / "tokenizer")
    words = [*SIZE, f"+policy.tokenizer={tokenizer}", "policy.action_horizon=4", "policy.init=random"]
    policy, _, _ = train_sft.opened(data, train_sft.configured(words))
    policy.save(folder / "checkpoint")
    return folder


SIZE = ["policy=pi0_tiny", "policy.size.image_size=32", "policy.size.prompt_tokens=32", "+policy.size.vocabulary=512"]


def with_statistics(place, **values):
    """The checkpoint with these values as statistics, name__part=(dim, value)."""
    for file in (place / "checkpoint").glob("policy_*normalizer_processor.safetensors"):
        tensors = load_file(file)
        for name, (dim, value) in values.items():
            tensors[name.replace("__", ".")][dim] = value
        save_file(tensors, file)


def test_a_checkpoint_whose_statistics_do_not_fit_is_refused_by_train_sft_and_preflight(place, tmp_path, capsys):
    words = [
        *SIZE,
        "policy.init=checkpoint",
        "policy.action_horizon=null",
        f"+policy.checkpoint={place / 'checkpoint'}",
    ]
    words += [f"+policy.tokenizer={place / 'tokenizer'}"]
    run = tmp_path / "run"
    for std, told in (
        (
            0.0,
            "units of action dim 1 (g): the data go from -1 to 1.85, and in the checkpoint's statistics this dim",
        ),
        (-1.0, "'action': std is negative in dims [1]"),
        (float("nan"), "'action': std holds NaN or Inf in dims [1]"),
    ):
        with_statistics(place, action__mean=(1, 10.0), action__std=(1, std))
        assert train_sft.main([str(place / "data"), str(run), *words]) == 2
        said = capsys.readouterr().err
        assert said.startswith("train_sft: ")
        assert said.count("\n") == 1
        assert told in said
        assert not run.exists()
    with_statistics(place, action__std=(1, 1e-3))
    spec = TaskSpec.from_dict(SPEC)
    size = instantiate(train_sft.configured(words).policy.size)
    policy, _ = meta_policy({**META, "checkpoint": str(place / "checkpoint")}, spec, size)
    (found,) = preflight.look_at(Source(str(place / "data")), policy, spec)
    assert "units of action dim 1 (g)" in found
