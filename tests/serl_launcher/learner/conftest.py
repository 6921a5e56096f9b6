"""Fixtures of the learner's tests."""

import pytest
from tiny import SPEC

from serl_launcher.replay.ring import RingWriter


@pytest.fixture(autouse=True)
def no_rests(monkeypatch):
    """The scripted gateway has its next answer ready: the trainer need not wait for it."""
    monkeypatch.setattr("serl_launcher.learner.trainer.REST_S", 0.0)
    monkeypatch.setattr("serl_launcher.learner.trainer.LIMITED_S", 0.0)


@pytest.fixture
def ring(tmp_path):
    writer = RingWriter(SPEC, 400, tmp_path, shared=tmp_path)
    yield writer
    writer.close()
