"""Processes that train together: each has its share, and all of them have what rank 0 said; over real gloo."""

import multiprocessing
import socket

import pytest

from serl_launcher.learner.ranks import FIRST_BYTES, Ranks

LONG = "x" * (3 * FIRST_BYTES)


def in_ranks(monkeypatch, world: int, act) -> dict[int, object]:
    """What `act(ranks)` returned in each of `world` processes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = []
    for rank in range(world):
        env = {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GROUP_RANK": 0}
        for key, value in env.items():
            monkeypatch.setenv(key, str(value))
        processes.append(context.Process(target=_act, args=(act, answers), daemon=True))
        processes[-1].start()
    found = dict(answers.get(timeout=60) for _ in range(world))
    for process in processes:
        process.join(30)
    return found


def _act(act, answers) -> None:
    ranks = Ranks.joined()
    try:
        answers.put((ranks.rank, act(ranks)))
    except RuntimeError as error:
        answers.put((ranks.rank, error.__class__.__name__))


def said_and_shared(ranks: Ranks):
    heard = [ranks.agree(said if ranks.first else None) for said in ({"step": 1}, LONG, None, [0.1, "ü"])]
    return heard, list(range(8))[ranks.share(8)], ranks.highest(10 - ranks.rank), ranks.first, ranks.world


def test_every_rank_has_what_rank_0_said_and_a_share_of_its_own(monkeypatch):
    found = in_ranks(monkeypatch, 2, said_and_shared)
    heard = [{"step": 1}, LONG, None, [0.1, "ü"]]
    assert found[0] == (heard, [0, 1, 2, 3], 10, True, 2)
    assert found[1] == (heard, [4, 5, 6, 7], 10, False, 2)


def one_goes(ranks: Ranks):
    if ranks.rank == 1:
        return "gone"
    for number in range(100):  # the first words may still find room on the way to it
        ranks.agree(number)
        ranks.highest(number)
    return "went on"


def test_a_rank_that_is_gone_is_noticed_by_the_others(monkeypatch):
    assert in_ranks(monkeypatch, 2, one_goes) == {0: "RuntimeError", 1: "gone"}


def test_one_process_agrees_with_itself(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    ranks = Ranks.joined()
    decision = {"anything": object()}
    assert ranks == Ranks.one()
    assert (ranks.agree(decision), ranks.share(7), ranks.highest(3)) == (decision, slice(0, 7), 3)


def test_a_batch_without_equal_shares_is_refused():
    with pytest.raises(ValueError, match="7 rows has no equal shares for 2 ranks"):
        Ranks(1, 2).share(7)
