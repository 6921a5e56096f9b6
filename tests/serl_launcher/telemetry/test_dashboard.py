"""The learner's pane: every figure of the issue is there, it fits 100 columns, and half a status does not break it."""

import copy

import pytest

from serl_launcher.telemetry.dashboard import progress_bar, render_line, render_status, waits_for

STATUS = {
    "run": "quickstart",
    "stage": {"index": 3, "name": "online", "mode": "online", "steps_goal": 2400, "episodes_goal": 0, "steps": 600,
              "episodes": 57, "min_version": None},
    "done": False,
    "counts": {"episodes": 137, "successes": 64, "demos": 20, "online": 57, "eval": 60, "interventions": 612,
               "transitions": 4821, "experience": 3000},
    "rates": {"transitions_per_s": 31.4, "success_rate": 0.625, "success_low": 0.4703, "success_high": 0.7578,
              "intervention_rate": 0.35},
    "eval": {"before": {"episodes": 60, "successes": 20}, "after": {"episodes": 0, "successes": 0}},
    "trainer": {"step": 1500, "version": 14, "metrics": {"losses/flow": 0.18234, "time/step_s": 0.104,
                "replay/accepted": 51.0}, "alive": True},
    "serving": {"version": 14, "requests": 812, "batch_mean": 1.5, "p50_ms": 41.2},
    "actors": {"actor-0": {"boot": "b", "policy_version": 13, "version_age_s": 12.3, "last_seen_s": 0.2, "backlog": 2,
                           "mode": "online"}},
    "exporter": {"episodes": 130},
}  # fmt: skip


def test_everything_that_the_operator_wants_to_see():
    text = "\n".join(render_status(STATUS))
    for part in (
        "quickstart",
        "stage 4 online (online)", "600/2400 steps", "[######..................]", "step 1500", "loss 0.1823",
        "episodes   137   51 accepted", "success 0.62 [0.47, 0.76]", "interventions 35%",
        "before 0.33 [0.23, 0.46] of 60",
        "4821 transitions (31.4/s)", "policy v14", "serving v14 at 41 ms, batch 1.5", "dataset 130 episodes",
        "actor-0", "policy v13 (12 s old)", "backlog 2",
    ):  # fmt: skip
        assert part in text, part
    assert "after" not in text  # no evaluation, no figure


def test_it_fits_the_pane_even_with_long_names():
    status = copy.deepcopy(STATUS)
    status["run"] = "a-very-long-run-name-" * 6
    status["actors"] = {f"robot-with-a-long-name-{i}" * 4: status["actors"]["actor-0"] for i in range(3)}
    lines = render_status(status)
    assert max(map(len, lines)) <= 100
    assert len(lines) == 8
    assert "\n" not in "".join(lines)


@pytest.mark.parametrize("removed", [(), *((key,) for key in STATUS), tuple(STATUS)])
def test_a_part_that_is_not_known_yet(removed):
    status = {key: value for key, value in STATUS.items() if key not in removed}
    assert render_status(status)
    assert render_line(status)


def test_before_the_first_online_episode_there_is_no_rate():
    status = copy.deepcopy(STATUS)
    status["rates"] = {"transitions_per_s": 0.0, "success_rate": None, "success_low": None, "success_high": None,
                       "intervention_rate": None}  # fmt: skip
    status["trainer"] = {"step": 0, "version": -1, "metrics": {}, "alive": False}
    text = "\n".join(render_status(status))
    assert "success –" in text
    assert "loss –" in text
    assert "(trainer is away)" in text


def test_a_silent_actor_and_one_without_policy():
    status = copy.deepcopy(STATUS)
    status["actors"] = {"robot": {"policy_version": -1, "version_age_s": None, "last_seen_s": 250.0, "mode": None}}
    assert "robot   waiting   no policy yet   silent for 4 min" in render_status(status)[-1]


def test_the_one_line_form():
    assert render_line(STATUS) == (
        "online 600/2400 steps · step 1500 · loss 0.1823 · episodes 137, 51 accepted"
        " · success 0.62 [0.47, 0.76] · help 35% · v14"
    )


def test_the_bar():
    assert progress_bar(0, 10, 4) == "[....]"
    assert progress_bar(5, 10, 4) == "[##..]"
    assert progress_bar(99, 10, 4) == "[####]"


def test_a_stage_with_two_goals_shows_the_one_that_holds_it_up():
    status = copy.deepcopy(STATUS)
    status["stage"] |= {"episodes_goal": 60, "episodes": 3}
    assert "3/60 episodes" in render_status(status)[0]


def test_it_says_what_only_a_person_can_bring():
    assert waits_for(STATUS) is None
    alone = copy.deepcopy(STATUS) | {"actors": {"actor-0": {"last_seen_s": 60.0}}}
    assert waits_for(alone) == "no actor is here for its online episodes: run_actor.sh"
    train = alone | {"stage": STATUS["stage"] | {"name": "sft", "mode": "train"}}
    assert waits_for(train) is None  # there are demonstrations, and no actor is needed
    empty = train | {"counts": {"episodes": 0, "demos": 0, "online": 0}}
    assert waits_for(empty | {"done": True}) is None
    for text in (render_line(empty), render_status(empty)[1]):
        assert "no demonstrations in run quickstart yet: run_learner_data_collection.sh records them" in text


def test_what_keeps_a_robot_from_working_who_left_and_whom_a_finished_run_waits_for():
    status = copy.deepcopy(STATUS)
    hung, left = {"trouble": "MyArm.step has not come back for 3.2 s", "last_seen_s": 0.4}, {"left": "2 episodes done"}
    status["actors"] = {"arm": hung, "sim": left}
    assert render_status(status)[-2:] == [
        "  actor      arm   MyArm.step has not come back for 3.2 s",
        "  actor      sim   left: 2 episodes done",
    ]
    assert render_line(status).endswith("v14 · arm: MyArm.step has not come back for 3.2 s")
    status |= {"done": True, "ending": {"waits_for": {"arm": "makes its last episode"}}}
    assert waits_for(status) == "arm makes its last episode"


def test_what_operators_asked_is_shown():
    asked = {"paused_actors": {"r1": "bo"}, "training_paused": "bo", "served": 3, "words": 2, "paused": False,
             "settings": {"trainer.publish_period": {"value": 7, "by": "bo", "was": 100, "time": "t"}}}  # fmt: skip
    told = "r1 paused · training paused · v3 pinned · trainer.publish_period=7 (bo) · 2 episodes judged by people"
    assert f"  operator   {told}"[:99] in "\n".join(render_status({"operator": asked}))
    assert told in render_line({"operator": asked})
    assert "operator" not in render_line({"operator": {"paused": False, "settings": {}}})
