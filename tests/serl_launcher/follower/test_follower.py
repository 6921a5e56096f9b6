"""A host beyond the first against a real gateway: its copy of the journal, its ring, and what cuts the way between."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from gateway_samples import config, connected, serving
from omegaconf import DictConfig, OmegaConf
from replay_samples import SPEC, batches, info, wait_for

from serl_launcher.follower.follower import Follower, GatewayGoneError
from serl_launcher.follower.settings import FollowerSettings
from serl_launcher.replay.acceptance import EpisodeColumns, Selection
from serl_launcher.replay.followed_ring import BehindError, FollowedRing
from serl_launcher.replay.journal import segment_numbers, segment_path
from serl_launcher.replay.ring import RingReader
from serl_launcher.replay.views import ChunkView
from serl_launcher.run import checkpoints
from serl_launcher.run.acts import ActsLedger
from serl_launcher.run.files import DamagedFileError, read_json, write_sealed
from serl_launcher.run.first_host import FirstHost, follower_client
from serl_launcher.run.paths import RunPaths
from serl_transport.client import TrainerClient
from serl_transport.contract.errors import Refused, Unauthorized, WireError

HOSTS = {"launch": {"num_machines": 2, "machine_rank": 0, "main_host": "127.0.0.1"}}
PATIENCE = {"mbit_s": None, "patience_s": 60.0}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch) -> None:
    monkeypatch.setattr("serl_launcher.gateway.feed.WAIT_S", 0.05)


def second_config(port: int, follower=PATIENCE, **changes) -> DictConfig:
    """Of the second host, whose gateway is at this port."""
    cfg = config(**HOSTS, **changes) | {"port": port, "broadcast_port": port % 60000 + 1, "follower": follower}
    cfg["launch"] = cfg["launch"] | {"machine_rank": 1}
    return OmegaConf.create(cfg)


@contextmanager
def following(port: int, run_dir: Path, **changes) -> Iterator[Follower]:
    """A follower that nobody turns yet."""
    run_dir.mkdir(exist_ok=True)
    cfg = second_config(port, **changes)
    client = follower_client(cfg)
    try:
        follower = Follower(FollowerSettings.of(cfg), RunPaths(run_dir), client)
        try:
            yield follower
        finally:
            follower.close()
    finally:
        client.stop()


def turn_until(follower: Follower, condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "followed in vain"
        follower.turn()


def record(client: TrainerClient, first: int, n: int) -> None:
    """Episodes of 7 ticks, two in three of them a success, the first three demonstrations."""
    for k in range(first, first + n):
        mode = "demo" if k < 3 else "online"
        for part in batches(info(f"e{k}", boot=client.boot_id, mode=mode), (4, 3), success=k % 3 != 2):
            client.send_item(part.to_body())
    assert client.flush(10)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.seg"))}


def every_tick(episode: EpisodeColumns) -> Selection:
    all_of_it = np.ones(len(episode), bool)
    return Selection(True, "all", all_of_it, all_of_it)


def drawn(ring, steps: int = 4) -> list[np.ndarray]:
    """What a view over this ring draws by (seed, step)."""
    view = ChunkView(every_tick, SPEC, 3)
    view.attach(ring)
    view.refresh()
    found = []
    for step in range(steps):
        batch = view.sample(np.random.default_rng([7, step]), 16)
        found += [batch.state, batch.action, batch.is_pad, batch.demo, *batch.images.values()]
    return found


def test_the_copy_has_the_same_bytes_and_its_ring_gives_the_same_batches(tmp_path: Path) -> None:
    small = {"replay": {"capacity_frames": 100}}
    with serving(tmp_path / "first", **small, **HOSTS) as gateway:
        gateway.ingest._writer._segment_bytes = 8000
        ActsLedger(tmp_path / "first").append({"act": "pause"}, by="alice")
        with connected(gateway) as actor:
            record(actor, 0, 40)  # 320 frames: the ring goes round three times, and demonstrations move
        with following(gateway.port, tmp_path / "second", **small) as follower:
            wait_for(lambda: gateway.journalled.ledger.rows == 40)
            turn_until(follower, lambda: follower.ring.rows == gateway.journalled.ring.rows and follower.behind == 0)
            mine, theirs = bytes_of(tmp_path / "second" / "journal"), bytes_of(tmp_path / "first" / "journal")
            assert mine == theirs
            assert len(mine) > 1
            rings = [RingReader(ring.path) for ring in (gateway.journalled.ring, follower.ring)]
            assert rings[0].episodes() == rings[1].episodes()
            for one, other in zip(drawn(rings[0]), drawn(rings[1]), strict=True):
                np.testing.assert_array_equal(one, other)
            turn_until(follower, lambda: (tmp_path / "second" / "acts.mark").exists())
            assert [row["by"] for row in ActsLedger(tmp_path / "second").rows] == ["alice"]
            follower._next_status = 0.0
            follower.turn()
            told = gateway.status()["followers"]["host-1"]
            assert (told["behind"], told["rows"]) == (0, gateway.journalled.ring.rows)
            own = read_json(tmp_path / "second" / "status.json")
            assert own["ring"] == str(follower.ring.path)
            assert own["counts"]["episodes"] == 40


def test_a_reply_is_no_more_than_a_second_of_the_bandwidth_that_is_allowed(tmp_path: Path) -> None:
    with serving(tmp_path / "first", **HOSTS) as gateway, connected(gateway) as actor:
        record(actor, 0, 12)
        slow = {"mbit_s": 0.016, "patience_s": 60.0}  # 2,000 bytes a second
        with following(gateway.port, tmp_path / "second", follower=slow) as follower:
            before = follower.copy.received
            turn_until(follower, lambda: follower.copy.received > before)
            assert follower.most == 2000
            assert (
                follower.copy.received - before
                <= 2000
                < sum(map(len, bytes_of(tmp_path / "first" / "journal").values()))
            )


def test_it_goes_on_after_its_own_end_and_what_is_damaged_or_cut_is_fetched_anew(tmp_path: Path) -> None:
    copy = tmp_path / "second" / "journal"
    with serving(tmp_path / "first", **HOSTS) as gateway, connected(gateway) as actor:
        record(actor, 0, 6)
        with following(gateway.port, tmp_path / "second") as follower:
            turn_until(follower, lambda: follower.ring.rows == 6)
        whole = bytes_of(copy)
        for damage in (cut_in_half, flip_a_byte, remove, tear_the_end):
            damage(copy)
            with following(gateway.port, tmp_path / "second") as follower:
                turn_until(follower, lambda f=follower: f.ring.rows == 6 and f.behind == 0)
            assert bytes_of(copy) == whole, damage.__name__
        record(actor, 6, 2)
        with following(gateway.port, tmp_path / "second") as follower:
            assert follower.ring.rows == 6  # from its own disk
            turn_until(follower, lambda: follower.ring.rows == 8)


def cut_in_half(folder: Path) -> None:
    path = segment_path(folder, 1)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_byte(folder: Path) -> None:
    path = segment_path(folder, 1)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(folder: Path) -> None:
    for number in segment_numbers(folder):
        segment_path(folder, number).unlink()


def tear_the_end(folder: Path) -> None:
    with segment_path(folder, 1).open("ab") as file:
        file.write(b"FSR2 half a record")
    (folder / "durable").unlink()


def test_a_copy_of_another_journal_another_run_and_another_config_are_refused_by_name(tmp_path: Path) -> None:
    with serving(tmp_path / "other", **HOSTS) as gateway, connected(gateway) as actor:
        record(actor, 0, 1)
        with following(gateway.port, tmp_path / "second") as follower:
            turn_until(follower, lambda: follower.ring.rows == 1)
    with serving(tmp_path / "first", **HOSTS) as gateway:
        with (
            following(gateway.port, tmp_path / "second") as follower,
            pytest.raises(Refused, match="copy of the journal on host-1 is of another run than 't'"),
        ):
            follower.turn()
        with (
            following(gateway.port, tmp_path / "third", seed=3, replay={"capacity_frames": 401}) as follower,
            pytest.raises(Refused, match=r"differs from the learner's in replay\.capacity_frames, seed: start"),
        ):
            follower.turn()
        with pytest.raises(Refused, match=r"learner on port .* is of run 't'"):
            follower_client(second_config(gateway.port, run="u"))
        with connected(gateway) as actor, pytest.raises(Unauthorized, match="expected a follower's connection"):
            actor.request("follow", {})
        client = follower_client(second_config(gateway.port))
        try:
            with pytest.raises(WireError, match="segment: expected a whole number"):
                client.request("follow", {"segment": -1})
            with pytest.raises(Unauthorized, match="role follower"):
                client.request("next_episode", {})
            for name in ("config.yaml", "params/../ticket.secret", "checkpoints/step_1/../../ticket.secret"):
                with pytest.raises(Refused, match="expected a file of a checkpoint"):
                    client.request("file", {"name": name, "offset": 0, "most": 100})
        finally:
            client.stop()


def test_ranks_wait_for_a_follower_that_is_behind_and_go_on_over_its_restart(tmp_path: Path) -> None:
    status = tmp_path / "second" / "status.json"
    with pytest.raises(BehindError, match="no follower filled a ring"):
        FollowedRing(status, 0.05)
    with serving(tmp_path / "first", **HOSTS) as gateway, connected(gateway) as actor:
        record(actor, 0, 4)
        with following(gateway.port, tmp_path / "second") as follower:
            turn_until(follower, lambda: follower.ring.rows == 4 and status.exists())
            ring = FollowedRing(status, 0.3)
            ring.reach(3)
            assert [row.ordinal for row in ring.episodes()] == [0, 1, 2]
            with pytest.raises(BehindError, match=r"is at episode 4 of 5 that rank 0 trains on after"):
                ring.reach(5)
            before = ring.path
        record(actor, 4, 1)
        with following(gateway.port, tmp_path / "second") as follower:
            ring._patience_s = 20.0
            thread = threading.Thread(target=ring.reach, args=(5,))
            thread.start()
            turn_until(follower, lambda: follower.ring.rows == 5)
            follower._next_status = 0.0
            turn_until(follower, lambda: not thread.is_alive())
            assert ring.path != before
            assert [row.ordinal for row in ring.episodes()] == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_a_gateway_that_is_gone_is_waited_for_said_and_given_up_after_the_patience(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("serl_launcher.follower.follower.ANSWER_S", 0.2)
    monkeypatch.setattr("serl_launcher.follower.follower.SILENT_S", 0.1)
    with serving(tmp_path / "first", **HOSTS) as gateway, connected(gateway) as actor:
        port = gateway.port
        record(actor, 0, 2)
    with serving(tmp_path / "first", port=port, **HOSTS), following(port, tmp_path / "second") as follower:
        turn_until(follower, lambda: follower.ring.rows == 2)
        assert follower.trouble() is None
    patience = {"mbit_s": None, "patience_s": 1.0}
    with serving(tmp_path / "first", port=port, **HOSTS):
        gone = following(port, tmp_path / "second", follower=patience)
        follower = gone.__enter__()
    try:
        turn_until(follower, lambda: follower.trouble() is not None)
        assert "the gateway is silent" in follower.trouble()
        with serving(tmp_path / "first", port=port, **HOSTS) as gateway, connected(gateway) as actor:
            record(actor, 2, 1)
            turn_until(follower, lambda: follower.ring.rows == 3)
        with pytest.raises(GatewayGoneError, match=r"silent for .* longer than follower\.patience_s=1: "):
            turn_until(follower, lambda: False)
    finally:
        gone.__exit__(None, None, None)


def a_checkpoint(folder: Path, content: bytes) -> Path:
    folder.mkdir(parents=True)
    for name in checkpoints.FILES:
        (folder / name).write_bytes(content)
    told = {name: hashlib.sha256(content).hexdigest() for name in checkpoints.FILES}
    sizes = dict.fromkeys(checkpoints.FILES, len(content))
    write_sealed(folder / checkpoints.MANIFEST, {"step": 1, "files": sizes, "sha256": told})
    return folder


def test_ranks_fetch_the_checkpoint_that_rank_0_goes_on_from_and_no_other_stays(tmp_path: Path) -> None:
    stale = a_checkpoint(tmp_path / "second" / "checkpoints" / "step_000030", b"of another life")
    version = tmp_path / "first" / "params" / "v000002.safetensors"
    version.parent.mkdir(parents=True)
    version.write_bytes(b"weights")
    told = {"version": 2, "sha256": hashlib.sha256(b"weights").hexdigest()}
    version.with_suffix(".json").write_text(json.dumps(told))
    with serving(tmp_path / "first", **HOSTS) as gateway:
        there = a_checkpoint(tmp_path / "first" / "checkpoints" / "step_000020", b"new" * 2_000_000)
        first = FirstHost(second_config(gateway.port), RunPaths(tmp_path / "second"))
        first.resume_from(there.name)
        here = tmp_path / "second" / "checkpoints" / there.name
        assert [*checkpoints.whole(here.parent)] == [here]
        assert not stale.exists()
        (here / checkpoints.TENSORS).write_bytes(b"half")
        assert first.checkpoint(there) == here
        assert checkpoints.problem(here) is None
        assert first.version(version).read_bytes() == b"weights"
        (there / checkpoints.OPTIMIZER).write_bytes(b"damaged on the first host")
        (here / checkpoints.OPTIMIZER).write_bytes(b"and here")
        with pytest.raises(DamagedFileError, match=r"came damaged: .*optimizer\.pt"):
            first.checkpoint(there)
        first.resume_from(None)
        assert checkpoints.folders(here.parent) == []
