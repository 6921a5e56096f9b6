"""Step batches to episodes: once, in order, never over a gap, and the same again when the journal is replayed."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from replay_samples import SPEC, batches, entries, entry, info, journal_items, open_writer, write_journal

from serl_launcher.replay.assembler import Assembler, ClosedEpisode
from serl_launcher.replay.entries import CloseEntry, DataEntry, Entry, SpecChangedError
from serl_launcher.replay.episodes import EpisodeStream, journal_episodes
from serl_launcher.replay.journal import JournalCorrupt
from serl_transport.contract.errors import Refused
from serl_transport.contract.specs import TaskSpec


def feed(assembler: Assembler, items: list[Entry]) -> list[ClosedEpisode]:
    return [closed for k, item in enumerate(items) for closed in assembler.apply(item, k)]


def ticks(closed: ClosedEpisode) -> list[int]:
    return (closed.build().arrays["action"][:, 0] * 100).round().astype(int).tolist()


def observed(closed: ClosedEpisode) -> list[int]:
    return closed.build().arrays["observation.images.front"][:, 0, 0, 0].tolist()


def test_batches_become_an_episode() -> None:
    (closed,) = feed(Assembler(SPEC), entries(batches(info("e"), (4, 3), driven=(1, 2))))
    assert (closed.ordinal, closed.whole, ticks(closed), observed(closed)) == (0, True, list(range(7)), list(range(8)))
    episode = closed.build()
    assert episode.outcome.success
    assert np.flatnonzero(episode.arrays["intervention"]).tolist() == [1, 2]


def test_any_order_of_arrival_gives_the_same_episode() -> None:
    items = entries(batches(info("e"), (2, 2, 3)))
    for order in itertools.permutations(items):
        (closed,) = feed(Assembler(SPEC), list(order))
        assert ticks(closed) == list(range(7))


def test_repeats_are_taken_once() -> None:
    items = entries(batches(info("e"), (2, 2, 3)))
    assembler = Assembler(SPEC)
    closed = feed(assembler, [items[0], items[0], items[1], items[0], items[2], items[2], items[1]])
    assert [ticks(c) for c in closed] == [list(range(7))]
    assert assembler.dropped == 0  # repeats are no contradiction
    assert items[1].key in assembler.seen


def test_ordinals_follow_the_closing_records() -> None:
    first, second = entries(batches(info("e1"))), entries(batches(info("e2", actor="z")))
    closed = feed(Assembler(SPEC), [first[0], second[0], second[1], first[1]])
    assert [(c.ordinal, c.info.episode_id) for c in closed] == [(0, "e2"), (1, "e1")]


def test_a_gap_is_never_joined() -> None:
    items = entries(batches(info("e"), (3, 3, 3)))
    assembler = Assembler(SPEC)
    assert feed(assembler, [items[0], items[2]]) == []
    closed = feed(assembler, [CloseEntry("e", "dead_actor")])
    # 0..2 lacks the observation after tick 2, so that tick waits for it; 6..8 has the real end.
    assert [(c.info.episode_id, c.cut_by, c.whole) for c in closed] == [
        ("e", "dead_actor", False),
        ("e~6", None, False),
    ]
    assert [c.build().n for c in closed] == [2, 3]
    assert closed[1].build().outcome.success


def test_a_dead_actors_episode_is_cut_and_kept() -> None:
    items = entries(batches(info("e"), (4, 4, 4)))
    (closed,) = feed(Assembler(SPEC), [*items[:2], CloseEntry("e", "dead_actor")])
    episode = closed.build()
    assert (ticks(closed), observed(closed)) == (list(range(7)), list(range(8)))
    assert episode.arrays["next.truncated"].tolist() == [False] * 6 + [True]
    assert (episode.outcome.success, episode.outcome.truncated_by) == (False, "dead_actor")


def test_the_rest_of_a_cut_episode_loses_no_tick() -> None:
    items = entries(batches(info("e"), (4, 4, 4)))
    closed = feed(Assembler(SPEC), [items[0], CloseEntry("e", "dead_actor"), *items[1:]])
    assert [c.info.episode_id for c in closed] == ["e", "e~3"]
    assert [c.ordinal for c in closed] == [0, 1]
    assert [ticks(c) for c in closed] == [[0, 1, 2], list(range(3, 12))]
    assert observed(closed[1]) == list(range(3, 13))
    assert not closed[1].whole


def test_a_cut_without_a_whole_tick_gets_no_ordinal() -> None:
    items = entries(batches(info("e"), (1, 4)))
    assembler = Assembler(SPEC)
    assert feed(assembler, [items[0], CloseEntry("e", "dead_actor")]) == []
    assert assembler.next_ordinal == 0
    (closed,) = feed(assembler, [items[1]])  # and when the rest comes, nothing is missing
    assert (ticks(closed), closed.whole) == ([0, 1, 2, 3, 4], True)


def test_closing_a_finished_episode_changes_nothing() -> None:
    items = entries(batches(info("e")))
    assert len(feed(Assembler(SPEC), [*items, CloseEntry("e", "dead_actor"), CloseEntry("x", "dead_actor")])) == 1


def test_contradictions_are_refused_and_never_join() -> None:
    assembler = Assembler(SPEC)
    items = entries(batches(info("e"), (3, 3, 3)))
    feed(assembler, items[:2])
    overlap = entry(replace(items[1].batch, first_tick=4), 10)
    with pytest.raises(Refused, match="tick 4"):
        assembler.check(overlap)
    other = entry(replace(items[2].batch, episode=info("e", mode="demo")), 11)
    with pytest.raises(Refused, match="expected"):
        assembler.check(other)
    assert feed(assembler, [overlap, other]) == []
    (closed,) = feed(assembler, items[2:])
    assert ticks(closed) == list(range(9))
    with pytest.raises(Refused, match="finished"):
        assembler.check(entry(items[2].batch, 12))
    assert assembler.dropped == 2


def _story() -> list[Entry]:
    dead, late = entries(batches(info("e1"), (4, 4, 4))), entries(batches(info("e2"), (2, 5)), 4)
    failed = entries(batches(info("e3", boot="b1"), (6,), success=False))
    return [dead[0], dead[0], late[0], dead[1], CloseEntry("e1", "dead_actor"), failed[0], failed[0], late[1], dead[2]]


def test_replaying_the_journal_gives_the_same_episodes(tmp_path: Path) -> None:
    live = feed(Assembler(SPEC), _story())
    write_journal(tmp_path, _story())
    replayed = list(journal_episodes(tmp_path, SPEC))
    assert [(c.ordinal, c.info.episode_id) for c in live] == [(0, "e1"), (1, "e3"), (2, "e2"), (3, "e1~7")]
    assert [ordinal for ordinal, _ in replayed] == [0, 1, 2, 3]
    for closed, (_, episode) in zip(live, replayed, strict=True):
        expected = closed.build()
        assert (episode.info, episode.outcome) == (expected.info, expected.outcome)
        for key, rows in expected.arrays.items():
            np.testing.assert_array_equal(episode.arrays[key], rows)
    assert [ordinal for ordinal, _ in journal_episodes(tmp_path, SPEC, start=2)] == [2, 3]
    written = [item for item in _story() if isinstance(item, DataEntry)]
    assert [(item.key, item.crc32) for item in journal_items(tmp_path, SPEC)] == [(w.key, w.crc32) for w in written]


def test_a_stream_follows(tmp_path: Path) -> None:
    stream = EpisodeStream(tmp_path, SPEC, follow=True)
    assert list(stream.poll()) == []
    writer, seen = open_writer(tmp_path / "journal"), []
    for item in _story():
        writer.append(item.payload(), lambda error, time_ns: None)
    writer.close()
    seen += [closed.info.episode_id for closed in stream.poll()]
    assert seen == ["e1", "e3", "e2", "e1~7"]
    assert stream.assembler.open == {}
    stream.close()


def test_another_spec_is_refused_by_field(tmp_path: Path) -> None:
    write_journal(tmp_path, [])
    other = TaskSpec.from_dict({**SPEC.to_dict(), "max_ticks": 80})
    with pytest.raises(SpecChangedError, match="max_ticks: 80 configured, 60 in the journal"):
        list(journal_episodes(tmp_path, other))


def test_a_record_of_an_unknown_form_is_named(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "journal")
    writer.append(b"not a blob", lambda error, time_ns: None)
    writer.close()
    with pytest.raises(JournalCorrupt, match="unknown form"):
        list(journal_episodes(tmp_path, SPEC))
