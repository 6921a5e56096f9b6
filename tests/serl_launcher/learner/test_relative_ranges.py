"""Statistics of relative actions: measured over chunks as LeRobot does, kept by a run, told from absolute ones."""

import json

import export_checkpoint
import numpy as np
import pytest
import torch
import train_sft
import yaml
from checkpoints import make_tokenizer
from safetensors.torch import load_file, save_file
from sft_samples import make_dataset

from serl_launcher.learner.relative import ranges_by, relative_ticks
from serl_launcher.learner.settings_check import units
from serl_launcher.learner.symptoms import Recording
from serl_launcher.policies.normalise import Affine, Units
from serl_transport.contract.specs import TaskSpec

NAMES = ["j1", "j2", "gripper"]
ANCHORS, HORIZON = (0, 1, None), 5
LENGTHS = (30, 4, 22)  # one episode is shorter than a chunk


def rows(slow=1.0):
    """Joints that walk, actions that lead them, a gripper."""
    rng, n = np.random.default_rng(0), sum(LENGTHS)
    state = np.cumsum(rng.normal(0, 0.1, (n, 3)), axis=0) * [1, 2, 1] + [3, -1, 0]
    action = state + slow * rng.normal(0.05, 0.02, (n, 3))
    ends = np.cumsum(LENGTHS)
    bounds = list(zip([0, *ends[:-1]], ends, strict=True))
    return state.astype(np.float32), action.astype(np.float32), [(int(a), int(b)) for a, b in bounds]


def test_ranges_over_all_ticks_are_lerobots():
    from lerobot.datasets.compute_stats import compute_relative_action_stats

    state, action, bounds = rows()
    episode = np.repeat(np.arange(3), LENGTHS)
    want = compute_relative_action_stats(
        {"action": action, "observation.state": state, "episode_index": episode},
        {"action": {"shape": (3,), "names": NAMES}},
        HORIZON,
        exclude_joints=["gripper"],
    )
    low, high = ranges_by("deviation", state, action, bounds, ANCHORS, HORIZON)
    np.testing.assert_allclose((low + high)[0] / 2, want["mean"], atol=1e-5)
    np.testing.assert_allclose((high - low)[0] / 2, want["std"], rtol=1e-4)
    low, high = ranges_by("quantiles", state, action, bounds, ANCHORS, HORIZON)
    wide = want["max"] - want["min"]  # LeRobot's quantiles are of a histogram
    assert (np.abs(low[0] - want["q01"]) < 0.02 * wide).all()
    assert (np.abs(high[0] - want["q99"]) < 0.02 * wide).all()


def test_ranges_by_tick_are_lerobots():
    from lerobot.policies.groot.processor_groot import _compute_horizon_relative_action_stats

    state, action, bounds = rows()
    ticks = list(relative_ticks(state, action, bounds, ANCHORS, HORIZON))
    want = _compute_horizon_relative_action_stats([list(x) for x in ticks])
    low, high = ranges_by("ticks", state, action, bounds, ANCHORS, HORIZON)
    np.testing.assert_allclose(low, want["min"])
    np.testing.assert_allclose(high, want["max"])
    # By hand: the second chunk of the first episode, its third tick.
    np.testing.assert_allclose(ticks[2][1], action[3] - [*state[1, :2], 0], rtol=1e-6)
    assert len(ticks[0]) == 26 + 18
    with pytest.raises(ValueError, match="no episode holds a chunk of 40 ticks, the longest has 30"):
        list(relative_ticks(state, action, bounds, ANCHORS, 40))


