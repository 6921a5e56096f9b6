"""benchmarks/gpu: the order of stages, their time-outs, rows that are on disk at once, and the table of them.

Stages here are small Python processes; tests/benchmarks/test_gpu_rehearsal.py runs the real ones.
"""

import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
from gpu.__main__ import BUDGET_S, SHORT, SHORT_S, STAGES, chosen, main
from gpu.absent import EMPTY, UNIMPORTABLE
from gpu.schedule import RESERVE_S, Process, Stage, append, read, run_stages
from gpu.table import table
from gpu.trace import Span, summary

WRITE = "import sys; sys.path.insert(0, 'benchmarks'); from pathlib import Path; from gpu.schedule import append; "
PROGRAMS = {
    "good": "append(Path(sys.argv[1]), {'name': 'a', 'value': 1})",
    "bad": "append(Path(sys.argv[1]), {'name': 'b', 'value': 2}); sys.exit(3)",
    # A child of its own, as a compiler's workers are: it must not outlive the stage.
    "hangs": "import subprocess, time; child = subprocess.Popen(['sleep', '60']); "
    "append(Path(sys.argv[1]), {'name': 'c', 'value': child.pid}); time.sleep(60)",
}


def state_of(pid):
    """The letter of /proc, None where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2]
    except OSError:
        return None


def run(tmp_path, stages, seconds=60.0):
    results = tmp_path / "results.jsonl"
    command = lambda name: [sys.executable, "-S", "-c", WRITE + PROGRAMS[name], str(results)]  # noqa: E731
    with (tmp_path / "log.txt").open("w") as log:
        good = run_stages(stages, command, results, log, time.monotonic() + seconds, say=lambda _: None)
    return good, read(results)


def test_what_fails_or_hangs_costs_a_row_and_the_next_stage_runs(tmp_path, repo_root, monkeypatch):
    monkeypatch.chdir(repo_root)
    good, rows = run(tmp_path, [Stage("bad", 0, 20), Stage("hangs", 0, 1.5), Stage("good", 0, 20)])
    assert not good
    assert [row.get("ended", row.get("name")) for row in rows] == [
        *("b", "failed, exit code 3", "c", "ended after 2 s, its limit", "a", "ok")
    ]
    child = next(row["value"] for row in rows if row.get("name") == "c")
    for _ in range(100):  # killed with its parent; whoever inherits it takes a moment to bury it
        if state_of(child) in (None, "Z"):
            break
        time.sleep(0.02)
    else:
        pytest.fail("the stage's child is alive")


def test_a_stage_without_enough_time_left_is_skipped_and_a_shorter_one_is_not(tmp_path, repo_root, monkeypatch):
    monkeypatch.chdir(repo_root)
    good, rows = run(tmp_path, [Stage("bad", 40, 60), Stage("good", 5, 60)], seconds=RESERVE_S + 30)
    assert good
    assert rows[0]["ended"].startswith("skipped: needs 40 s, ")
    assert [row.get("stage", row.get("name")) for row in rows] == ["bad", "a", "good"]


def test_a_line_that_is_half_written_is_passed_over(tmp_path):
    path = tmp_path / "results.jsonl"
    append(path, {"name": "a"})
    path.write_text(path.read_text() + '{"name": "b", "val')
    assert read(path) == [{"name": "a"}]


def test_a_process_that_ended_is_not_killed_again(tmp_path):
    with (tmp_path / "log").open("w") as log:
        process = Process([sys.executable, "-S", "-c", "pass"], log)
        assert process.outcome(20) == "ok"
        process.end()


def test_both_commands_fit_their_minutes_and_a_wrong_stage_is_named(tmp_path, capsys):
    """Every stage of the short one may take what it needs; the long one skips what it has no time for."""
    needs = {stage.name: stage.needs for stage in STAGES}
    assert sum(needs[name] for name in SHORT) + RESERVE_S < SHORT_S <= 240
    assert sum(needs.values()) + RESERVE_S < BUDGET_S <= 480
    assert all(stage.needs < stage.limit for stage in STAGES)
    assert main([str(tmp_path / "out"), "--only", "pi0,gr00t"]) == 2
    assert "expected some of machine, tests" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_floor_and_forecast_stand_beside_what_was_measured():
    rows = [
        {"stage": "machine", "name": "peak/matmul", "value": 800.0, "unit": "TFLOP/s"},
        {"stage": "machine", "name": "peak/memory", "value": 3000.0, "unit": "GB/s"},
        *({"stage": "forecast", "name": f"forecast/{name}", "value": 1.0, "unit": "GB", "serve_flops": flops}
          | {"answering": 7e9, "serving": 8e9, "training": 9e9, "train_flops": 5e12}
          for name, flops in (("pi0", 8e11), ("pi05", 8e12))),
        {"stage": "pi0", "name": "pi0/compiled", "value": 11.0, "unit": "ms", "case": "pi0", "work": "serve",
         "batch": 1, "bytes": 15e9, "goal": 12.0},
        {"stage": "pi0", "name": "pi0/memory", "value": 7.5, "unit": "GB", "case": "pi0", "work": "serve",
         "within": 0.1},
        {"stage": "swap", "name": "swap/memory", "value": 9.0, "unit": "GB", "case": "pi0", "work": "swap",
         "within": 0.1},
        {"stage": "pi05", "name": "pi05/graph", "value": 40.0, "unit": "ms", "case": "pi05", "work": "serve",
         "batch": 2, "bytes": 3e9},
        {"stage": "x", "name": "x/graph", "value": 4.0, "unit": "ms", "case": "unknown", "work": "serve", "batch": 1},
        {"stage": "x", "name": "x", "trouble": "ValueError: no"},
        {"stage": "x", "ended": "failed, exit code 1", "seconds": 2.0},
    ]  # fmt: skip
    lines = {line.split()[0]: line.split()[1:] for line in table(rows) if line.strip()}
    assert lines["pi0/compiled"] == ["11", "ms", "5.00", "≤12", "met"]  # reading: 15 GB at 3 TB/s
    assert lines["pi05/graph"] == ["40", "ms", "20.00"]  # arithmetic: 16 TFLOP at 800
    assert lines["pi0/memory"] == ["7.5", "GB", "7.00", "±10%", "met"]
    assert lines["swap/memory"] == ["9", "GB", "8.00", "±10%", "missed"]
    assert lines["x/graph"] == ["4", "ms"]  # no forecast came
    told = "\n".join(table(rows))
    assert "x: failed, exit code 1\nx: x: ValueError: no" in told
    assert "every stage went through" in "\n".join(table(rows[:-2]))


def test_kernels_are_counted_by_kind_and_gaps_are_what_nothing_covers():
    spans = [
        Span("nvjet_tst_128x64_gemm", 0, 10),
        Span("fmha_cutlassF_bf16", 5, 12),  # overlaps: no gap
        Span("triton_poi_fused_add", 15, 16),
        Span("Memcpy DtoH", 20, 21),
    ]
    found = summary(spans)
    assert (found["kernels"], found["span_us"], found["gaps_us"]) == (4, 21, 7)
    assert found["longest_gaps_us"] == [4, 3]
    assert found["groups"] == {
        "matrix products": [1, 10], "attention": [1, 7], "compiled": [1, 1], "copies": [1, 1],
    }  # fmt: skip
    assert found["attention"] == ["fmha_cutlassF_bf16"]
    assert summary([])["kernels"] == 0


def test_what_a_bare_host_lacks_is_left_out_and_the_empty_module_says_so(repo_root):
    program = (
        "import sys; sys.path.insert(0, 'benchmarks'); from gpu.absent import leave_out; leave_out()\n"
        f"import importlib.util; assert not any(map(importlib.util.find_spec, {UNIMPORTABLE!r}))\n"
        f"import {EMPTY}\ntry: {EMPTY}.resize\nexcept ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=repo_root)
    assert done.stdout.startswith(f"{EMPTY}.resize is used, and {EMPTY} is left out here"), done.stderr


def test_chosen_stages_keep_their_order():
    asked = Namespace(only="swap,pi0", short=False, rehearse=False)
    assert [stage.name for stage in chosen(asked)] == ["pi0", "swap"]
    asked = Namespace(only=None, short=True, rehearse=False)
    assert tuple(stage.name for stage in chosen(asked)) == SHORT
