"""The shared packer gives what a new one would, whatever failed before and whoever else packs."""

import threading

import msgpack
import pytest

from serl_transport.wire.packer import packb

VALUE = {"k": [1, -2.5, None, True, b"x" * 300, "é"], "nested": {"a": (1, 2)}}


@pytest.mark.parametrize("bad", [object(), 2**70, {"a": [1, object()]}, ["\ud800"]])
def test_a_value_without_a_form_leaves_nothing_behind(bad):
    with pytest.raises((TypeError, ValueError, OverflowError)):
        packb(bad)
    assert packb(VALUE) == msgpack.packb(VALUE)


def test_a_value_nested_in_itself_leaves_nothing_behind():
    endless = []
    endless.append(endless)
    with pytest.raises(ValueError, match="recursion"):
        packb(endless)
    assert packb(VALUE) == msgpack.packb(VALUE)


def test_threads_do_not_share_a_packer():
    wrong = []

    def work(number: int) -> None:
        value = {"n": number, "data": bytes([number]) * 5000}
        expected = msgpack.packb(value)
        wrong.extend(1 for _ in range(500) if packb(value) != expected)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
