"""benchmarks/full_size.py: a rehearsal of every model, preflight's forecast at middle size, and the released sizes."""

import json

import pytest


def rows_of(tmp_path, *words):
    from full_size import main

    rows = tmp_path / "rows.jsonl"
    assert main([*words, "--folder", str(tmp_path / "work"), "--rows", str(rows)]) == 0
    assert not list((tmp_path / "work").iterdir())
    return {row["step"]: row for row in map(json.loads, rows.read_text().splitlines())}


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        pytest.param("pi0", "expert", marks=pytest.mark.slow),
        pytest.param("pi05", "expert", marks=pytest.mark.slow),
        pytest.param("groot_n1_7", "lora", marks=pytest.mark.slow),
    ],
)
def test_the_rehearsal_of_every_step(tmp_path, monkeypatch, kind, mode):
    """At tiny size, all in this process; the released size runs the same steps in processes of their own."""
    import full_size
    from _full_size_steps import Place, run_step

    here = lambda name, kind, folder, **given: run_step(name, Place(folder, kind), **given)  # noqa: E731
    monkeypatch.setattr(full_size, "step", here)
    rows = rows_of(tmp_path, kind, "--size", "tiny", "--train", mode)
    assert list(rows) == ["make", *full_size.STEPS]
    assert len(rows["train"]["losses"]) == 3
    assert (rows["publish"]["trained_steps"], rows["serve"]["version"]) == (3, 1)
    assert rows["reload"]["spread"] > 0.01
    assert rows["reload"]["equal"] or mode == "lora"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "expert", "lora"])
def test_preflights_memory_is_what_a_run_takes(tmp_path, mode):
    """At 89M parameters, in real processes: what a step takes beyond interpreter and libraries."""
    words = ("--set", "++policy.precision=float32", "--set", "policy.size.image_size=112")
    rows = rows_of(tmp_path, "pi0", "--size", "middle", "--train", mode, *words)
    for name in ("load", "train", "publish", "serve"):
        row = rows[name]
        assert row["rss_gb"] == pytest.approx(row["forecast_gb"], rel=0.1), row


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("kind", ["pi0", "groot_n1_7", "pi05"])
def test_the_released_size(tmp_path, kind):
    """Forty gigabytes of disk and 20 of memory; on two cores without bf16 instructions the better part of an hour."""
    rows = rows_of(tmp_path, kind, "--gb", "20", "--set", "task=fetch_reach")
    for name in ("load", "train", "serve"):
        assert rows[name]["rss_gb"] < 1.1 * rows[name]["forecast_gb"], rows[name]
