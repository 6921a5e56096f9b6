"""A gateway whose journal was damaged while it was away: exit 2, one line that names the place, nothing touched."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from gateway_samples import config, connected, serving
from replay_samples import batches, info, wait_for
from test_gateway_process import complaint, write_config

from serl_launcher.gateway.app import Gateway
from serl_launcher.gateway.settings import GatewaySettings
from serl_launcher.replay.durable import MARK_FILE
from serl_launcher.replay.journal import JournalCorrupt
from serl_launcher.run.paths import RunPaths


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three episodes that were acknowledged, and a gateway that has ended."""
    with serving(tmp_path) as gateway, connected(gateway) as client:
        for k in range(3):
            for part in batches(info(f"e{k}", boot=client.boot_id)):
                client.send_item(part.to_body())
        assert client.flush(10)
        wait_for(lambda: gateway.journalled.ledger.rows == 3)
    return tmp_path


def contents(run: Path) -> dict[str, bytes]:
    watched = [*(run / "journal").glob("*.seg"), run / "journal" / MARK_FILE, run / "episodes.jsonl"]
    return {path.name: path.read_bytes() for path in watched if path.exists()}


def flip(run: Path) -> None:
    path = run / "journal" / "000001.seg"
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 1
    path.write_bytes(raw)


def cut(run: Path) -> None:
    path = run / "journal" / "000001.seg"
    path.write_bytes(path.read_bytes()[:-100])


def zero(run: Path) -> None:
    path = run / "journal" / "000001.seg"
    path.write_bytes(path.read_bytes()[:-1000] + bytes(1000))


def gone(run: Path) -> None:
    (run / "journal" / "000001.seg").unlink()


def all_gone(run: Path) -> None:
    shutil.rmtree(run / "journal")


@pytest.mark.parametrize("damage", [flip, cut, zero, gone])
def test_damage_is_refused_in_one_line_and_nothing_is_written_over(run, damage):
    damage(run)
    before = contents(run)
    write_config(run)
    line = complaint(run).splitlines()[-1]
    assert line.startswith(f"gateway: {run}/journal/000001.seg at byte ")
    assert "Missing from there: up to segment 1 byte" in line
    assert line.endswith(f"tools/recover_run.py {run}")
    assert contents(run) == before


def refuse(run: Path, message: str) -> None:
    before = contents(run)
    with pytest.raises(JournalCorrupt, match=message):
        Gateway(GatewaySettings.of(config()), RunPaths(run))
    assert contents(run) == before


def test_where_the_whole_journal_is_gone_the_list_of_episodes_testifies(run):
    all_gone(run)
    refuse(run, r"ends too early: .*episodes\.jsonl lists 3 episodes, the journal closes 0\. Missing: e0, e1, e2")


def test_a_torn_line_of_that_list_says_nothing(run):
    listing = run / "episodes.jsonl"
    listing.write_text(listing.read_text() + '{"episode_id": "e3", "ordi')
    with serving(run) as gateway:
        assert gateway.journalled.ledger.rows == 3
