"""The ledger of acts: kept before anybody is answered, not done twice, told of when damaged; and what it leaves."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from serl_launcher.run.acts import ActsLedger, locked
from serl_launcher.run.in_force import Word


def test_an_act_is_kept_with_time_and_who_and_an_id_is_not_done_twice(tmp_path: Path) -> None:
    ledger = ActsLedger(tmp_path)
    [first] = ledger.append({"act": "publish", "id": "a"}, by="alice")
    [again] = ActsLedger(tmp_path).append({"act": "publish", "id": "a"}, by="alice")
    assert first == again
    assert (first["n"], first["by"], first["act"], first["id"]) == (1, "alice", "publish", "a")
    assert first["time"].endswith("+00:00")
    assert ledger.state.publish_requests == ledger.state.wanted == 1
    ledger.append({"act": "published", "of": 1, "version": 7}, by="trainer")
    assert (ledger.state.publish_requests, ledger.state.wanted, ledger.state.acts) == (1, 0, 2)


def test_what_holds_is_what_was_said_last(tmp_path: Path) -> None:
    ledger = ActsLedger(tmp_path)

    def said(word: str, episode_id: str = "e1") -> Word:
        ledger.append({"act": "verdict", "episode_id": episode_id, "word": word}, by="bo")
        return ledger.state.words[episode_id]

    assert (said("failure").success, said("reject").use) == (False, "reject")
    assert (said("success").success, ledger.state.words["e1"].use) == (True, "reject")
    assert said("discard").use == "discard"
    assert said("accept").use == "accept"
    cleared = said("clear")
    assert (cleared.success, cleared.use, cleared.act) == (None, None, 6)
    ledger.append({"act": "pause", "actor": "r1"}, {"act": "stop"}, {"act": "serve", "version": 3}, by="bo")
    state = ActsLedger(tmp_path).state
    assert (state.paused, state.paused_actors, state.stopped, state.served) == (None, {"r1": "bo"}, "bo", 3)
    ledger.append({"act": "start"}, {"act": "resume"}, {"act": "serve", "version": None}, by="bo")
    assert (ledger.state.paused_actors, ledger.state.stopped, ledger.state.served) == ({}, None, None)


def test_a_torn_last_line_was_never_answered_and_is_cut_off(tmp_path: Path) -> None:
    ledger = ActsLedger(tmp_path)
    ledger.append({"act": "training_pause"}, by="bo")
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole + b'{"n": 2, "id": "x", "act": "stop"')
    assert (ledger.state.training_paused, ledger.state.stopped, ledger.state.damaged) == ("bo", None, [])
    ledger.append({"act": "pause"}, by="bo")
    assert ledger.path.read_bytes().startswith(whole + b'{"n": 2, ')
    assert (ledger.state.paused, ledger.state.acts) == ("bo", 2)


@pytest.mark.parametrize("damage", ["flipped", "emptied", "gone"])
def test_damage_is_told_and_holds_robots_and_training_until_somebody_says_go_on(tmp_path, damage, caplog) -> None:
    ledger = ActsLedger(tmp_path)
    ledger.append({"act": "publish"}, by="bo")
    ledger.append({"act": "verdict", "episode_id": "e", "word": "discard"}, by="bo")
    content = ledger.path.read_bytes()
    if damage == "gone":
        ledger.path.unlink()
    else:
        ledger.path.write_bytes(content.replace(b"discard", b"disc4rd") if damage == "flipped" else b"")
    state = ledger.state
    assert state.paused == state.training_paused == "a damaged line of acts.jsonl"
    assert len(state.damaged) == 1
    assert "is damaged or missing" in caplog.text
    ledger.append({"act": "publish"}, by="bo")  # another act does not make it forgotten
    assert ActsLedger(tmp_path).state.paused
    ledger.append({"act": "resume"}, {"act": "training_resume"}, by="bo")
    state = ActsLedger(tmp_path).state
    assert (state.paused, state.training_paused, state.damaged) == (None, None, [])


def test_what_one_process_keeps_another_sees_and_who_holds_the_file_is_named(tmp_path: Path) -> None:
    ledger, other = ActsLedger(tmp_path), ActsLedger(tmp_path)
    assert other.state.acts == 0
    ledger.append({"act": "stop"}, by="bo")
    assert other.state.stopped == "bo"
    program = (
        "import fcntl, sys, time; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); "
        "time.sleep(60)"
    )
    argv = [sys.executable, "-c", program, str(ledger.path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match=r"another process holds .*acts.jsonl; ask again"):
            ledger.append({"act": "start"}, by="bo")
        os.kill(holder.pid, signal.SIGKILL)
    assert ledger.append({"act": "start"}, by="bo")[0]["n"] == 2
    with locked(tmp_path):
        assert [json.loads(line)["act"] for line in ledger.path.read_text().splitlines()] == ["stop", "start"]
