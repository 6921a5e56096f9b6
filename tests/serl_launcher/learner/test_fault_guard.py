"""Training that goes wrong: skipped, taken back, held; evaluations that fall."""

import torch

from serl_launcher.learner.faults import GO_BACK, HOLD, SKIP, FaultBudget
from serl_launcher.learner.guard import EvaluationWatch, evaluation_goals
from serl_launcher.run.parameters import publish, read_tensors


def put(folder, version, value):
    """Publish a version whose only tensor says its value."""
    publish(folder, {"p": torch.tensor([value])}, version=version, step=version, base="b", policy="t", now=0.0, keep=2)


def test_a_bad_batch_is_skipped_a_bad_state_taken_back_and_a_hopeless_one_held():
    budget = FaultBudget(patience=2, returns=1)
    assert budget.after(True) == SKIP
    budget.good()
    assert budget.after(True) == SKIP  # the count starts anew after a good step
    assert budget.after(True) == GO_BACK
    assert [budget.after(True), budget.after(True)] == [SKIP, HOLD]


def test_without_a_checkpoint_training_holds():
    budget = FaultBudget(patience=1)
    assert budget.after(False) == HOLD


def results(**rates):
    return {stage: {"episodes": 10, "successes": round(10 * rate)} for stage, rate in rates.items()}


def test_a_fall_beyond_the_margin_names_the_best_version_and_its_parameters(tmp_path):
    watch = EvaluationWatch(tmp_path, {"before": 10, "after": 10}, 0.2)
    put(tmp_path, 1, 1.0)
    assert watch.look(results(before=0.7)) is None
    for version in range(2, 6):  # the pruning of params/ leaves the kept file alone
        put(tmp_path, version, float(version))
    watch = EvaluationWatch(tmp_path, {"before": 10, "after": 10}, 0.2)  # a restarted trainer knows
    fall = watch.look(results(before=0.7, after=0.4))
    assert fall == ("after", 0.4)
    assert (watch.best.stage, watch.best.rate, watch.best.version) == ("before", 0.7, 1)
    assert read_tensors(watch.kept)[0]["p"].item() == 1.0
    assert watch.look(results(before=0.7, after=0.4)) == fall  # until its rollback is safe
    watch.settle("after")
    assert watch.look(results(before=0.7, after=0.4)) is None


def test_a_small_fall_and_an_unfinished_evaluation_are_let_be(tmp_path):
    watch = EvaluationWatch(tmp_path, {"before": 10, "middle": 20, "after": 10}, 0.2)
    put(tmp_path, 1, 1.0)
    assert watch.look(results(before=0.7)) is None
    assert watch.look(results(before=0.7, middle=0.0)) is None  # 10 of its 20 episodes
    assert watch.look(results(before=0.7, after=0.5)) is None
    assert EvaluationWatch(tmp_path, {"last": 10}, None).look(results(last=0.0)) is None


def test_a_damaged_kept_json_is_made_again_by_the_versions_that_acted(tmp_path, caplog):
    goals = {"before": 10, "middle": 10, "after": 10}
    done = {"before": {"episodes": 10, "successes": 9, "version": 1},
            "middle": {"episodes": 10, "successes": 2, "version": 2}}  # fmt: skip
    for version in (1, 2):
        put(tmp_path, version, float(version))
    watch = EvaluationWatch(tmp_path, goals, 0.2)
    assert watch.look(done) == ("middle", 0.2)
    watch.settle("middle")
    for damage in (b"", b"{}", (tmp_path / "kept.json").read_bytes().replace(b"0.9", b"0.1")):
        (tmp_path / "kept.json").write_bytes(damage)
        watch = EvaluationWatch(tmp_path, goals, 0.2)
        assert watch.look(done) is None  # an old fall was seen to
        assert (watch.best.version, watch.best.rate, watch.best.judged) == (1, 0.9, ["before", "middle"])
    assert "kept.json is damaged: its content does not match its crc32" in caplog.text
    assert watch.look(done | {"after": {"episodes": 10, "successes": 1, "version": 2}}) == ("after", 0.1)


def test_best_parameters_that_are_damaged_are_not_brought_back(tmp_path, caplog):
    watch = EvaluationWatch(tmp_path, {"before": 10, "after": 10}, 0.2)
    put(tmp_path, 1, 1.0)
    assert watch.look(results(before=0.9)) is None
    (tmp_path / "v000001.safetensors").write_bytes(b"torn")
    assert watch.look(results(before=0.9, after=0.1)) is None
    assert "the best version, 1, cannot be brought back" in caplog.text


def test_goals_are_those_of_evaluation_stages():
    stages = [{"name": "demos", "mode": "demo", "episodes": 3}, {"name": "a", "mode": "eval", "episodes": 7}]
    assert evaluation_goals(stages) == {"a": 7}
