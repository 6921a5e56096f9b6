"""Specs, step batches and episodes: what they accept, and what they say about what they refuse."""

import dataclasses

import numpy as np
import pytest
from transport_samples import SPEC_DICT, batch, info, observation, spec, step

from serl_transport.contract.errors import BadFrame, SchemaMismatch
from serl_transport.contract.schema import Episode, Observation, Outcome, StepBatch
from serl_transport.contract.specs import TaskSpec
from serl_transport.wire.codec import pack, unpack


def test_spec_survives_its_dict_and_the_wire():
    assert TaskSpec.from_dict(spec().to_dict()) == spec()
    assert TaskSpec.from_dict(spec(cameras={}).to_dict()).cameras == {}  # states alone
    assert TaskSpec.from_dict(unpack(pack(spec().to_dict()))) == spec()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"promt": "x"}, r"unknown key 'promt'; did you mean 'prompt'"),
        ({"state_low": [0.0]}, r"state_low: expected 3 numbers \(state_names\), got 1"),
        ({"action_high": [0.1, 0.0]}, r"action dim 'grip': low 0.0 must be below high 0.0"),
        ({"action_high": [0.1, float("inf")]}, "must be finite"),
        ({"cameras": {"front": [6]}}, r"cameras.front: expected \[height, width\]"),
        ({"cameras": {"front": [6, -1]}}, r"cameras.front: expected \[height, width\]"),
        ({"control_hz": 0}, "control_hz: expected a number above 0, got 0"),
        ({"action_names": ["dx", "dx"]}, "names must differ"),
        ({"prompt": ""}, "prompt: expected a text of 1 to 4096 characters"),
        ({"targets": {"dq": "x"}}, "targets: expected one of dx, grip, got 'dq'"),
        ({"targets": {"dx": "q"}}, "targets.dx: expected one of x, y, z, got 'q'"),
        ({"targets": ["dx"]}, r"targets: expected \{action name: state name\}, got \['dx'\]"),
    ],
)
def test_spec_names_the_offending_key(changes, message):
    with pytest.raises(ValueError, match=message):
        spec(**changes)


def test_spec_names_a_missing_key():
    with pytest.raises(ValueError, match="missing key 'max_ticks'"):
        TaskSpec.from_dict({key: value for key, value in SPEC_DICT.items() if key != "max_ticks"})


def test_differences_name_each_field_with_both_values():
    other = spec(max_ticks=30, cameras={"front": [6, 8], "side": [2, 2]}, action_low=[-0.2, 0.0])
    assert spec().differences(spec()) == []
    assert spec().differences(other, "actor", "learner") == [
        "cameras.side: absent actor, (2, 2) learner",
        "cameras.wrist: (4, 4) actor, absent learner",
        "action_low: [-0.1, 0.0] actor, [-0.2, 0.0] learner",
        "max_ticks: 20 actor, 30 learner",
    ]


def test_which_actions_are_targets_is_part_of_the_contract():
    absolute = spec(targets={"dx": "x"})
    assert TaskSpec.from_dict(unpack(pack(absolute.to_dict()))) == absolute
    assert absolute.target_dims == {0: 0}
    assert spec().differences(absolute, "actor", "learner") == ["targets: {} actor, {'dx': 'x'} learner"]
    assert "targets" not in spec().to_dict()  # as journals of earlier releases have it


def test_the_full_move_of_a_target_is_a_share_of_its_range_and_of_a_displacement_its_limits():
    moves = spec(targets={"dx": "x"}, action_low=[-10.0, -1.0], action_high=[40.0, 1.0], control_hz=20.0).full_moves()
    assert moves.tolist() == [[-0.5, -1.0], [0.5, 1.0]]  # 50 in five seconds, 20 times a second


def test_observation_check_names_camera_and_dim():
    good = observation(0)
    spec().check_observation(good)
    small = Observation({**good.images, "wrist": np.zeros((4, 5, 3), np.uint8)}, good.state)
    with pytest.raises(ValueError, match=r"camera 'wrist': expected uint8\[4, 4, 3\], got uint8\[4, 5, 3\]"):
        spec().check_observation(small)
    with pytest.raises(ValueError, match=r"camera 'wrist': no image; got cameras \['front'\]"):
        spec().check_observation(Observation({"front": good.images["front"]}, good.state))
    with pytest.raises(ValueError, match="camera 'side' is not in task 'pick'"):
        spec().check_observation(Observation({**good.images, "side": good.images["wrist"]}, good.state))
    with pytest.raises(ValueError, match="state dim 'y': expected a finite number, got nan"):
        spec().check_observation(Observation(good.images, np.array([0, np.nan, 0], np.float32)))
    with pytest.raises(ValueError, match=r"state: expected float32\[3\], got float64\[3\]"):
        spec().check_observation(Observation(good.images, np.zeros(3)))


def test_action_check_names_the_dim():
    spec().check_action(np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="action dim 'grip': expected a finite number, got inf"):
        spec().check_action(np.array([0, np.inf], np.float32))
    with pytest.raises(ValueError, match=r"action: expected float32\[2\], got float32\[3\]"):
        spec().check_action(np.zeros(3, np.float32))


@pytest.mark.parametrize("final", [False, True])
def test_batch_survives_the_wire(final):
    sent = batch(first_tick=4, n=3, final=final)
    got = StepBatch.from_body(unpack(pack(sent.to_body())), spec())
    assert (got.episode, got.first_tick, got.n, got.final, got.outcome) == (sent.episode, 4, 3, final, sent.outcome)
    assert len(got.arrays["observation.state"]) == 3 + final
    for key, rows in sent.arrays.items():
        np.testing.assert_array_equal(got.arrays[key], rows)
        assert got.arrays[key].dtype == rows.dtype


