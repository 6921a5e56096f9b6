"""Keys that may change in a running training: checked as a start checks them, and the last word of a start."""

import pytest
import yaml
from configured import composed
from omegaconf import OmegaConf
from tiny import tiny_config

from serl_launcher.run.in_force import EndedStage, InForce, Setting
from serl_launcher.run.live_settings import check, in_force, keys, value_of


def config(*words: str) -> dict:
    cfg = tiny_config()
    cfg.schedule = composed("schedule=quickstart").schedule
    for word in words:
        key, _, value = word.partition("=")
        OmegaConf.update(cfg, key, yaml.safe_load(value))
    return OmegaConf.to_container(cfg, resolve=True)


def test_the_keys_are_those_of_the_rule_the_rates_and_the_stages() -> None:
    found = set(keys(config()))
    may = {"algo.rule.min_return", "algo.rule.require_success", "algo.min_accepted", "trainer.max_steps_per_tick"}
    may |= {"trainer.rollback_margin", "schedule.stages.online.steps", "schedule.stages.demos.episodes"}
    assert may <= found
    assert not {"algo.rule._target_", "algo.rule.noop_dims", "schedule.stages.demos.steps"} & found


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("algo.rule.min_retrun", 0.8, r"did you mean 'algo.rule.min_return'"),
        ("trainer.batch_size", 8, r"'trainer.batch_size' cannot change in a running training"),
        ("algo.rule.min_return", "much", r"algo.rule.min_return: expected a number, got 'much'"),
        ("algo.rule.min_ticks", -1, r"algo.rule.min_ticks: expected a whole number of at least 0, got -1"),
        ("algo.rule.require_success", 1, r"algo.rule.require_success: expected true or false, got 1"),
        ("algo.rule.min_return", {"_target_": "os.system"}, r"expected a plain value"),
        ("trainer.max_steps_per_tick", 0, r"trainer.max_steps_per_tick: expected a number from 1e-06"),
        ("trainer.publish_period", 1.5, r"trainer.publish_period: expected a whole number from 1"),
        ("schedule.stages.online.steps", 0, r"schedule.stages.online.steps: expected a whole number from 1, got 0"),
        ("schedule.stages.onlin.steps", 9, r"did you mean 'schedule.stages.online.steps'"),
        ("algo.threshold.ceiling", 0.1, r"algo.threshold: expected 0 ≤ quantile"),
    ],
)
def test_what_a_start_would_not_take_is_refused(key: str, value: object, problem: str) -> None:
    threshold = "{_target_: serl_launcher.replay.threshold.QuantileThreshold, start: 0.5, ceiling: 0.9}"
    with pytest.raises(ValueError, match=problem):
        check(config(f"algo.threshold={threshold}"), key, value)


def test_what_a_start_would_take_is_taken() -> None:
    values = {"algo.rule.min_return": 0.8, "trainer.rollback_margin": None, "algo.rule.mask_before_takeover": 3}
    for key, value in {**values, "schedule.stages.online.steps": 5000}.items():
        check(config(), key, value)


def test_a_change_holds_until_a_start_types_another_value() -> None:
    state = InForce()
    for key, value in (("algo.rule.min_return", 0.8), ("schedule.stages.online.steps", 5000)):
        state.settings[key] = Setting(value, value_of(config(), key), "alice", "2026")
    state.ended["sft"] = EndedStage({"steps": 600, "episodes": None}, 3, 7, True)
    live = in_force(config(), state)
    assert live.config["algo"]["rule"]["min_return"] == 0.8
    assert [stage.steps for stage in live.stages if stage.name == "online"] == [5000]
    assert (live.ended, live.passed_over, config()["algo"]["rule"]["min_return"]) == ({"sft": 7}, [], 0.5)
    typed = in_force(config("algo.rule.min_return=0.6", "schedule.stages.1.steps=900"), state)
    assert typed.config["algo"]["rule"]["min_return"] == 0.6
    assert "alice set algo.rule.min_return to 0.8 (2026); it does not hold" in typed.passed_over[0]
    assert typed.ended == {}  # sft was given another goal: it goes on
