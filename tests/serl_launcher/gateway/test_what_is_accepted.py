"""What the gateway accepts, every later reader can take; what it does not, it names."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import check_run
import numpy as np
import pytest
import visualize_dataset
import yaml
from configured import rule as accepting
from gateway_samples import connected, serving
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_samples import SPEC, batches, info, wait_for, write_journal

from serl_launcher.exporter.role import Exporter, ExporterOptions
from serl_launcher.gateway.ledger import Ledger, LedgerRow
from serl_launcher.replay.assembler import Assembler
from serl_launcher.replay.entries import CloseEntry, DataEntry
from serl_launcher.replay.episodes import EpisodeStream, journal_episodes
from serl_launcher.replay.relabelled import Relabelled
from serl_launcher.replay.ring import RingReader, RingWriter
from serl_launcher.replay.rulebook import RuleBook
from serl_launcher.replay.transitions import TransitionView
from serl_transport.contract.bounds import INT32, INT64, LARGEST, LARGEST_REWARD, LAST_SECOND, printable
from serl_transport.contract.errors import SchemaMismatch, WireError
from serl_transport.contract.schema import EpisodeInfo, StepBatch
from serl_transport.wire import codec

EDGES = [-(2**63), -1, 0, 1, INT32, INT32 + 1, INT64, 2**64 - 1]
WHOLE = st.sampled_from(EDGES) | st.integers(-(2**63), 2**64 - 1)
REAL = st.sampled_from([-1e308, -LARGEST, -0.0, 0.0, 1e-40, LARGEST_REWARD, LARGEST, 3.4e38, LAST_SECOND, 1e308])
NUMBER = REAL | st.floats(allow_nan=True, allow_infinity=True)
ODD = [
    "",
    "x",
    ".",
    "..",
    "../x",
    "/etc/x",
    "a/b",
    "a\\b",
    "a\n",
    "\x1b[2J",
    "a\0b",
    "a b",
    "é",
    "机器人",
    "~",
    "x~7",
    "x" * 129,
]
TEXT = st.sampled_from(ODD) | st.text(st.characters(exclude_categories=["Cs"]), max_size=40)  # what msgpack can carry


@st.composite
def items(draw) -> list[StepBatch]:
    """An episode of two batches; half of them hold whatever a sender may put in, half what just may be taken."""
    any_text = draw(TEXT | st.just("y" * 900_000))
    who = EpisodeInfo(draw(TEXT), "a", "b0", SPEC.name, any_text, "online", draw(TEXT), draw(WHOLE), draw(NUMBER))
    sound = draw(st.booleans())
    if sound:
        seed, start = draw(st.integers(0, INT64)), draw(st.floats(0, LAST_SECOND))
        who = replace(who, episode_id=f"e{draw(st.integers(0, 5))}", prompt="p", stage="s", seed=seed, start_time=start)
    parts = batches(who, (draw(st.integers(1, 3)), 2), success=draw(st.booleans()))
    for part in parts:
        for key, largest in (("next.reward", LARGEST_REWARD), ("observation.state", LARGEST), ("action", LARGEST)):
            value = draw(st.floats(-largest, largest) if sound else NUMBER)
            with np.errstate(over="ignore"):
                part.arrays[key].reshape(-1)[-1] = np.float32(value)
        for key, low, high in (("policy_version", -1, INT32), ("time_ns", 0, INT64)):
            good = [n for n in EDGES if low <= n <= high]
            part.arrays[key][-1] = draw(st.sampled_from(good if sound else EDGES[:-1]))
    return parts


def accepted(batch: StepBatch, seq: int, assembler: Assembler) -> DataEntry | None:
    """The item as the gateway takes it, through its bytes; None when it is refused."""
    frames = [bytes(frame) for frame in codec.pack(batch.to_body())]
    try:
        entry = DataEntry.of("a", "b0", seq, frames, SPEC)
        entry.check_sender(SPEC)
        assembler.check(entry)
    except WireError as refusal:
        message = refusal.message
    else:
        assembler.apply(entry, 1_700_000_000_000_000_000 + seq)
        return entry
    assert message.isprintable()
    assert len(message) < 2100
    return None


def read_by_all(run: Path) -> int:
    """Every reader of a run over its journal; the number of its episodes."""
    ledger, ring = Ledger(run / "episodes.jsonl"), RingWriter(SPEC, 400, run)
    closed = list(EpisodeStream(run, SPEC).poll())
    for one in closed:
        episode = one.build()
        ledger.add(LedgerRow.of(one, episode))
        ring.append(one.ordinal, episode.info.mode, episode.outcome.success, episode.arrays)
    ledger.write()
    assert len([json.loads(line) for line in (run / "episodes.jsonl").read_text().splitlines()]) == len(closed)
    view = TransitionView(SPEC, 2, gamma=1.0, demo_share=0.5)
    view.attach(RingReader(ring.path))
    view.refresh()
    if closed:
        assert np.isfinite(view.sample(np.random.default_rng(0), 20).return_to_go.astype(np.float32) ** 2).all()
    ring.close()
    with closing(Exporter(run, SPEC, ExporterOptions(), video=False)) as exporter:
        exporter.poll(flush=True)
    said = {one.info.episode_id: not one.build().outcome.success for one in closed}
    labels = Relabelled(run)
    labels.add(said, "ana", "2026-01-01T12:00:00+00:00")
    labels.save()
    book = RuleBook(accepting(), SPEC, None)
    for ordinal, episode in journal_episodes(run, SPEC):
        assert episode.outcome.success == said[episode.info.episode_id]
        book.judge(ordinal, episode.info.mode, episode.outcome.success, episode.arrays)
    report = check_run.check(run)
    assert not report.problems.keys() - {"policy version fell"}, report.text()
    assert report.counts["episodes in the dataset"] == len(closed)
    if closed:
        assert visualize_dataset.episode_table(run / "dataset").count("\n") == len(closed)
    return len(closed)


@settings(max_examples=25, deadline=None)
@given(st.lists(items(), min_size=1, max_size=6))
def test_no_reader_fails_on_what_was_accepted(episodes: list[list[StepBatch]]) -> None:
    assembler = Assembler(SPEC)
    parts = [part for parts in episodes for part in parts]
    taken = [entry for seq, part in enumerate(parts, 1) if (entry := accepted(part, seq, assembler))]
    with TemporaryDirectory() as folder:
        run = Path(folder)
        (run / "config.yaml").write_text(yaml.safe_dump({"task": {"spec": SPEC.to_dict()}}))
        write_journal(run, [*taken, *(CloseEntry(name, "dead_actor") for name in assembler.open)])
        read_by_all(run)


@pytest.mark.parametrize(
    "who",
    [
        {"seed": INT64, "start_time": float(LAST_SECOND)},
        {"seed": 0, "start_time": 0.0, "prompt": "p" * 4096, "stage": "机器人"},
        {"episode_id": "e" * 256, "stage": "s" * 128},
    ],
)
def test_the_largest_of_everything_is_accepted_and_read(tmp_path: Path, who: dict) -> None:
    parts = batches(replace(info("e"), **who))
    for part in parts:
        part.arrays["next.reward"][:] = LARGEST_REWARD
        part.arrays["observation.state"][:] = -LARGEST
        part.arrays["policy_version"][:] = INT32
        part.arrays["time_ns"][:] = INT64
    assembler = Assembler(SPEC)
    taken = [accepted(part, seq, assembler) for seq, part in enumerate(parts, 1)]
    assert None not in taken
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"task": {"spec": SPEC.to_dict()}}))
    write_journal(tmp_path, taken)
    assert read_by_all(tmp_path) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 2**63}, "seed: expected a whole number from 0 to 9223372036854775807, got 9223372036854775808"),
        ({"seed": -1}, "seed: expected a whole number from 0 .* got -1"),
        ({"prompt": "x" * 900_000}, r"prompt: expected a text of 1 to 4096 characters .*x… \(900000 long\)"),
        ({"prompt": "a\n\x1b[2J\0b"}, r"prompt: expected .* got 'a\\n\\x1b\[2J\\x00b'"),
        ({"prompt": ""}, "prompt: expected a text of 1 to 4096 characters"),
        ({"stage": "y" * 100_000}, r"stage: expected a name of 1 to 128 bytes .* \(100000 long\)"),
        ({"stage": "../x"}, "stage: expected a name .* got '../x'"),
        ({"episode_id": "evil\n\x1b[31m../../x"}, r"episode_id: expected a name .* got 'evil\\n\\x1b\[31m../../x'"),
        ({"episode_id": "e1~3"}, "episode_id: expected no ~"),
        ({"start_time": -1e308}, r"start_time: expected a number from 0 to .* got -1e\+308"),
        ({"next.reward": 3.4e38}, r"next.reward at row 0: expected -1000000000.0 to 1000000000.0, got 3.3\d+e\+38"),
        ({"observation.state": 1e19}, r"observation.state dim 'x' at tick 0: expected a number from -1e\+18 to 1e\+18"),
        ({"policy_version": 2**31}, "policy_version at row 0: expected -1 to 2147483647, got 2147483648"),
        ({"time_ns": -1}, "time_ns at row 0: expected 0 to 9223372036854775807, got -1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_no_reader_could_take_is_refused_and_named(tmp_path: Path, change: dict, message: str) -> None:
    (key, value), (part,) = next(iter(change.items())), batches(info("e1"), (4,))
    if key in part.arrays:
        part.arrays[key][:] = value
    else:
        part = replace(part, episode=replace(part.episode, **change))
    with pytest.raises(SchemaMismatch, match=message) as refusal:
        DataEntry.of("a", "b0", 1, codec.pack(part.to_body()), SPEC).check_sender(SPEC)
    assert refusal.value.message == printable(refusal.value.message)
    assert len(refusal.value.message) < 400


def test_the_gateway_refuses_poison_and_goes_on(tmp_path: Path) -> None:
    with serving(tmp_path) as gateway, connected(gateway) as client:
        own = replace(info("e1"), boot_id=client.boot_id)
        for who in (replace(own, episode_id="evil", seed=2**63), own):
            for part in batches(who):
                client.send_item(part.to_body())
        assert client.flush(10)
        assert client.refused_items == 2
        wait_for(lambda: (tmp_path / "episodes.jsonl").read_text())
    assert [episode.info.episode_id for _, episode in journal_episodes(tmp_path, SPEC)] == ["e1"]


@pytest.mark.parametrize(
    ("status", "message"),
    [
        ({"backlog": -1}, "heartbeat: backlog: expected a whole number from 0"),
        ({"mode": "\x1b[2J"}, r"heartbeat: mode: expected a name .* got '\\x1b\[2J'"),
        ({"policy_version": 2**31}, "heartbeat: policy_version: expected a whole number from -1 to 2147483647"),
    ],
)
def test_a_heartbeat_that_nobody_could_show_is_refused_and_said_at_the_client(tmp_path, caplog, status, message):
    import re

    with serving(tmp_path) as gateway, connected(gateway) as client:
        before = gateway.status()["actors"]["a"]
        client.set_status(**status)
        wait_for(lambda: "does not take this client's heartbeat" in caplog.text)
        after = gateway.status()["actors"]["a"]
    assert re.search(message, caplog.text)
    assert [after[key] for key in ("mode", "policy_version")] == [before[key] for key in ("mode", "policy_version")]
