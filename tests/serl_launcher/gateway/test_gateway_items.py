"""Several items in one message through a real gateway: each journalled once, each with its own verdict."""

from __future__ import annotations

import json
from pathlib import Path

from gateway_samples import connected, serving
from replay_samples import SPEC, batches, info, wait_for

from serl_launcher.replay.episodes import journal_episodes, journal_items
from serl_transport import bundle
from serl_transport.delivery.spool import DiskSpool
from serl_transport.wire.codec import pack, unpack


def test_what_an_earlier_process_left_is_delivered_in_one_message(tmp_path: Path) -> None:
    run, folder = tmp_path / "run", tmp_path / "spool"
    spool = DiskSpool(folder)
    good = [*batches(info("e1", boot=spool.boot_id), (4, 3)), *batches(info("e2", boot=spool.boot_id), (2, 2, 2))]
    bodies = [part.to_body() for part in good]
    bodies[3:3] = [bodies[2] | {"first_tick": -1}]  # one that no learner takes, among those of e2
    for body in bodies:
        spool.append([b"", *pack(body)])
    spool.close()
    with serving(run) as gateway:
        with connected(gateway, spool_dir=folder, ledger_path=tmp_path / "acked.jsonl") as client:
            assert client.flush(20)
            assert client.refused_items == 1
            assert "schema_mismatch" in next((folder / "refused").glob("*.txt")).read_text()
            counters = gateway.server.router.counters
            assert (counters["items"], counters["data"], counters["schema_mismatch"]) == (1, 6, 1)
            acked = [json.loads(line) for line in (tmp_path / "acked.jsonl").read_text().splitlines()]
            # The same message once more, as after an acknowledgement that was lost: nothing is stored twice.
            again, box = [(seq, pack(body)) for seq, body in enumerate(bodies, 1)], []
            client._data.loop.call_soon(
                lambda: client._data.submit(bundle.ITEMS, [bundle.write(again)], box.append, boot_id=spool.boot_id)
            )
            assert list(bundle.refusals(unpack(wait_for(lambda: box)[0]), 6)) == [3]
    stored = [(entry.boot_id, entry.seq, entry.crc32) for entry in journal_items(run, SPEC)]
    assert sorted(stored) == sorted((row["boot"], row["seq"], row["crc32"]) for row in acked)
    assert [seq for _, seq, _ in stored] == [1, 2, 3, 5, 6]
    lengths = {episode.info.episode_id: episode.n for _, episode in journal_episodes(run, SPEC)}
    assert lengths == {"e1": 7, "e2": 6}
