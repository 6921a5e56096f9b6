"""The tail of a message about an unknown name."""

import pytest

from serl_config.nearest import nearest

KEYS = ["port", "broadcast_port", "rollout.mode", "trainer.batch_size", "serving.max_batch"]


@pytest.mark.parametrize(
    ("name", "tail"),
    [
        ("prt", "; did you mean 'port'?"),
        ("rollout.mod", "; did you mean 'rollout.mode'?"),
        ("batch_size", "; did you mean 'trainer.batch_size'?"),  # by its last part, wherever it stands
        ("zzz", "; there are port, broadcast_port, rollout.mode, trainer.batch_size, serving.max_batch"),
    ],
)
def test_what_was_probably_meant(name, tail):
    assert nearest(name, KEYS) == tail


def test_long_lists_are_shown_where_asked_for():
    many = [f"task-{letter}" for letter in "abcdefghijklmnop"]
    assert nearest("zzz", many) == ""
    assert nearest("zzz", many, show=16) == "; there are " + ", ".join(many)
    assert nearest("task-z", many).count("task-") == 3
