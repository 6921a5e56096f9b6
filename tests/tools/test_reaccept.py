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
    for text, problem in (('["id"]', 'got ["id"]'), ("{oops", "got no JSON"), ('{"a": "yes"}', 'got {"a": "yes"}')):
        (run / "labels.json").write_text(text)
        assert audit_reward.main([str(run), "--relabel", str(run / "labels.json")]) == 2
        said = capsys.readouterr().err
        assert f"--relabel {run / 'labels.json'}: expected" in said
        assert problem in said
    (run / "labels.json").write_text(json.dumps({"g": True}))
    assert audit_reward.main([str(run), "--relabel", str(run / "labels.json")]) == 2
    assert "does not hold: g" in capsys.readouterr().err