def _with(change):
    """The body of a final batch of three ticks at tick 4, changed by `change(arrays, body)`."""
    body = batch(first_tick=4, n=3, final=True).to_body()
    body["arrays"] = {key: rows.copy() for key, rows in body["arrays"].items()}
    change(body["arrays"], body)
    return body


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b: a.pop("intervention"), r"arrays: missing \['intervention'\]"),
        (lambda a, b: a.update(extra=np.zeros(3)), r"unknown \['extra'\]"),
        (
            lambda a, b: a.update(action=a["action"].astype(np.float64)),
            r"action: expected float32\[3, 2\], got float64",
        ),
        (lambda a, b: a.update({"next.done": a["next.done"][:2]}), r"next.done: expected bool\[3\], got bool\[2\]"),
        (
            lambda a, b: a.update({"observation.state": a["observation.state"][:3]}),
            r"observation.state: expected float32\[4, 3\], got float32\[3, 3\]",
        ),
        (
            lambda a, b: a["observation.state"].__setitem__((1, 2), np.nan),
            "observation.state dim 'z' at tick 1: expected a finite number, got nan",
        ),
        (lambda a, b: a["action"].__setitem__((2, 0), np.inf), "action dim 'dx' at tick 2: .* got inf"),
        (lambda a, b: a["next.reward"].__setitem__(0, np.nan), "next.reward: expected finite"),
        (lambda a, b: a["policy_version"].__setitem__(0, -2), "policy_version: expected -1 or more, got -2"),
        (lambda a, b: a["next.truncated"].__setitem__(0, True), "set at row 0, before the episode's end"),
        (lambda a, b: a["next.done"].__setitem__(2, False), "next.done must be set at the last tick"),
        (lambda a, b: b.update(first_tick=18), r"ticks 18..21 leave 0..20 \(max_ticks\)"),
        (lambda a, b: b["episode"].update(task="push"), "expected task 'pick', got 'push'"),
    ],
)
def test_batch_that_breaks_the_spec_is_a_schema_mismatch(change, message):
    with pytest.raises(SchemaMismatch, match=message):
        StepBatch.from_body(_with(change), spec())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b: b.pop("final"), r"missing keys \['final'\]"),
        (lambda a, b: b.update(first_tick=True), "first_tick: expected int, got bool"),
        (lambda a, b: b.update(outcome=None), "outcome belongs to the final batch only"),
        (lambda a, b: b["episode"].update(mode="play"), "mode: expected one of .* got 'play'"),
        (lambda a, b: b["episode"].update(seed="1"), "seed: expected int, got str"),
        (lambda a, b: b["episode"].update(actor_id=""), "actor_id: expected 1 to 256 characters"),
        (lambda a, b: b["outcome"].update(success_source="vibes"), "success_source: expected one of"),
        (lambda a, b: b["outcome"].update(truncated_by="fire"), "truncated_by: expected one of"),
        (lambda a, b: b.update(arrays=[1]), "arrays: expected dict, got list"),
    ],
)
def test_malformed_batch_is_a_bad_frame(change, message):
    with pytest.raises(BadFrame, match=message):
        StepBatch.from_body(_with(change), spec())


def test_episode_joins_batches_without_a_second_copy_of_an_observation():
    episode = Episode.from_batches([batch(0, 3), batch(3, 2), batch(5, 1, final=True)])
    assert episode.n == 6
    assert episode.outcome == Outcome(True, "environment", None)
    assert [len(episode.arrays[k]) for k in ("observation.images.front", "observation.state", "action")] == [7, 7, 6]
    np.testing.assert_array_equal(episode.arrays["observation.state"][6], observation(6).state)
    assert episode.arrays["time_ns"].tolist() == [1000, 1001, 1002, 1003, 1004, 1005]


def test_episode_refuses_gaps_strangers_and_open_ends():
    with pytest.raises(ValueError, match="expected a batch at tick 3, got 4"):
        Episode.from_batches([batch(0, 3), batch(4, 1, final=True)])
    with pytest.raises(ValueError, match="got a batch of 'other'"):
        Episode.from_batches([batch(0, 3), batch(3, 1, final=True, episode=info("other"))])
    with pytest.raises(ValueError, match="a batch follows the final one"):
        Episode.from_batches([batch(0, 3, final=True), batch(3, 1, final=True)])
    with pytest.raises(ValueError, match="no final batch"):
        Episode.from_batches([batch(0, 3)])


def test_cut_drops_the_tick_whose_next_observation_never_came():
    episode = Episode.cut([batch(0, 3), batch(3, 2)])
    assert episode is not None
    assert episode.n == 4  # five ticks with five observations: the fifth tick has no next observation
    assert len(episode.arrays["observation.state"]) == 5
    assert episode.arrays["next.truncated"].tolist() == [False, False, False, True]
    assert episode.outcome == Outcome(False, "environment", "dead_actor")
    assert Episode.cut([batch(0, 1)]) is None


def test_stop_between_batches_closes_the_last_sent_tick():
    empty = StepBatch.from_steps(info(), 3, [step(3, truncated=True)], observation(3), Outcome(False, "human", "stop"))
    arrays = {key: rows if key.startswith("observation") else rows[:0] for key, rows in empty.arrays.items()}
    arrays = {key: rows[:1] if key.startswith("observation") else rows for key, rows in arrays.items()}
    last = StepBatch.from_body(dataclasses.replace(empty, arrays=arrays).to_body(), spec())
    episode = Episode.from_batches([batch(0, 3), last])
    assert episode.n == 3
    assert len(episode.arrays["observation.state"]) == 4
    assert episode.arrays["next.truncated"].tolist() == [False, False, True]
