"""A mistake in the config ends the trainer and the policy server with one message and exit code 2."""

import pytest
import torch
from omegaconf import OmegaConf
from tiny import tiny_config

from serl_launcher.learner.__main__ import main as trainer_main
from serl_launcher.run.paths import RunPaths
from serl_launcher.serving import server

QUANTILE = "{_target_: serl_launcher.replay.threshold.QuantileThreshold, start: 0.5, ceiling: 0.1}"
FALLING = "{_target_: serl_launcher.replay.threshold.SteppedThreshold, values: {0: 0.5, 10: 0.1}}"
MISTAKES = [
    ("reject_sampling_pi0", "algo.rule._target_=serl_launcher.replay.acceptance.Nope", "algo.rule._target_: No module"),
    ("reject_sampling_pi0", "algo.rule._target_=math.pi", "algo.rule: Expected a callable target"),
    ("reject_sampling_pi0", "algo.rule.min_tick=5", "algo.rule: SuccessRule.__init__() got an unexpected keyword"),
    ("reject_sampling_pi0", "algo.rule.noop_dims=[7]", "task.noop_dims (algo.rule.noop_dims): expected a list"),
    ("reject_sampling_pi0", "algo.rule.noop_dims=[7]", "0 to 1 (x, g), or null (all), got [7]"),
    ("reject_sampling_pi0", f"algo.threshold={QUANTILE}", "algo.threshold: expected 0 ≤ quantile ≤ 1"),
    ("reject_sampling_pi0", f"algo.threshold={FALLING}", "algo.threshold.values: expected {0: m"),
    ("sac_pi0", "algo.agent.tua=0.5", "algo.agent: SACSettings.__init__() got an unexpected keyword argument 'tua'"),
    ("dsrl_pi0", "algo.view.min_onlin=5", "algo.view: LearningView.__init__() got an unexpected keyword"),
    ("sac_pi0", "algo.view.gamma=2", "algo.view: expected horizon ≥ 1, 0 < gamma ≤ 1 and 0 ≤ demo_share ≤ 1"),
    ("sac_pi0", "algo.agent.init_std=0.5", "algo.agent: expected 0 < min_std < init_std < max_std"),
    ("sac_pi0", "algo.agent.target_members=9", "algo.agent.target_members: expected 1 to algo.agent.critics 4, got 9"),
    ("sac_pi0", "rollout.execute_horizon=20", "rollout.execute_horizon: expected 1 to action_horizon 4, got 20"),
    ("dsrl_pi0", "algo.agent.target_members=9", "algo.agent.target_members: expected 1 to algo.agent.critics 4, got 9"),
    ("dsrl_pi0", "rollout.execute_horizon=20", "rollout.execute_horizon: expected 1 to action_horizon 4, got 20"),
    ("dsrl_pi0", "algo.served.variant=tile", "algo.served.variant: expected one of per_step, tiled, got 'tile'"),
]


def write(root, algo, word):
    """The run folder of a tiny run with this word."""
    cfg = tiny_config(algo, trainer__device="cpu", serving__device="cpu", rollout__execute_horizon=2)
    cfg.merge_with(OmegaConf.from_dotlist([word]))
    paths = RunPaths(root)
    OmegaConf.save(cfg, paths.config, resolve=True)
    return str(root)


@pytest.mark.parametrize(("algo", "word", "message"), MISTAKES)
def test_the_trainer_says_a_mistake_in_one_line_and_ends_with_2(tmp_path, capsys, algo, word, message):
    assert trainer_main(write(tmp_path, algo, word)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("algo.served.variant=tile", "algo.served.variant: expected one of per_step, tiled, got 'tile'"),
        ("policy._target_=serl_launcher.policies.nope.build", "policy._target_: No module named"),
    ],
)
def test_the_policy_server_says_a_mistake_in_one_line_and_ends_with_2(tmp_path, caplog, word, message):
    assert server.main(write(tmp_path, "dsrl_pi0", word)) == 2
    (record,) = (r for r in caplog.records if r.levelname == "ERROR")
    assert message in record.getMessage()
    assert "\n" not in record.getMessage()


def test_what_is_no_mistake_of_the_user_stays_a_crash(tmp_path, monkeypatch):
    def out_of_memory(*args, **settings):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("serl_launcher.agents.flow_matching.FlowMatchingAgent.__init__", out_of_memory)
    with pytest.raises(Exception, match="out of memory"):
        trainer_main(write(tmp_path, "reject_sampling_pi0", "seed=1"))
