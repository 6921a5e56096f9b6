"""A run folder whose config.yaml was torn or edited badly: every tool that takes a run says so in one line."""

import check_run
import eval_open_loop
import export_checkpoint
import pytest
import reaccept
import train_reward_classifier

TOOLS = {
    "reaccept": lambda run: reaccept.main([str(run)]),
    "eval_open_loop": lambda run: eval_open_loop.main([str(run)]),
    "export_checkpoint": lambda run: export_checkpoint.main([str(run), str(run / "out")]),
    "check_run": lambda run: check_run.main([str(run)]),
    "train_reward_classifier": lambda run: train_reward_classifier.main([f"run={run}"]),
}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a: [1", "config.yaml cannot be read: while parsing"),
        (b"task: \xff\xfe", "config.yaml cannot be read"),
        (b"", "config.yaml cannot be read: it is empty"),
        (b"task: {}", "config.yaml: task.spec is missing"),
        (
            b"task: {spec: '${nowhere}'}",
            "task.spec: expected a plain value, got the interpolation '${nowhere}'",
        ),
        (
            b"task: {spec: {x: '${oc.env:HOME}'}}",
            "task.spec.x: expected a plain value, got the interpolation",
        ),
        (b"a: &a [1]\nb: [*a, *a]", "config.yaml line 2: an alias (*'a'); a run's config has none"),
        (
            b"a: !!python/object/apply:os.system ['true']",
            "cannot be read: could not determine a constructor",
        ),
        (b"a: " + b"[" * 5000, "config.yaml cannot be read: "),
        (b"a: " + b"x" * (5 << 20), "config.yaml: expected at most 4194304 bytes, got 5242883"),
    ],
)
def test_an_unreadable_config_is_one_line(tool, text, message, tmp_path, capsys):
    (tmp_path / "config.yaml").write_bytes(text)
    assert TOOLS[tool](tmp_path) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
