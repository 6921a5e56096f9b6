"""Packed pictures at a real gateway: what is acknowledged can be read, what cannot be unpacked is refused, not kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import msgpack
import numpy as np
import pytest
from gateway_samples import SPEC, serving
from replay_samples import batches, info, wait_for

from serl_launcher.gateway.app import Gateway
from serl_launcher.replay.episodes import journal_episodes
from serl_launcher.replay.ring import RingReader
from serl_launcher.run.data_record import data_of
from serl_launcher.run.paths import RunPaths
from serl_transport.client import TrainerClient
from serl_transport.config import TrainerConfig
from serl_transport.contract.schema import StepBatch
from serl_transport.contract.specs import TaskSpec
from serl_transport.delivery.spool import ItemKey
from serl_transport.wire import codec

LARGE = TaskSpec.from_dict({**SPEC.to_dict(), "cameras": {"front": [24, 32]}})
FRONT = "observation.images.front"


@contextmanager
def actor(gateway: Gateway, pictures: str, spool: Path | None = None) -> Iterator[TrainerClient]:
    ports = TrainerConfig(port_number=gateway.port, broadcast_port=gateway.broadcast_port)
    client = TrainerClient(
        "a", "127.0.0.1", ports, spec=LARGE, wait_for_server=False, pictures=pictures, spool_dir=spool
    )
    try:
        yield client
    finally:
        client.stop()


def large(client: TrainerClient, episode_id: str = "e1") -> list[StepBatch]:
    """An episode whose pictures are worth packing."""
    y, x = np.mgrid[:24, :32]
    parts = batches(info(episode_id, boot=client.boot_id))
    for k, part in enumerate(parts):
        m = len(part.arrays[FRONT])
        drawn = np.stack([np.stack([y + i + k, x, y + x], -1) for i in range(m)]).astype(np.uint8)
        parts[k] = replace(part, arrays={**part.arrays, FRONT: drawn})
    return parts


@pytest.mark.parametrize("how", ["raw", "lossless", "jpeg:90"])
def test_what_is_acknowledged_is_in_ring_and_journal_and_says_what_it_lost(tmp_path: Path, how: str) -> None:
    with serving(tmp_path, task__spec=LARGE.to_dict()) as gateway, actor(gateway, how) as client:
        parts = large(client)
        for part in parts:
            client.send_item(part.to_body())
        assert client.flush(20)
        assert client.refused_items == 0
        ring = RingReader(gateway.journalled.ring.path)
        wait_for(ring.episodes)  # it enters once it was acknowledged
        (row,) = ring.episodes()
        sampled = ring.gather(np.arange(row.first_frame, row.first_frame + row.n_ticks + 1), [FRONT])[FRONT]
    ((_, episode),) = journal_episodes(tmp_path, LARGE)
    wanted = np.concatenate([part.arrays[FRONT] for part in parts])
    np.testing.assert_array_equal(sampled, episode.arrays[FRONT])
    assert (np.abs(sampled.astype(int) - wanted).max() > 0) == (how == "jpeg:90")
    assert np.abs(sampled.astype(int) - wanted).mean() < 3
    (line,) = [json.loads(line) for line in (tmp_path / "episodes.jsonl").read_text().splitlines()]
    assert line["lossy"] == (["jpeg:90"] if how == "jpeg:90" else [])
    assert data_of(RunPaths(tmp_path)).get("lossy_pictures") == ({"jpeg:90": 1} if how == "jpeg:90" else None)


def test_what_cannot_be_unpacked_is_refused_once_and_holds_nothing_up(tmp_path: Path, caplog) -> None:
    with (
        serving(tmp_path, task__spec=LARGE.to_dict()) as gateway,
        actor(gateway, "lossless", tmp_path / "spool") as client,
    ):
        (first, *rest) = large(client)
        frames = codec.pack(first.to_body(), pictures="lossless")
        body = msgpack.unpackb(frames[0])
        assert msgpack.unpackb(body["arrays"][FRONT].data)[0] == "time"
        client._outbox.offer(_spooled(client, [frames[0], b"these are no pictures"]))
        for part in (first, *rest):
            client.send_item(part.to_body())
        assert client.flush(20)
        assert client.refused_items == 1
        assert gateway.ingest.storage is None  # the disk did nothing wrong
    assert "packed pictures" in caplog.text
    ((_, episode),) = journal_episodes(tmp_path, LARGE)
    assert episode.info.episode_id == "e1"
    assert episode.n == sum(part.n for part in (first, *rest))


def _spooled(client: TrainerClient, frames: list[bytes]) -> ItemKey:
    return ItemKey(client.boot_id, client._spool.append([b"", *frames]))
