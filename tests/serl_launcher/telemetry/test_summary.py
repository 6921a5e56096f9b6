"""summary.json of synthetic runs, worked out by hand, and a learning curve that is drawn for each."""

import json
from pathlib import Path

import pytest
from history_samples import SampleRun
from PIL import Image

from serl_launcher.run.files import read_sealed
from serl_launcher.telemetry.history import read_history
from serl_launcher.telemetry.summary import summarise, write_summary

STAGES = [("demos", "demo"), ("sft", "train"), ("before", "eval"), ("online", "online"), ("after", "eval")]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """2 demonstrations, 100 steps, 4 evaluations, 12 online episodes with 200 steps, 4 evaluations."""
    sample = SampleRun(tmp_path, STAGES)
    for seed in range(2):
        sample.episode("demo", "demos", seed, True, help_ticks=10)
    sample.train("sft", 100, 0.9)
    for index in range(4):
        sample.episode("eval", "before", 1_000_000 + index, index == 0)
    for index in range(12):  # the first 4 with help, three of them saved by it; then 2 failures alone, 6 successes
        helped = index < 4
        sample.episode("online", "online", 50 + index, index not in (3, 4, 5), help_ticks=5 if helped else 0)
        sample.train("online", 20, 0.3)
    for index in range(4):
        sample.episode("eval", "after", 1_000_000 + index, index != 3)
    return sample.save()


def test_the_figures(run):
    summary = write_summary(run)
    assert read_sealed(run / "summary.json") == summary
    expected = {
        "success_rate": 0.75, "success_rate_from": "after", "success_rate_episodes": 4,
        "success_rate_before_online": 0.25,
        "episodes": 22, "successes": 11, "accepted_episodes": None, "interventions": 4, "intervention_ticks": 20,
        "intervention_rate_first_third": 1.0, "intervention_rate_last_third": 0.0, "transitions": 220, "steps": 340,
        "policy_versions": 3, "seed": 7, "algo": "reject_sampling_pi0", "policy": "pi0_tiny", "task": "pick",
    }  # fmt: skip
    assert {key: summary[key] for key in expected} == expected
    # 22 episodes of 6 s and 5 + 12 logged lines of 3 s
    assert summary["minutes"] == round((22 * 6 + 17 * 3) / 60, 2)
    online = next(stage for stage in summary["stages"] if stage["name"] == "online")
    assert (online["episodes"], online["success_rate"], online["ticks"]) == (12, 0.5, 120)  # without help
    assert [stage["name"] for stage in summary["stages"]] == [name for name, _ in STAGES]
    assert summary["success_rate_interval"][0] < 0.75 < summary["success_rate_interval"][1]
    assert len(summary["config_sha256"]) == 64


def test_how_long_a_success_takes(tmp_path):
    sample = SampleRun(tmp_path, STAGES)
    for index, (success, seconds) in enumerate([(True, 4.0), (False, 9.0), (True, 7.0), (True, 6.0)]):
        sample.episode("eval", "after", 1_000_000 + index, success, seconds=seconds)
    summary = write_summary(sample.save())
    assert summary["median_seconds_to_success"] == 6.0
    assert summary["stages"][0]["median_seconds_to_success"] == 6.0
    ticks = [row["n_ticks"] for row in sample.episodes]
    assert summary["successes_per_1000_ticks"] == round(3000 / sum(ticks), 2)
    assert summary["median_ticks_to_success"] == sorted([ticks[0], ticks[2], ticks[3]])[1]
    del sample.episodes[0]["seconds"]  # the line of an earlier release
    assert write_summary(sample.save())["median_seconds_to_success"] == 6.5


def test_of_evaluations_that_actors_asked_for_the_newest_is_summed_up(tmp_path):
    """The same seeds again: by a later version, by another process, and one twice by the same process. A trainer that
    goes on meanwhile gives one evaluation several versions."""
    sample = SampleRun(tmp_path, [])
    for version, boot, outcomes in ((1, "a", [False] * 4), (2, "b", [True]), (3, "b", [True]), (3, "c", [True, False])):
        for index, success in enumerate(outcomes):
            seed = 1_000_000 + index + (boot, version).count(3)
            sample.episode("eval", "adhoc_eval", seed, success, boot=boot, policy_version_last=version)
    sample.episode("eval", "adhoc_eval", 1_000_001, False, boot="c", policy_version_last=3)
    summary = write_summary(sample.save())
    assert (summary["success_rate_from"], summary["success_rate"]) == ("adhoc_eval", 0.75)
    assert summary["success_rate_episodes"] == 4


