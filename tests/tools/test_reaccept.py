"""Judging a run again by another rule, from its journal; auditing rewards against it."""

import json
from dataclasses import replace

import audit_reward
import numpy as np
import pytest
import reaccept
from configured import composed
from omegaconf import OmegaConf
from run_samples import SPEC, entries, episode, write_journal

from serl_launcher.replay.episodes import journal_episodes
from serl_launcher.replay.relabelled import Relabelled
from serl_launcher.rewards.model import RewardCard, RewardClassifier, save
from serl_launcher.run.acts import ActsLedger
from serl_robot_infra.envs.base import StepResult
from serl_robot_infra.rewards.classifier import ClassifierReward
from serl_transport.contract.schema import Observation


@pytest.fixture
def run(tmp_path):
    """A demonstration, an online success, a failure, and an evaluation that no rule is asked about."""
    episodes = [episode(0, 4, "demo"), episode(2, 6), episode(1, 6), episode(4, 4, "eval")]
    write_journal(tmp_path, entries(episodes))
    rule = composed("rule=success", "algo.rule.noop_threshold=0.0", "task.noop_dims=null").algo.rule
    config = {"task": {"spec": SPEC.to_dict()}, "algo": {"rule": OmegaConf.to_container(rule) | {"noop_dims": None}}}
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


def test_a_rule_is_taken_by_its_name_and_the_words_behind_it_change_it(run, capsys):
    assert reaccept.main([str(run), "rule=demonstration"]) == 0
    said = capsys.readouterr().out
    assert "episode 1 (online, return 1): accepted -> online" in said
    assert said.count("episode ") == 1
    assert reaccept.main([str(run), "rule=demonstration", "algo.rule.min_ticks=5"]) == 0
    assert "episode 0 (demo, return 1): accepted -> short" in capsys.readouterr().out


def test_a_mistyped_rule_key_is_one_line(run, capsys):
    assert reaccept.main([str(run), "algo.rule.min_tick=5"]) == 2
    problem = capsys.readouterr().err
    assert "min_tick" in problem
    assert len(problem.splitlines()) == 1


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("junk", "cannot read 'junk': expected key=value"),
        ("rule=demonstratoin", "no rule is called 'demonstratoin'; did you mean 'demonstration'?"),
        ("min_return=5", "'min_return=5' changes no verdict: expected rule=<name>, algo.rule.<key>="),
        ("algo.rul.min_return=5", "'algo.rul.min_return=5' changes no verdict"),
        ("algo=sft_pi0", "'algo=sft_pi0' changes no verdict"),
        ("task.noop_dims=[0]", "'task.noop_dims=[0]' changes no verdict"),
        ("algo.rule=strict", "algo.rule: expected {_target_: <class>, …}, got 'strict'"),
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
    kept = ActsLedger(run).rows
    assert [(row["act"], row["episode_id"], row["word"]) for row in kept] == [("verdict", "episode-1", "success")]
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
    assert ActsLedger(run).rows == kept
    (run / "labels.json").write_text(json.dumps({"episode-1": "no"}))
    assert audit_reward.main([str(run), "--relabel", str(run / "labels.json")]) == 2
    assert 'expected {"episode id": true | false}, got {"episode-1": "no"}' in capsys.readouterr().err
    assert audit_reward.main([str(run)]) == 0  # what was said before still counts
    assert "0 false positives, 0 false negatives" in capsys.readouterr().out


def test_a_classifiers_word_is_no_truth_to_audit_by(capsys):
    row = audit_reward.Row(0, "e0", "online", True, "classifier", 0.9, True, 0)
    audit_reward.show([row, replace(row, source="environment", recorded=False)])
    said = capsys.readouterr().out
    assert "1 episodes that only a classifier judged are not counted: --relabel them" in said
    assert "1 episodes: 0 successes and 0 failures agreed on" in said
    audit_reward.show([row])
    assert "no episode that the environment or a person judged" in capsys.readouterr().out


def test_a_relabelled_episode_is_judged_by_its_new_label(run, capsys):
    verdicts = {v.ordinal: v.reason for v in reaccept.judge(run, OmegaConf.load(run / "config.yaml"))}
    assert verdicts == {0: "accepted", 1: "accepted", 2: "return"}
    labels = Relabelled(run)
    labels.add({"episode-2": False, "episode-1": True}, "ana", "2026-01-01T12:00:00+00:00")
    labels.save()
    verdicts = reaccept.judge(run, OmegaConf.load(run / "config.yaml"))
    assert {v.ordinal: (v.reason, v.success, v.return_) for v in verdicts} == {
        0: ("accepted", True, 1.0),
        1: ("return", False, 0.0),
        2: ("accepted", True, 1.0),
    }


class Says:
    """A reward server, and its link, that says these probabilities in turn."""

    def __init__(self, said):
        self.said = iter(said)

    def request(self, type, payload, timeout_ms):
        return {"kind": "process", "probabilities": next(self.said)}


def test_the_audit_says_of_stages_what_the_actor_would_have_said():
    card = RewardCard("process", 4, ("front",), 16, False, SPEC.to_dict(), threshold=0.5)
    jump, unsure = np.eye(4)[[0, 0, 3, 0]], [0.3, 0.2, 0.1, 0.4]
    rng = np.random.default_rng(0)
    walks = [np.array([*np.eye(4)[[0, 1, 2]], unsure]), jump, *(rng.dirichlet([0.3] * 4, 9) for _ in range(40))]
    verdicts = []
    for said in walks:
        source = ClassifierReward(Says(said))
        results = [source.judge(StepResult(Observation({}, np.zeros(1)), 0.0, False, False, False)) for _ in said]
        first = next((i for i, result in enumerate(results) if result.success), None)
        assert audit_reward.judge(said, card) == (pytest.approx(sum(r.reward for r in results)), first)
        verdicts.append(first)
    assert verdicts[:2] == [3, None]  # the last stage may be unsure, and may not be jumped to
    assert {verdict is None for verdict in verdicts[2:]} == {True, False}
