"""What an operator may ask of a running gateway, with keys and without; what outlives a restart."""

from __future__ import annotations

import time
from pathlib import Path

import keygen
import pytest
from gateway_samples import connected, serving
from replay_samples import SPEC

from serl_launcher.run.acts import ActsLedger
from serl_launcher.run.internal import InternalClient
from serl_transport.client import TrainerClient
from serl_transport.config import TrainerConfig
from serl_transport.contract.errors import BadFrame, Refused, Unauthorized, WireError
from serl_transport.security.allow_list import OPERATOR_REQUESTS


def operator(gateway, name: str = "alice", **config) -> TrainerClient:
    ports = TrainerConfig(port_number=gateway.port, broadcast_port=gateway.broadcast_port, **config)
    return TrainerClient(name, "127.0.0.1", ports, role="operator", wait_for_server=False)


def ask(client: TrainerClient, request: str) -> dict:
    return client.request(request, timeout_ms=20_000)


def test_pause_and_stop_outlive_the_gateway_and_stop_ends_with_the_next_start(tmp_path: Path) -> None:
    with serving(tmp_path / "run") as gateway, connected(gateway) as actor:
        alice = operator(gateway)
        assert ask(alice, "pause")["operator"]["paused"]
        ticket = actor.request("next_episode", {"want": "follow"})
        assert (ticket["action"], ticket["reason"]) == ("wait", "an operator paused the run (alice)")
        assert "alice" not in gateway.status()["actors"]
        alice.stop()
    with serving(tmp_path / "run") as gateway, connected(gateway) as actor:
        alice = operator(gateway)
        assert actor.request("next_episode", {"want": "follow"})["action"] == "wait"
        assert not ask(alice, "resume")["operator"]["paused"]
        assert actor.request("next_episode", {"want": "follow"})["action"] == "run"
        assert ask(alice, "publish")["operator"]["publish_requests"] == 1
        assert ask(alice, "stop")["done"]
        assert actor.request("next_episode", {"want": "demo"})["action"] == "stop"
        with pytest.raises(Unauthorized, match="infer is an actor's"):
            alice.infer({})
        alice.stop()
    with serving(tmp_path / "run") as gateway:
        assert gateway.status()["done"]  # a gateway that was killed forgets nothing
    ActsLedger(tmp_path / "run").append({"act": "start"}, by="alice")  # as every start of the learner does
    with serving(tmp_path / "run") as gateway:
        assert not gateway.status()["done"]


def test_what_is_set_of_the_actors_rollout_comes_with_their_next_ticket_until_it_is_taken_back(tmp_path: Path) -> None:
    def set_rate(value):
        alice.request("set", {"key": "rollout.rate_hz", "value": value, "person": "Ann"}, timeout_ms=20_000)

    run, rollout = tmp_path / "run", {"rate_hz": None, "video_every": 20}
    with serving(run, rollout=rollout) as gateway, connected(gateway) as actor:
        alice = operator(gateway)
        assert "rollout" not in actor.request("next_episode", {"want": "follow"})
        with pytest.raises(Refused, match=r"rollout.rate_hz: expected a number from 0.001 to 10, got 11"):
            set_rate(11)
        set_rate(5)
        alice.stop()
    with serving(run, rollout=rollout) as gateway, connected(gateway) as actor:
        alice = operator(gateway)
        ticket = actor.request("next_episode", {"want": "follow"})
        assert ticket["rollout"] == {"rate_hz": {"value": 5, "by": "Ann (alice)"}}
        set_rate(None)
        assert "rollout" not in actor.request("next_episode", {"want": "follow"})
        actor.set_status(rollout="rate_hz=5 (Ann)")
        deadline = time.monotonic() + 5
        while gateway.status()["actors"]["a"]["rollout"] != "rate_hz=5 (Ann)":
            assert time.monotonic() < deadline
            time.sleep(0.02)
        alice.stop()


def test_with_keys_an_actor_steers_nothing(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    assert keygen.main([str(keys), "--actor", "a", "--operator", "alice"]) == 0
    with serving(tmp_path / "run", security={"keys_dir": str(keys), "allow_list": None}) as gateway:
        ports = TrainerConfig(gateway.port, gateway.broadcast_port, keys_dir=str(keys))
        actor = TrainerClient("a", "127.0.0.1", ports, spec=SPEC, wait_for_server=False)
        alice = operator(gateway, keys_dir=str(keys))
        assert actor.request("next_episode", {"want": "follow"})["action"] == "run"
        for request in OPERATOR_REQUESTS:
            with pytest.raises(Unauthorized):
                actor.request(request)
        assert not gateway.status()["operator"]["paused"]
        assert ask(alice, "pause")["operator"]["paused"]
        with pytest.raises(WireError):
            operator(gateway)  # no keys
        actor.stop()
        alice.stop()


def test_goals_and_ends_of_stages_hold_over_a_restart(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with serving(run) as gateway:
        alice = operator(gateway)
        alice.request("set", {"key": "schedule.stages.demos.episodes", "value": 1})
        assert gateway.status()["stage"]["episodes_goal"] == 1
        alice.request("end_stage", {"stage": "demos"})
        assert gateway.status()["stage"]["name"] == "sft"  # demos trains nothing: at once
        with pytest.raises(Refused, match="stage demos is over"):
            alice.request("set", {"key": "schedule.stages.demos.episodes", "value": 5})
        with pytest.raises(BadFrame, match=r"unknown key 'stag'; did you mean 'stage'"):
            alice.request("end_stage", {"stag": "sft"})
        with pytest.raises(BadFrame, match="acts: expected after as the number of an act, got '3'"):
            alice.request("acts", {"after": "3"})
        act = alice.request("end_stage", {"person": "bo"})["act"]
        assert act["by"] == "bo (alice)"  # bo, at alice's console
        assert gateway.status()["stage"]["name"] == "sft"  # what it has learned is published first
        alice.stop()
    with serving(run) as gateway:
        assert gateway.status()["stage"]["name"] == "sft"
        assert gateway.status()["operator"]["publish_wanted"] == act["n"]
        trainer = InternalClient(run, "trainer", patience_s=10)
        trainer.hello()
        trainer.progress(step=3, stage_steps={"sft": 3}, version=4, obeyed=act["n"])
        stage = gateway.status()["stage"]
        assert (stage["name"], stage["min_version"]) == ("before", 4)
        trainer.close()
    with serving(run) as gateway:
        assert (gateway.status()["stage"]["name"], gateway.status()["operator"]["publish_wanted"]) == ("before", 0)
