"""A hub that cannot be reached: one line within seconds, in place of minutes of the library's retries."""

import time

import pytest

from serl_launcher.policies import hub
from serl_launcher.policies.checkpoint import Checkpoint, CheckpointError
from serl_launcher.policies.tokens import HubTokenizer


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(hub, "obstacle", lambda host, port: f"the name {host!r} does not resolve")
    hub.unreachable.cache_clear()
    yield
    hub.unreachable.cache_clear()


def test_a_checkpoint_of_the_hub(caplog):
    began = time.monotonic()
    wanted = r"policy.checkpoint=nobody/nothing: no such folder, and the hub cannot be reached \(the name"
    with pytest.raises(CheckpointError, match=wanted):
        Checkpoint.find("nobody/nothing")
    assert "only what is on this machine is used" in caplog.text
    assert time.monotonic() - began < 10


def test_a_tokenizer_of_the_hub(caplog):
    with pytest.raises(ValueError, match=r"policy.tokenizer=nobody/nothing: cannot be loaded"):
        HubTokenizer("nobody/nothing", 48)
    assert "cannot be reached (the name 'huggingface.co' does not resolve)" in caplog.text
