"""Fixtures of the learner's tests."""

import pytest
from tiny import SPEC

from serl_launcher.replay.ring import RingWriter


@pytest.fixture
def ring(tmp_path):
    writer = RingWriter(SPEC, 400, tmp_path, shared=tmp_path)
    yield writer
    writer.close()
