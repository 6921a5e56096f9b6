"""Settings of train_reward.sh: each mistake is one message and exit code 2."""

import pytest
import train_reward_classifier
from omegaconf import OmegaConf


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("stages=abc", "stages in 'stages=abc' must be a whole number, got 'abc'"),
        ("fit.steps=abc", "fit.steps in 'fit.steps=abc' must be a whole number, got 'abc'"),
        ("fit.lr=big", "fit.lr in 'fit.lr=big' must be a number, got 'big'"),
        ("validation_share=abc", "validation_share in 'validation_share=abc' must be a number, got 'abc'"),
        ("seed=x", "seed in 'seed=x' must be a whole number of at least 0, got 'x'"),
        ("use_state=3", "must be true or false"),
        ("fit=3", "must be a section of keys"),
        ("cameras=front", "cameras in 'cameras=front' must be a list, such as [front], got 'front'"),
        ("cameras=[front", "cannot read 'cameras=[front'"),
        ("out=${nowhere}", "cannot read 'out=${nowhere}'"),
        ("run=7", "run=7: expected a run folder with config.yaml"),
        ("stagse=3", "unknown key 'stagse'; did you mean 'stages'?"),
        ("stages", "cannot read 'stages': expected key=value"),
        ("run=nowhere", "run=nowhere: expected a run folder with config.yaml"),
    ],
)
def test_a_mistake_is_one_message(capsys, word, message):
    assert train_reward_classifier.main([word]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("config", [{"seed": 3}, {"task": None}, {"task": {"name": "pick"}}])
def test_a_run_without_a_task_is_named(tmp_path, capsys, config):
    OmegaConf.save(OmegaConf.create(config), tmp_path / "config.yaml")
    assert train_reward_classifier.main([f"run={tmp_path}"]) == 2
    assert f"{tmp_path / 'config.yaml'}: task.spec is missing" in capsys.readouterr().err


def test_right_settings_are_taken():
    words = ["run=runs/a,runs/b", "cameras=[front]", "fit.lr=1e-4", "fit.steps=5", "seed=0", "use_state=true"]
    settings = train_reward_classifier.read_settings(words)
    assert (settings.run, settings.cameras, settings.fit.steps) == ("runs/a,runs/b", ["front"], 5)
    assert (settings.fit.lr, settings.fit.batch_size) == (1e-4, 32)
