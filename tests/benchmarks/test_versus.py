"""Two ways to learn against each other: the verdict by hand, and that chance is told as such."""

import numpy as np
import pytest
from versus import compare, of_seeds


def row(algo, seed, value, *words):
    return {"algo": algo, "seed": seed, "words": list(words), "point": "after", "per_1000_ticks": value}


def test_the_interval_is_students_over_the_differences_of_the_seeds():
    found = compare({0: 10.0, 1: 12.0, 2: 11.0}, {0: 14.0, 1: 17.0, 2: 17.0, 3: 99.0})
    assert found["seeds"] == [0, 1, 2]
    assert found["difference"] == 5.0
    assert found["interval"] == pytest.approx([5 - 4.3027 / 3**0.5, 5 + 4.3027 / 3**0.5], abs=1e-3)
    assert found["verdict"] == "better"
    assert compare({0: 14.0, 1: 17.0, 2: 17.0}, {0: 10.0, 1: 12.0, 2: 11.0})["verdict"] == "worse"
    assert compare({0: 30.0, 1: 31.0}, {0: 20.0, 1: 20.9}, less_is_better=True)["verdict"] == "better"


def test_where_there_is_no_difference_three_looks_find_one_in_no_more_than_one_case_of_twenty():
    drawn, wrong = np.random.default_rng(0).normal(size=(2, 1000, 10)), 0
    for one, other in zip(*drawn, strict=True):
        seen = [compare(dict(enumerate(one[:n])), dict(enumerate(other[:n])), looks=3) for n in (3, 5, 10)]
        wrong += any(found["verdict"] != "cannot tell" for found in seen)
    assert wrong < 60


def test_rows_of_two_settings_under_one_name_are_refused():
    rows = [row("sac", 0, 1.0), row("sac", 1, 2.0, "algo.agent.tau=0.1")]
    with pytest.raises(ValueError, match=r"sac: expected rows of one kind, got sac \| sac algo\.agent\.tau=0\.1"):
        of_seeds(rows, "sac", "per_1000_ticks")
    assert of_seeds(rows, "sac algo.agent.tau=0.1", "per_1000_ticks") == {1: 2.0}