@pytest.mark.parametrize("hours", [-5, 5])
def test_a_clock_that_was_set_between_two_starts_reorders_nothing(tmp_path, hours):
    """The learner was started anew at another time of day before its online stage, and again after it."""
    sample = SampleRun(tmp_path, STAGES)
    sample.episode("demo", "demos", 1, True)
    sample.train("sft", 40, 0.9)
    sample.episode("eval", "before", 1_000_000, False)
    sample.now += hours * 3600
    sample.episode("online", "online", 50, True)
    sample.train("online", 20, 0.3)
    sample.now -= 2 * hours * 3600
    sample.episode("eval", "after", 1_000_000, True)
    summary = write_summary(sample.save())
    assert [stage["name"] for stage in summary["stages"]] == [name for name, _ in STAGES]
    assert (summary["success_rate_from"], summary["success_rate"]) == ("after", 1.0)
    assert summary["success_rate_before_online"] == 0.0


def test_steps_of_a_stage_are_the_trainers_own_count_where_it_is_kept(run):
    (run / "stage_progress.json").write_text('{"stage_steps": {"online": 345}}')
    stages = {stage["name"]: stage["steps"] for stage in write_summary(run)["stages"]}
    assert (stages["online"], stages["demos"]) == (345, 0)


def test_the_status_knows_of_versions_and_steps_that_were_not_logged(run):
    (run / "status.json").write_text(json.dumps({"trainer": {"version": 9, "step": 347}}))
    summary = write_summary(run)
    assert (summary["policy_versions"], summary["steps"]) == (9, 347)


def test_accepted_is_what_the_rule_said_last_of_each_episode(run):
    said = [(0, True, "accepted"), (1, False, "short"), (2, True, "accepted"), (2, False, "return")]
    row = {"mode": "online", "return": 1.0, "rule": "r"}
    rows = [row | {"ordinal": ordinal, "accepted": accepted, "reason": reason} for ordinal, accepted, reason in said]
    (run / "acceptance.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = write_summary(run)
    assert (summary["successes"], summary["accepted_episodes"]) == (11, 1)


def test_a_repeated_evaluation_seed_and_a_cut_episode_do_not_count(tmp_path):
    sample = SampleRun(tmp_path, [("check", "eval")])
    sample.episode("eval", "check", 1, False, whole=False)
    sample.episode("eval", "check", 1, True)
    sample.episode("eval", "check", 1, False)  # reissued, but the first whole outcome stands
    sample.episode("eval", "check", 2, False)
    summary = summarise(read_history(sample.save()))
    assert (summary["success_rate"], summary["success_rate_episodes"]) == (0.5, 2)
    assert summary["success_rate_before_online"] is None
    assert summary["episodes"] == 4


def test_without_evaluation_the_recent_online_episodes_speak(tmp_path):
    sample = SampleRun(tmp_path, [("online", "online")])
    for index in range(50):
        sample.episode("online", "online", index, index >= 20, help_ticks=5 if index >= 40 else 0)
    summary = summarise(read_history(sample.save()))
    # of the last 40 (10..49): 10 failures, 20 successes alone, 10 with help
    assert (summary["success_rate"], summary["success_rate_from"]) == (0.5, "last 40 online episodes")


@pytest.mark.parametrize("kind", ["empty", "demos only", "training only", "one online episode", "full"])
def test_a_curve_is_drawn_for_every_kind_of_run(tmp_path, kind, request):
    if kind == "full":
        root = request.getfixturevalue("run")
    else:
        sample = SampleRun(tmp_path / "run", STAGES)
        if kind == "demos only":
            sample.episode("demo", "demos", 0, True)
        if kind == "training only":
            sample.train("sft", 60, 0.0)  # a loss of zero has no logarithm
        if kind == "one online episode":
            sample.episode("online", "online", 0, True)
        root = sample.save()
    write_summary(root)
    with Image.open(root / "learning_curve.png") as picture:
        assert picture.size == (1200, 960)
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20
    assert not list(root.glob("*.part"))


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(ValueError, match="expected a run's folder"):
        write_summary(tmp_path)


def test_a_damaged_ledger_line_is_named(run):
    with (run / "episodes.jsonl").open("a") as file:
        file.write("{\n")
    with pytest.raises(ValueError, match=r"episodes\.jsonl line 23"):
        write_summary(run)
