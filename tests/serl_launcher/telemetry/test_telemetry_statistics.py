"""Wilson's interval against values from its definition, and the sliding window."""

import math
import subprocess
import sys

import pytest

from serl_launcher.telemetry.statistics import sliding, wilson


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (3, 10), (54, 60), (60, 60)])
def test_the_bounds_solve_wilsons_equation(successes, n):
    """Each bound b satisfies |p - b| = z sqrt(b (1 - b) / n)."""
    z, p = 1.959964, successes / n
    for bound in wilson(successes, n):
        assert math.isclose(abs(p - bound), z * math.sqrt(bound * (1 - bound) / n), abs_tol=1e-9)


def test_known_values_and_edges():
    low, high = wilson(54, 60)  # 0.90 of 60
    assert (round(low, 3), round(high, 3)) == (0.799, 0.953)
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="got 3 of 2"):
        wilson(3, 2)


def test_sliding_counts_the_last_outcomes():
    assert sliding([True, False, True, True, False], 3) == [(1, 1), (1, 2), (2, 3), (2, 3), (2, 3)]


def test_the_gateway_may_import_it_without_torch():
    code = "import sys; sys.modules['torch'] = None; "
    code += "import serl_launcher.telemetry.statistics, serl_launcher.telemetry.dashboard"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
