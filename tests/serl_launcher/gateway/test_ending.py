"""The end of a run at the gateway: open episodes are waited for, then their data, then actors are told to stop."""

from __future__ import annotations

from pathlib import Path

import pytest
from gateway_samples import connected, serving
from replay_samples import batches, info, wait_for
from test_gateway import run_ticket, send
from test_gateway_operator import ask, operator

from serl_transport.contract.errors import SchemaMismatch

ONE = [{"name": "online", "mode": "online", "episodes": 1, "steps": 5}]


def waits_for(gateway) -> dict[str, str]:
    return gateway.status()["ending"]["waits_for"]


def begin(client) -> dict:
    """Ask for a ticket; its episode's info."""
    ticket = client.request("next_episode", {"backlog": 0})
    names = {key: ticket[key] for key in ("mode", "stage", "seed")}
    return info(ticket["episode_id"], actor=client.name, boot=client.boot_id, **names)


def test_an_open_episode_is_waited_for_then_its_data_then_the_actor_is_told_to_stop(tmp_path: Path) -> None:
    with (
        serving(tmp_path, schedule__stages=ONE) as gateway,
        connected(gateway) as fast,
        connected(gateway, "b") as slow,
    ):
        opened = begin(slow)
        assert run_ticket(fast)["action"] == "run"
        assert waits_for(gateway) == {}
        gateway.progress.report({"step": 5, "version": 0, "stage_steps": {"online": 5}})
        gateway.server.call_soon(gateway._update_stage)
        wait_for(lambda: gateway.done)
        assert waits_for(gateway) == {
            "a": "has not come back for its next episode", "b": "makes its last episode",
        }  # fmt: skip
        wait_for(lambda: fast.over == "every stage of the schedule is done")
        stop = {"action": "stop", "reason": "every stage of the schedule is done"}
        assert fast.request("next_episode", {"want": "follow", "backlog": 0}) == stop
        assert list(waits_for(gateway)) == ["b"]
        send(slow, batches(opened))
        reply = slow.request("next_episode", {"backlog": 2})
        assert (reply["action"], reply["reason"]) == (
            "wait", "every stage of the schedule is done; the last 2 step batches are on their way",
        )  # fmt: skip
        assert waits_for(gateway) == {"b": "has not come back for its next episode"}
        assert slow.flush(10)
        assert slow.request("next_episode", {"backlog": 0}) == stop
        assert gateway.status()["ending"] == {"waits_for": {}, "given_up": {}}
        with pytest.raises(SchemaMismatch, match=r"next_episode: backlog: expected .* got -1"):
            slow.request("next_episode", {"backlog": -1})


def test_who_vanishes_or_brings_nothing_is_given_up_and_who_leaves_is_not_waited_for(tmp_path: Path) -> None:
    run = serving(tmp_path, gateway__dead_actor_s=1.5, schedule__stages=ONE)
    with run as gateway, connected(gateway) as leaving:
        with connected(gateway, "idle") as idle, connected(gateway, "sends") as sends:  # agentlace's kind: no tickets
            with connected(gateway, "gone") as gone:
                for client in (leaving, idle, gone):
                    begin(client)
                send(sends, batches(info("e1", actor="sends")))
                alice = operator(gateway)
                ask(alice, "stop")
                alice.stop()
                assert waits_for(gateway).keys() == {"a", "idle", "gone"}
                leaving.request("leave", {"reason": "MyArm.step failed"})
                assert waits_for(gateway).keys() == {"idle", "gone"}
            wait_for(lambda: waits_for(gateway).keys() == {"idle"})
            wait_for(lambda: not waits_for(gateway))
            given_up = gateway.status()["ending"]["given_up"]
            assert given_up["gone"].startswith("silent for ")
            assert given_up["idle"].startswith("is there, and has delivered nothing for ")
            assert given_up.keys() == {"gone", "idle"}
            assert gateway.status()["actors"]["a"]["left"] == "MyArm.step failed"


def test_an_actor_says_what_ails_its_robot(tmp_path: Path) -> None:
    with serving(tmp_path) as gateway, connected(gateway) as client:
        client.set_status(trouble="MyArm.step has not come back for 0.5 s\x1b[2J")
        wait_for(lambda: gateway.status()["actors"]["a"]["trouble"])
        assert gateway.status()["actors"]["a"]["trouble"] == "MyArm.step has not come back for 0.5 s\\x1b[2J"
        client.set_status(trouble=None)
        wait_for(lambda: gateway.status()["actors"]["a"]["trouble"] is None)
        with pytest.raises(SchemaMismatch, match="leave: reason: expected a text, got 3"):
            client.request("leave", {"reason": 3})
