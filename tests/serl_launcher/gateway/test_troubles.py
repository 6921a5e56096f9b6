"""What ails the roles reaches the status document and every actor's link: of the supervisor, the trainer, the disk."""

import json
import time
from pathlib import Path

import pytest
from gateway_samples import connected, serving
from replay_samples import batches, info

from serl_launcher.gateway import ingest, troubles
from serl_launcher.run.internal import InternalClient, PolicyLink, SupervisorLink
from serl_launcher.run.paths import RunPaths
from serl_transport.contract.errors import BadFrame

PATIENCE_S = 30.0


def until(condition) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_the_supervisor_tells_is_in_the_status_and_at_the_actor(tmp_path: Path, monkeypatch) -> None:
    with serving(tmp_path) as gateway, connected(gateway) as client:
        assert gateway.status()["troubles"] == {}
        supervisor = SupervisorLink(tmp_path)
        until(lambda: supervisor.tell({"trainer": "silent for 8 s"}) or gateway.status()["troubles"])
        assert gateway.status()["troubles"] == {"trainer": "silent for 8 s"}
        until(lambda: client.troubles == {"trainer": "silent for 8 s"})
        until(lambda: "troubles" in json.loads(RunPaths(tmp_path).status.read_text()))
        supervisor.tell({})
        until(lambda: client.troubles == {})
        monkeypatch.setattr(troubles, "SILENT_S", 0.5)
        until(lambda: "supervisor" in client.troubles)
        assert client.troubles["supervisor"].startswith("silent for ")
        supervisor.close()


def test_a_supervisor_that_was_silent_from_the_start_is_told_of(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("FLOWSERL_BEAT_FILE", str(tmp_path / "beat"))
    (tmp_path / "beat").write_bytes(bytes(256))
    monkeypatch.setattr(troubles, "SILENT_S", 0.3)
    with serving(tmp_path) as gateway, connected(gateway) as client:
        until(lambda: "supervisor" in client.troubles)
        assert client.troubles["supervisor"].startswith("silent for ")
        supervisor = SupervisorLink(tmp_path)
        until(lambda: supervisor.tell({}) or not gateway.status()["troubles"])
        assert gateway.status()["troubles"] == {}
        supervisor.close()


def test_what_the_trainer_goes_on_without_is_told_and_other_words_are_refused(tmp_path: Path) -> None:
    with serving(tmp_path) as gateway:
        trainer = InternalClient(tmp_path, "trainer", patience_s=PATIENCE_S)
        words = {"step": 1, "stage_steps": {}, "version": 1}
        status = trainer.progress(**words, troubles={"telemetry.wandb": "switched off: no way"})
        assert status["troubles"] == gateway.status()["troubles"] == {"telemetry.wandb": "switched off: no way"}
        assert trainer.progress(**words)["troubles"] == {}
        with pytest.raises(BadFrame, match="troubles"):
            trainer.call("progress", words | {"metrics": {}, "troubles": [1]})
        trainer.close()


def test_a_disk_that_keeps_nothing_is_told_of(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(troubles, "SILENT_S", 0.3)
    with serving(tmp_path) as gateway, connected(gateway) as client:
        held: list = []
        monkeypatch.setattr(gateway.ingest._writer, "append", lambda *words: held.append(words))
        client.send_item(batches(info("e1", boot=client.boot_id))[0].to_body())
        until(lambda: "journal" in gateway.status()["troubles"])
        monkeypatch.undo()
        for words in held:
            gateway.server.call_soon(lambda words=words: gateway.ingest._writer.append(*words))
        until(lambda: gateway.status()["troubles"] == {})
        assert client.flush(PATIENCE_S)


def test_without_the_journal_s_thread_the_gateway_falls_silent(tmp_path: Path, monkeypatch) -> None:
    """Nothing would ever be acknowledged again; the supervisor restarts what does not beat."""
    told: list[bool] = []
    monkeypatch.setattr("serl_launcher.gateway.app.beat", lambda: told.append(True))
    with serving(tmp_path) as gateway:
        until(lambda: told)
        monkeypatch.setattr(type(gateway.ingest._writer), "alive", False)
        time.sleep(0.6)  # a beat that was under way
        told.clear()
        time.sleep(1.2)
        assert told == []


def test_no_clock_on_the_wall_decides_that_an_actor_is_gone(tmp_path: Path, monkeypatch) -> None:
    with serving(tmp_path, gateway__dead_actor_s=1.0) as gateway:
        wall, steps = time.time_ns, [0]
        monkeypatch.setattr(time, "time_ns", lambda: wall() + steps[0] * 3600 * 10**9)
        with connected(gateway) as client:
            client.send_item(batches(info("e1", boot=client.boot_id))[0].to_body())
            assert client.flush(PATIENCE_S)
            for steps[0] in (5, -5):
                time.sleep(1.5)
                assert "e1" in gateway.journalled.assembler.open
        until(lambda: "e1" not in gateway.journalled.assembler.open)  # set back by ten hours, and closed all the same
        assert ingest.time.time_ns() < wall()


def test_a_policy_server_that_nobody_answers_tries_a_fresh_socket(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("serl_launcher.run.internal.DEAF_S", 0.2)
    with serving(tmp_path) as gateway:
        link = PolicyLink(tmp_path)
        dead = link.socket
        dead.disconnect(dead.getsockopt(32).rstrip(b"\0"))  # ZMQ_LAST_ENDPOINT: it will never speak again

        def served() -> bool:
            link.serving(version=3)
            link.receive(0.05)
            return gateway.status()["serving"].get("version") == 3

        until(served)
        assert dead.closed
        alive = link.socket
        for _ in range(10):
            served()
        assert link.socket is alive
        link.close()