SPEC = TaskSpec.from_dict(
    {
        "name": "t", "prompt": "lift", "cameras": {}, "control_hz": 10, "max_ticks": 60,
        "state_names": NAMES, "state_low": [-9] * 3, "state_high": [9] * 3,
        "action_names": NAMES, "action_low": [-9] * 3, "action_high": [9] * 3,
    }
)  # fmt: skip


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize(
    ("relative", "kind"),
    [(True, "deviation"), (True, "quantiles"), (True, "ticks"), (False, "deviation"), (False, "quantiles")],
)
def test_statistics_of_the_other_kind_are_named(relative, right, kind):
    """What tools/why.py says of a policy: its statistics are those of its own actions, or of the other kind."""
    state, action, bounds = rows()
    anchors = ANCHORS if relative == right else None  # of the statistics
    low, high = ranges_by(kind, state, action, bounds, anchors, HORIZON)
    affine = Affine(((low + high) / 2).squeeze().tolist(), ((high - low) / 2).squeeze().tolist())
    states = Affine.from_bounds(state.min(0).tolist(), state.max(0).tolist())
    recorded = Recording(state, action, np.repeat(np.arange(3), LENGTHS), 10.0)
    found = [f for f in units(recorded, SPEC, Units(states, affine, ANCHORS if relative else None), True, HORIZON)]
    told = [str(f) for f in found if f.what == "statistics of action"]
    if right:
        assert not found
    else:
        said = ("relative", "absolute") if relative else ("absolute", "relative")
        assert "actions are {}, its statistics those of {} ones".format(*said) in told[0]


WORDS = [
    "policy=pi05_tiny", "policy.action_horizon=4", "policy.size.image_size=32", "policy.size.prompt_tokens=64",
    "trainer.device=cpu", "sft.steps=2", "sft.batch_size=3", "sft.held_out=0.34", "sft.eval_period=2",
]  # fmt: skip


@pytest.mark.slow
def test_a_fine_tuning_measures_them_and_its_run_and_export_know_them(tmp_path, capsys):
    import eval_open_loop

    data, run = make_dataset(tmp_path / "data"), tmp_path / "run"
    words = [*WORDS, "policy.relative={exclude: [g]}"]
    assert train_sft.main([str(data), str(run), *words]) == 0, capsys.readouterr().err
    assert "relative actions: their ranges are measured" in capsys.readouterr().out
    said = yaml.safe_load((run / "config.yaml").read_text())["policy"]["relative"]
    dataset = train_sft.Dataset(data)
    chunks = dataset.rows(dataset.spec())
    low, high = ranges_by("quantiles", chunks.state, chunks.action, chunks.bounds, (0, None), 4)
    np.testing.assert_allclose(said["low"][0][0], low[0, 0], rtol=1e-5)
    np.testing.assert_allclose(said["high"][0][0], high[0, 0], rtol=1e-5)
    assert train_sft.main([str(data), str(run), *words]) == 0, capsys.readouterr().err  # goes on, there is nothing left
    assert eval_open_loop.main([str(run), "--dataset", str(data), "--episodes", "0"]) == 0, capsys.readouterr().err
    errors = json.loads((run / "open_loop" / "open_loop.json").read_text())["policy"]
    assert errors["mse_physical"] < 4
    assert export_checkpoint.main([str(run), str(tmp_path / "out")]) == 0, capsys.readouterr().err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["use_relative_actions"], config["relative_exclude_joints"]) == (True, ["g"])
    processor = json.loads((tmp_path / "out" / "policy_preprocessor.json").read_text())
    step = next(s for s in processor["steps"] if s.get("registry_name") == "relative_actions_processor")
    assert step["config"] == {"enabled": True, "exclude_joints": ["g"], "action_names": ["x", "g"]}


