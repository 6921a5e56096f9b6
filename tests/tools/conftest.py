"""Lets the tools' tests import the tools and the exporter's sample runs."""

import sys
from pathlib import Path

_TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(_TESTS.parent / "tools"), str(_TESTS / "serl_launcher" / "exporter")]
