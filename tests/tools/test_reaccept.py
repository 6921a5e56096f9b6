"""Judging a run again by another rule, from its journal; auditing rewards against it."""

import json

import audit_reward
import numpy as np
import pytest
import reaccept
from omegaconf import OmegaConf
from run_samples import SPEC, entries, episode, write_journal

from serl_launcher.replay.episodes import journal_episodes
from serl_launcher.rewards.model import RewardCard, RewardClassifier, save


@pytest.fixture
def run(tmp_path):
    """A demonstration, an online success, a failure, and an evaluation that no rule is asked about."""
    episodes = [episode(0, 4, "demo"), episode(2, 6), episode(1, 6), episode(4, 4, "eval")]
    write_journal(tmp_path, entries(episodes))
    rule = {
        "_target_": "serl_launcher.replay.acceptance.SuccessRule",
        "min_return": 0.5,
        "noop_threshold": 0.0,
        "min_ticks": 3,
    }
    config = {"task": {"spec": SPEC.to_dict()}, "algo": {"rule": rule}}
    OmegaConf.save(OmegaConf.create(config), tmp_path / "config.yaml")
    return tmp_path


def test_another_rule_says_what_changes_and_changes_nothing(run, capsys, tmp_path):
    before = sorted(p.name for p in run.rglob("*"))
    out = tmp_path.parent / "verdicts.jsonl"
    assert reaccept.main([str(run), "algo.rule.min_ticks=5", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "episode 0 (demo, return 1): accepted -> short" in said
    assert said.count("episode ") == 1
    assert [json.loads(line)["accepted"] for line in out.read_text().splitlines()] == [False, True, False]
    assert sorted(p.name for p in run.rglob("*")) == before


def test_a_mistyped_rule_key_is_one_line(run, capsys):
    assert reaccept.main([str(run), "algo.rule.min_tick=5"]) == 2
    problem = capsys.readouterr().err
    assert "min_tick" in problem
    assert len(problem.splitlines()) == 1


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("junk", "cannot read 'junk': expected key=value"),
        ("min_return=5", "'min_return=5' changes no verdict: expected algo.rule.<key>="),
        ("algo.rul.min_return=5", "'algo.rul.min_return=5' changes no verdict"),
        ("algo=sft_pi0", "'algo=sft_pi0' changes no verdict"),
        ("task.noop_dims=[0]", "'task.noop_dims=[0]' changes no verdict"),
        ("algo.rule=strict", "algo.rule: expected {_target_: <class>, …}, got strict"),
        ("algo.threshold.start=0.7", "algo.threshold: expected {_target_: <class>, …}, got {'start': 0.7}"),
        ("algo.rule.min_return={", "cannot read 'algo.rule.min_return={'"),
        ("algo.rule.min_return=high", "algo.rule.min_return: expected a number, got 'high'"),
        ("algo.rule.min_ticks=2.5", "algo.rule.min_ticks: expected a whole number of at least 0, got 2.5"),
        ("algo.rule.autonomous_stride=0", "algo.rule.autonomous_stride: expected a whole number of at least 1, got 0"),
        ("algo.rule.noop_dims=[7]", "task.noop_dims (algo.rule.noop_dims): expected a list of dimensions"),
        ("algo.rule._target_=serl_launcher.replay.acceptance.Nope", "algo.rule._target_: No module named"),
    ],
)
def test_a_word_that_would_change_nothing_or_cannot_work_is_refused(run, capsys, word, message):
    assert reaccept.main([str(run), word]) == 2
    problem = capsys.readouterr().err
    assert message in problem
    assert len(problem.splitlines()) == 1


def test_a_threshold_may_be_added(run, capsys):
    schedule = "{_target_: serl_launcher.replay.threshold.SteppedThreshold, values: {0: 5.0}}"
    assert reaccept.main([str(run), f"+algo.threshold={schedule}"]) == 0
    assert "episode 0 (demo, return 1): accepted -> return" in capsys.readouterr().out


def test_the_audit_counts_both_kinds_of_error_and_takes_a_persons_word(run, capsys):
    camera = next(iter(SPEC.cameras))
    card = RewardCard("outcome", 2, (camera,), 16, False, SPEC.to_dict(), threshold=0.0)  # says success always
    save(run / "reward", RewardClassifier(card), card, {})
    assert audit_reward.main([str(run)]) == 0
    assert "1 false positives, 0 false negatives" in capsys.readouterr().out
    (run / "labels.json").write_text(json.dumps({"episode-1": True}))
    assert audit_reward.main([str(run), "--relabel", str(run / "labels.json")]) == 0
    assert "0 false positives, 0 false negatives" in capsys.readouterr().out
    rows = {row["episode_id"]: row for row in json.loads((run / "reward_audit.json").read_text())}
    assert (rows["episode-1"]["source"], rows["episode-1"]["recorded"], rows["episode-2"]["source"]) == (
        "relabelled",
        True,
        "environment",
    )
    ticks = {episode.info.episode_id: episode.n for _, episode in journal_episodes(run, SPEC)}
    assert {name: row["early"] for name, row in rows.items()} == {name: n - 1 for name, n in ticks.items()}
    assert np.isfinite([row["score"] for row in rows.values()]).all()
    (run / "labels.json").write_text(json.dumps({"g": True}))
    assert audit_reward.main([str(run), "--relabel", str(run / "labels.json")]) == 2
    assert "does not hold: g" in capsys.readouterr().err
