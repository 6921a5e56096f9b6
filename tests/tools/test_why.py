"""tools/why.py: mistakes made on purpose are named with evidence and key, a good set raises nothing."""

import json
import re
import shutil

import pytest
import seeded_mistakes
import why
from _seeded_sets import Case, arm, write
from omegaconf import OmegaConf

SOME = [
    "statistics in radians, data in degrees",
    "the operator waits before each episode",
    "the state recorded as the action",
    "deltas recorded under the joints' names",
    "cameras exchanged in two of six episodes",
    "trained with the joints in another order",
]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write(tmp_path_factory.mktemp("why") / "good", arm(n=24))


def test_some_mistakes_are_named_by_their_names(good, tmp_path):
    rows = seeded_mistakes.seeded(*good, tmp_path, SOME)
    assert [row["name"] for row in rows] == SOME
    assert [row for row in rows if not row["named"]] == []


def test_a_run_brings_config_dataset_and_latency_and_a_good_one_raises_nothing(good, tmp_path, capsys):
    folder, cfg = good
    run = tmp_path / "run"
    shutil.copytree(folder, run / "dataset")
    OmegaConf.save(OmegaConf.create(cfg), run / "config.yaml")
    assert why.main([str(run)]) == 0
    assert capsys.readouterr().out == "nothing found: data, statistics, units, chunks and timing fit together\n"
    (run / "status.json").write_text(json.dumps({"serving": {"p99_ms": 180.0}}))
    assert why.main([str(run), str(folder)]) == 1
    told = capsys.readouterr().out
    assert told.startswith("1. latency beyond the executed ticks: an answer takes 180 ms (p99), 4 ticks take 133: stop")
    assert told.endswith("change: rollout.realtime=async, or rollout.execute_horizon\n")


@pytest.mark.slow
def test_a_checkpoint_is_asked_about_the_robot_that_the_words_name(good, tmp_path, capsys):
    folder, cfg = good
    case = Case(shutil.copytree(folder, tmp_path / "data"), json.loads(json.dumps(cfg)))
    case.checkpoint(scale=1.0)
    checkpoint = str(case.cfg["policy"]["checkpoint"])
    assert why.main([checkpoint]) == 2
    assert "name the one that it was trained on" in capsys.readouterr().err
    assert why.main([checkpoint, str(folder)]) == 1  # asked about the default task, which is another robot
    assert re.search(r"action: 6 dims .*, the task has 4", capsys.readouterr().out)
    assert why.main([str(tmp_path), str(folder)]) == 2
    assert "not a run folder (no config.yaml), nothing in one, and no checkpoint's folder" in capsys.readouterr().err


@pytest.mark.slow
def test_every_mistake_is_named_and_no_clean_set_raises_an_alarm(tmp_path):
    rows = seeded_mistakes.seeded(*write(tmp_path / "good", arm()), tmp_path)
    assert len(rows) >= 40
    assert len([row for row in rows if not row["named"]]) <= 2
    assert [row for row in seeded_mistakes.clean(tmp_path) if row["alarms"]] == []
