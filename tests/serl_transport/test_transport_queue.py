"""How much the kernel may queue on a connection: little to this host, its own choice to others."""

import numpy as np
import pytest
import zmq

from serl_transport.security import auth

WAIT = 60.0


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        ("tcp://127.0.0.1:5588", auth.LOCAL_SEND_BYTES),
        ("tcp://localhost:5588", auth.LOCAL_SEND_BYTES),
        ("tcp://[::1]:5588", auth.LOCAL_SEND_BYTES),
        ("tcp://198.51.100.7:5588", -1),
        ("tcp://[2001:db8::1]:5588", -1),
        ("tcp://learner.example:5588", -1),
    ],
)
def test_only_the_queue_to_this_host_is_short(endpoint, expected):
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        auth.shorten_queue(socket, endpoint)
        assert socket.getsockopt(zmq.SNDBUF) == expected


def test_items_much_larger_than_the_queue_arrive_whole(serve, connect):
    rng = np.random.default_rng(0)
    sent = [rng.integers(0, 256, (3, 4 * auth.LOCAL_SEND_BYTES), np.uint8) for _ in range(6)]
    got = {}
    server = serve(handlers={"data": lambda peer, envelope, body: got.update({body["i"]: body["x"].copy()}) or {}})
    client = connect(server)
    assert client._data._socket.getsockopt(zmq.SNDBUF) == auth.LOCAL_SEND_BYTES
    for i, x in enumerate(sent):
        client.send_item({"i": i, "x": x})
    assert client.flush(WAIT)
    assert sorted(got) == list(range(6))
    for i, x in enumerate(sent):
        np.testing.assert_array_equal(got[i], x)
