"""train_reward.sh learns from what a person said afterwards, not from a classifier's word."""

import json
from dataclasses import replace

import train_reward_classifier
from run_samples import entries, episode, write_config, write_journal

from serl_launcher.replay.relabelled import Relabelled


def test_a_run_of_successes_trains_once_a_person_has_called_some_of_them_failures(tmp_path, capsys):
    by_model = replace(episode(40), outcome=replace(episode(40).outcome, success_source="classifier"))
    write_config(tmp_path)
    write_journal(tmp_path, entries([*(episode(2 * i) for i in range(8)), by_model]))
    words = [f"run={tmp_path}", "image_size=16", "fit.steps=2", "fit.batch_size=8", f"out={tmp_path / 'reward'}"]
    assert train_reward_classifier.main(words) == 2
    said = capsys.readouterr()
    assert "left out: 1 episodes that only a classifier judged" in said.out
    assert "this run has 8 successful, 0 failed" in said.err
    labels = Relabelled(tmp_path)
    labels.add({f"episode-{2 * i}": False for i in range(4)}, "ana", "2026-01-01T12:00:00+00:00")
    labels.save()
    assert train_reward_classifier.main(words) == 0
    report = json.loads((tmp_path / "reward" / "reward.json").read_text())["report"]
    assert [sum(row) for row in report["episode_confusion"]] == [1, 1]  # one of each is held out
