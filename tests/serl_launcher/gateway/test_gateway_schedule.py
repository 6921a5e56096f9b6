"""The stage is a pure function of counts; yaml mistakes are named."""

from __future__ import annotations

import pytest

from serl_launcher.run.schedule import Stage, current_stage, read_stages

ROWS = [
    {"name": "demos", "mode": "demo", "episodes": 20},
    {"name": "sft", "mode": "train", "steps": 900},
    {"name": "before", "mode": "eval", "episodes": 60, "first_seed": 1_000_000},
    {"name": "online", "mode": "online", "steps": 2400, "episodes": 0},
    {"name": "after", "mode": "eval", "episodes": 60},
]
STAGES = read_stages(ROWS)


@pytest.mark.parametrize(
    ("episodes", "steps", "ends", "name", "min_version", "done"),
    [
        ({}, {}, {}, "demos", -1, False),
        ({"demos": 19}, {"sft": 900}, {"sft": 5}, "demos", -1, False),  # in order, whatever came early
        ({"demos": 20}, {}, {}, "sft", -1, False),
        ({"demos": 20}, {"sft": 899}, {}, "sft", -1, False),
        ({"demos": 20}, {"sft": 900}, {"sft": 10}, "before", 10, False),
        ({"demos": 25, "before": 60}, {"sft": 900}, {"sft": 10}, "online", 0, False),
        ({"demos": 20, "before": 60, "online": 999}, {"sft": 900, "online": 2399}, {"sft": 10}, "online", 0, False),
        ({"demos": 20, "before": 60}, {"sft": 900, "online": 2400}, {"sft": 10, "online": 34}, "after", 34, False),
        ({"demos": 20, "before": 60, "after": 60}, {"sft": 900, "online": 2400}, {"online": 34}, "after", 34, True),
        # The trainer resumed from an older checkpoint: back to its training, evaluations stay counted.
        ({"demos": 20, "before": 60}, {"sft": 850}, {}, "sft", -1, False),
    ],
)
def test_current_stage(episodes, steps, ends, name, min_version, done) -> None:
    state = current_stage(STAGES, episodes, steps, ends)
    assert (state.stage.name, state.min_version, state.done) == (name, min_version, done)
    assert state.to_status()["name"] == name


def test_both_conditions_must_hold() -> None:
    stages = (Stage("online", "online", episodes=5, steps=10),)
    assert not current_stage(stages, {"online": 5}, {"online": 9}, {}).done
    assert not current_stage(stages, {"online": 4}, {"online": 10}, {}).done
    assert current_stage(stages, {"online": 5}, {"online": 10}, {}).done


def test_no_stages_and_a_stage_without_conditions_never_end() -> None:
    idle = current_stage((), {}, {}, {})
    assert not idle.done
    assert idle.to_status()["name"] == "idle"
    assert not current_stage((Stage("play", "demo"),), {"play": 10**6}, {}, {}).done


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"name": "x", "mode": "evel", "episodes": 1}, r"schedule\.stages\.0\.mode: expected one of .*, got 'evel'"),
        ({"name": "x", "mode": "demo", "episods": 1}, r"unknown key 'episods'; did you mean 'episodes'"),
        ({"name": "x", "mode": "train"}, "a train stage names steps"),
        ({"name": "x", "mode": "eval"}, "an eval stage names episodes"),
        (
            {"name": "x", "mode": "demo", "episodes": -1},
            r"episodes: expected a whole number from 0 to 2147483647, got -1",
        ),
        (
            {"name": "x", "mode": "eval", "episodes": 5, "first_seed": 7},
            "first_seed: expected a whole number from 1000000 to",
        ),
        ({"name": "adhoc_x", "mode": "demo"}, "does not start with 'adhoc_'"),
        ("demos", "expected {name, mode"),
    ],
)
def test_mistakes_are_named(row, message) -> None:
    with pytest.raises(ValueError, match=message):
        read_stages([row])


def test_names_are_unique() -> None:
    with pytest.raises(ValueError, match=r"stages\.1\.name: 'demos' is taken by stage 0"):
        read_stages([ROWS[0], ROWS[0]])