@pytest.mark.slow
def test_fine_tuning_on_statistics_of_the_other_kind_is_refused_in_one_line(tmp_path, capsys):
    data, tokenizer = make_dataset(tmp_path / "data"), make_tokenizer(tmp_path / "tokenizer")
    small = [*WORDS, f"+policy.tokenizer={tokenizer}"]
    dataset = train_sft.Dataset(data)
    chunks = dataset.rows(dataset.spec())
    for kind, anchors, relative in (("relative", None, "{exclude: [g]}"), ("absolute", (0, None), "null")):
        policy, _, _ = train_sft.opened(data, train_sft.configured([*small, f"policy.relative={relative}"]))
        folder = policy.save(tmp_path / kind)
        low, high = (torch.tensor(x[0]).float() for x in ranges_by(
            "quantiles", chunks.state, chunks.action, chunks.bounds, anchors, 4
        ))  # fmt: skip
        for file in folder.glob("policy_*normalizer_processor.safetensors"):
            tensors = load_file(file)
            tensors |= {"action.q01": low, "action.q99": high}
            save_file(tensors, file)
        begin = [*small[1:], "policy=pi05_tiny", "policy.init=checkpoint", "policy.action_horizon=null"]
        begin = [word for word in begin if word != "policy.action_horizon=4"]
        run = tmp_path / f"run_{kind}"
        capsys.readouterr()
        assert train_sft.main([str(data), str(run), *begin, f"+policy.checkpoint={folder}"]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert f"statistics of action: the policy's actions are {kind}, its statistics those of" in said
        assert not run.exists()


@pytest.mark.slow
def test_preflight_prints_the_ranges_as_the_command_line_takes_them(tmp_path, capsys):
    import preflight

    from serl_launcher.datasets.source import Source

    data = make_dataset(tmp_path / "data")
    cfg = train_sft.configured([*WORDS, "policy=groot_tiny", "policy.relative={exclude: [g]}"])
    assert preflight.look_at(Source(str(data)), cfg, train_sft.Dataset(data).spec()) == []
    said = capsys.readouterr().out.partition("note: measured: ")[2].strip()
    key, _, value = said.partition("=")
    typed = train_sft.configured([*WORDS, "policy=groot_tiny", f"{key}={value.strip(chr(39))}"]).policy.relative
    assert typed == cfg.policy.relative
    assert len(typed.low) == 4


@pytest.mark.slow
@pytest.mark.parametrize("relative", ["{exclude: [g]}", "null"])
def test_a_base_without_statistics_goes_on_with_a_datasets(relative, tmp_path, capsys):
    """As the released π0.5 base is: its processors have modes and no statistics. The export stands alone."""
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.factory import make_pre_post_processors

    data, tokenizer = make_dataset(tmp_path / "data"), make_tokenizer(tmp_path / "tokenizer")
    small = [word for word in WORDS if "action_horizon" not in word] + [f"+policy.tokenizer={tokenizer}"]
    dataset = train_sft.Dataset(data)
    chunks, stats = dataset.rows(dataset.spec()), json.loads((data / "meta" / "stats.json").read_text())
    for key, values in (("observation.state", chunks.state), ("action", chunks.action)):
        stats[key] |= dict(zip(("q01", "q99"), np.quantile(values, (0.01, 0.99), axis=0).tolist(), strict=True))
    # LeRobot's own are means over episodes, in which a dim that stands still in each has no width.
    (data / "meta" / "stats.json").write_text(json.dumps(stats))
    policy, _, _ = train_sft.opened(data, train_sft.configured([*small, "policy.action_horizon=4"]))
    base = policy.save(tmp_path / "base")
    for file in base.glob("*normalizer_processor.safetensors"):
        file.unlink()
    for file in base.glob("policy_*processor.json"):
        content = json.loads(file.read_text())
        for step in content["steps"]:
            if step.pop("state_file", None):
                step["config"]["features"] = {}
        file.write_text(json.dumps(content))
    begin = [*small, "policy.init=checkpoint", "policy.action_horizon=null", f"+policy.checkpoint={base}"]
    run = tmp_path / "run"
    assert train_sft.main([str(data), str(run), *begin]) == 2
    assert "policy.statistics" in capsys.readouterr().err
    words = [*begin, f"+policy.statistics={data}", f"policy.relative={relative}"]
    assert train_sft.main([str(data), str(run), *words]) == 0, capsys.readouterr().err
    out = tmp_path / "out"
    assert export_checkpoint.main([str(run), str(out)]) == 0, capsys.readouterr().err
    trained, _, _ = train_sft.opened(data, train_sft.configured(words))
    again, _, _ = train_sft.opened(data, train_sft.configured([*begin[:-1], f"+policy.checkpoint={out}"]))
    assert again.anchors == trained.anchors == ((0, None) if relative != "null" else None)
    state, action = (torch.tensor(x[:4]) for x in (chunks.state, chunks.action))
    wanted = trained.normalise_actions(action, None if again.anchors is None else trained.anchor_of(state[:1])[0])
    before, _ = make_pre_post_processors(PreTrainedConfig.from_pretrained(out), pretrained_path=str(out))
    batch = {"observation.state": state[:1], "action": action[None], "task": ["lift"]}
    torch.testing.assert_close(before(batch)["action"][0], wanted[:, :2], atol=2e-4, rtol=1e-3)
    for one, other in ((again.state_units, trained.state_units), (again.action_units, trained.action_units)):
        torch.testing.assert_close(one.offset, other.offset)
        torch.testing.assert_close(one.scale, other.scale)
