"""Two actors with one unique_identifier, on two hosts (here: with two spools) and after kill -9."""

from __future__ import annotations

import signal
import time

from rig import p99_ms

NAME = "robot-1"


def test_the_second_actor_of_a_name_is_refused_and_a_killed_one_comes_back(rig, figures):
    run = rig()
    run.start_gateway()
    first = run.start_actor()
    run.await_acknowledged(10, 60)
    time.sleep(2)
    began = time.monotonic()
    second = run.start_actor(tag="elsewhere")
    assert second.wait(30) == 2, run.logs()
    refused_s = time.monotonic() - began
    said = (run.run / "elsewhere.log").read_text()
    assert f"another living process speaks as '{NAME}'" in said
    assert "give this one another unique_identifier=" in said
    run.await_acknowledged(3)
    ended = time.monotonic()
    before = run.report()
    ratio = p99_ms(before, began, ended) / p99_ms(before, 0, began)
    resumes = []
    for _ in range(3):
        first.kill()
        first.wait()
        killed = time.monotonic()
        first = run.start_actor()
        run.await_acknowledged(1, 30)
        resumes.append(time.monotonic() - killed)
    report = run.finish(first)
    run.stop_gateway()
    counts = run.judge()
    assert run.acknowledged("elsewhere") == 0
    figures.row(
        "same_name", "the second refused, a killed one let in at once, 0 lost", max(resumes) <= 10,
        refused_s=round(refused_s, 2), resume_s_max=round(max(resumes), 2), first_p99_ratio=round(ratio, 2),
        acknowledged_items=counts["acknowledged items"], sent_by_the_last=report["sent"], lost=0, duplicates=0,
    )  # fmt: skip
    assert max(resumes) <= 10, resumes


def test_a_frozen_actor_that_was_replaced_is_told_and_delivers(rig, figures):
    run = rig()
    run.start_gateway()
    first = run.start_actor(infer_ms=500)
    run.await_acknowledged(10, 60)
    first.send_signal(signal.SIGSTOP)
    second = run.start_actor(tag="elsewhere")
    taken_s = run.await_acknowledged(1, 60, "elsewhere")
    first.send_signal(signal.SIGCONT)
    assert first.wait(60) == 2, run.logs()
    said = (run.run / f"{NAME}.log").read_text()
    assert f"another process of '{NAME}' has taken over from this one" in said
    assert "unique_identifier=" in said
    told = run.report()
    assert told["flushed"], "what the replaced one recorded was not delivered"
    run.await_acknowledged(3, 30, "elsewhere")
    new = run.finish(second, "elsewhere")
    run.stop_gateway()
    counts = run.judge()
    assert counts["items in the journal"] == told["sent"] + new["sent"]
    figures.row(
        "replaced", "told, everything delivered, 0 lost", True, taken_over_s=round(taken_s, 2),
        items=counts["items in the journal"], lost=0, duplicates=0,
    )  # fmt: skip
