"""Tickets: evaluation seeds once each and again when lost, training seeds never in the evaluation range."""

from __future__ import annotations

from serl_launcher.gateway.seal import Seal
from serl_launcher.gateway.tickets import HELD, ScopeCounts, Ticket, TicketOffice, training_seed
from serl_launcher.run.schedule import Stage

EVAL = Stage("before", "eval", episodes=3, takeover=False)
DEMO = Stage("demos", "demo", episodes=2)
ONLINE = Stage("online", "online", steps=100)
SCOPE = ("s",)


class Desk:
    """A ticket office with a settable clock and set of live actors."""

    def __init__(self, seed: int = 0) -> None:
        self.alive = {"a", "b"}
        self.office = TicketOffice(seed, 10.0, lambda actor, boot: actor in self.alive, Seal(b"s" * 32, False))
        self.now = 0.0

    def ask(self, stage: Stage, actor: str = "a", counted: int = 0, seeds=frozenset()) -> dict:
        return self.office.issue(stage, SCOPE, ScopeCounts(counted, seeds), actor, "b0", 0, self.now)


def test_eval_seeds_go_out_once_each() -> None:
    desk = Desk()
    tickets = [desk.ask(EVAL, actor) for actor in ("a", "b", "a")]
    assert [ticket["seed"] for ticket in tickets] == [1_000_000, 1_000_001, 1_000_002]
    assert len({ticket["episode_id"] for ticket in tickets}) == 3
    assert desk.ask(EVAL, "b")["action"] == "wait"
    assert tickets[0]["takeover"] is False


def test_a_finished_seed_is_not_issued_again() -> None:
    desk = Desk()
    first = desk.ask(EVAL)
    desk.office.finish(first["episode_id"])
    assert desk.ask(EVAL, counted=1, seeds={1_000_000})["seed"] == 1_000_001


def test_a_dead_actors_seed_is_issued_again() -> None:
    desk = Desk()
    lost = [desk.ask(EVAL, "b"), desk.ask(EVAL, "a"), desk.ask(EVAL, "a")][0]
    assert desk.ask(EVAL)["action"] == "wait"
    desk.alive.discard("b")
    again = desk.ask(EVAL)
    assert again["seed"] == lost["seed"]
    assert again["episode_id"] != lost["episode_id"]


def test_an_abandoned_ticket_is_issued_again_after_the_grace() -> None:
    desk = Desk()
    for _ in range(3):
        desk.ask(EVAL)
    assert desk.ask(EVAL)["action"] == "wait"  # all three were given back; their data may still come
    desk.now = 11.0
    assert desk.ask(EVAL)["seed"] == 1_000_000


def test_no_more_demonstrations_than_needed() -> None:
    desk = Desk()
    first = desk.ask(DEMO, "a")
    assert desk.ask(DEMO, "b")["action"] == "run"
    assert desk.ask(DEMO, "a")["action"] == "wait"  # two are on their way
    desk.office.finish(first["episode_id"])  # it failed: still two to go, one on its way
    assert desk.ask(DEMO, "a", counted=0)["action"] == "run"


def test_a_stage_that_waits_for_steps_goes_on() -> None:
    desk = Desk()
    for _ in range(50):
        ticket = desk.ask(ONLINE)
        assert ticket["action"] == "run"
        desk.office.finish(ticket["episode_id"])


def test_an_actor_that_makes_none_of_its_episodes_waits_and_the_others_do_not() -> None:
    desk = Desk()
    assert {desk.ask(ONLINE)["action"] for _ in range(HELD)} == {"run"}
    assert desk.ask(ONLINE) == {"action": "wait", "seconds": 0.2, "reason": "16 episodes of a are awaited already"}
    assert desk.ask(ONLINE, "b")["action"] == "run"
    desk.now = 11.0
    assert desk.ask(ONLINE)["action"] == "run"  # those that were given back long ago are not awaited any more


def test_training_seeds_are_reproducible_and_below_the_evaluation_range() -> None:
    seeds = [training_seed(3, "online", index) for index in range(2000)]
    assert seeds == [training_seed(3, "online", index) for index in range(2000)]
    assert max(seeds) < 1_000_000
    assert len(set(seeds)) > 1990
    assert training_seed(3, "demos", 0) != seeds[0]
    assert training_seed(4, "online", 0) != seeds[0]
    desk = Desk(seed=3)
    assert [desk.ask(ONLINE)["seed"] for _ in range(5)] == seeds[:5]


def test_a_restart_draws_new_seeds_and_knows_what_is_open() -> None:
    desk = Desk(seed=3)
    desk.office.skip_seeds("online", 4)
    assert desk.ask(ONLINE)["seed"] == training_seed(3, "online", 4)
    desk.office.restore(Ticket("x", SCOPE, 1_000_000, "a", "b0"))
    assert desk.ask(EVAL, "b")["seed"] == 1_000_001


def test_a_late_part_finishes_its_ticket() -> None:
    desk = Desk()
    ticket = desk.ask(EVAL)
    desk.office.finish(ticket["episode_id"] + "~7")
    assert desk.ask(EVAL)["seed"] == ticket["seed"]  # nobody holds it any more
