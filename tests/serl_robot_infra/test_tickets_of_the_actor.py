"""The learner's replies to next_episode, well-formed and not."""

import pytest
from scripted_learner import ticket

from serl_robot_infra.link import Run, Stop, Wait, parse_ticket
from serl_transport.contract.errors import BadFrame


def test_the_three_kinds():
    assert parse_ticket(ticket("eval", 7)) == Run("eval-7", "eval", "stage-eval", 7, 0, True)
    assert parse_ticket({"action": "wait", "seconds": 2, "reason": "training"}) == Wait(2.0, "training")
    assert parse_ticket({"action": "stop", "reason": "done"}) == Stop("done")


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ({}, "lacks 'action'"),
        ({"action": "jump"}, "expected action run, wait or stop, got 'jump'"),
        ({"action": "wait"}, "lacks 'seconds'"),
        ({**ticket("eval", 7), "mode": "fun"}, "expected mode demo, online, eval, got 'fun'"),
    ],
)
def test_anything_else_is_refused(reply, message):
    with pytest.raises(BadFrame, match=message):
        parse_ticket(reply)
