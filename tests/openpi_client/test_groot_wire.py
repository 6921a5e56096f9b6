"""GR00T's messages: ours and the stock serializer's are the same, and a stranger's bytes cost no more than they are."""

import gc
import io
import threading
import time

import msgpack
import numpy as np
import pytest
import stock_groot
import zmq

from openpi_client import groot_wire
from openpi_client.groot_client import GrootClient
from openpi_client.websocket_client_policy import PolicyServerError

ARRAYS = [
    np.arange(24, dtype=np.uint8).reshape(1, 2, 4, 3),
    np.float32([[[0.5, -1.0]]]),
    np.zeros((0, 3), np.int64),
    np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    np.array([True, False]),
    np.float64(3.5)[None],
    np.array(2.5),
]


@pytest.mark.parametrize("array", ARRAYS, ids=str)
def test_arrays_are_those_of_the_stock_serializer(array):
    for sent, read in ((groot_wire.packb, stock_groot.unpack), (stock_groot.pack, groot_wire.unpackb)):
        got = read(sent({"a": array, "n": [1, None, "x"]}))
        np.testing.assert_array_equal(got["a"], array)
        assert (got["a"].dtype, got["a"].shape, got["n"]) == (array.dtype, array.shape, [1, None, "x"])


def test_arrays_of_texts_and_modality_configs():
    assert groot_wire.unpackb(stock_groot.pack({"t": np.array([["pick up"], ["lift"]])}))["t"] == [
        ["pick up"],
        ["lift"],
    ]
    for as_text in (False, True):
        config = groot_wire.unpackb(stock_groot.pack(stock_groot.Modality([0, 1], ["front"], as_text)))
        assert config == groot_wire.ModalityConfig([0, 1], ["front"], as_text)
        back = stock_groot.unpack(groot_wire.packb(config))
        assert (back.delta_indices, back.modality_keys) == ([0, 1], ["front"])


def npy(descr="<f4", shape="(1,)", data=b"\0" * 4, version=1, order="False"):
    header = f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + bytes([version, 0]) + len(header).to_bytes(2 if version == 1 else 4, "little") + header + data


def as_array(raw):
    return msgpack.packb({"a": {"__ndarray_class__": True, "as_npy": raw}})


def pickled():
    out = io.BytesIO()
    np.save(out, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return out.getvalue()


HOSTILE = {
    "objects, pickled": as_array(pickled()),
    "a shape of terabytes": as_array(npy(shape="(1000000, 1000000)")),
    "code in the header": as_array(npy(shape="(__import__('os').getpid(),)")),
    "brackets without end": as_array(npy(shape="(" * 900)),
    "a long header": as_array(npy(shape="(" + "1, " * 2000 + ")")),
    "many dims": as_array(npy(shape="(" + "1, " * 40 + ")")),
    "too few bytes": as_array(npy(data=b"\0")),
    "fields": as_array(npy(descr="f4,f4")),
    "no dtype": as_array(npy(descr="<f3")),
    "a text of no width": as_array(npy(descr="<U0", data=b"")),
    "a million texts": as_array(npy(descr="<U1", shape="(1000000,)", data=b"\0" * 4_000_000)),
    "no characters": as_array(npy(descr="<U1", data=b"\xff" * 4)),
    "no file": as_array(b"x" * 20),
    "no bytes": msgpack.packb({"__ndarray_class__": True, "as_npy": 7}),
    "nothing in it": msgpack.packb({"__ndarray_class__": True}),
    "a config of nothing": msgpack.packb({"__ModalityConfig_class__": True, "as_json": {"delta_indices": "x"}}),
    "a config of broken text": msgpack.packb({"__ModalityConfig_class__": True, "as_json": "[" * 100_000}),
    "a million maps": b"\x81\xa1a\xdd" + (1_000_000).to_bytes(4, "big") + b"\x80" * 1_000_000,
    "a million arrays of nothing": b"\x81\xa1a\xdc\xff\xff" + as_array(npy(shape="(0,)", data=b""))[3:] * 65535,
    "depth": b"\x91" * 5000,
    "extensions": msgpack.packb({"a": msgpack.ExtType(1, b"x")}),
    "other bytes": b"\xc1" * 50,
    "nothing": b"",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_messages_are_refused_in_a_line(name):
    began = time.monotonic()
    with pytest.raises(ValueError) as refusal:
        groot_wire.unpackb(HOSTILE[name])
    assert time.monotonic() - began < 1
    assert "\n" not in str(refusal.value)


def test_seeded_noise_is_decoded_or_refused_and_never_anything_else():
    rng = np.random.default_rng(20261130)
    good = stock_groot.pack({"endpoint": "get_action", "data": {"a": ARRAYS[1], "c": stock_groot.Modality([0], ["x"])}})
    for _ in range(2000):
        damaged = bytearray(good)
        for position in rng.integers(0, len(damaged), rng.integers(1, 6)):
            damaged[position] = rng.integers(0, 256)
        try:
            groot_wire.unpackb(bytes(damaged[: rng.integers(0, len(damaged) + 1)]))
        except ValueError:
            continue


class Script:
    """A REP socket that answers with what the list holds: bytes, or None for silence for good."""

    def __init__(self, *answers):
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.REP)
        self.port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self._answers, self.asked = list(answers), []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self):
        try:
            for answer in self._answers:
                self.asked.append(stock_groot.unpack(self._socket.recv()))
                if answer is None:
                    break
                self._socket.send(answer)
            self._socket.poll(20_000)
        except zmq.ContextTerminated:
            pass
        finally:
            self._socket.close(linger=0)

    def close(self):
        self._context.term()
        self._thread.join()


def test_a_silent_server_is_told_in_time_and_the_next_question_has_a_socket_of_its_own():
    server = Script(stock_groot.pack({"status": "ok"}), None)
    client = GrootClient("127.0.0.1", server.port, timeout_s=0.3)
    assert client.call("ping") == {"status": "ok"}
    began = time.monotonic()
    with pytest.raises(PolicyServerError, match=r"gave no answer within 0\.3 s"):
        client.call("ping")
    assert time.monotonic() - began < 2
    server.close()
    again = Script()
    with pytest.raises(PolicyServerError, match=r"no GR00T policy server at tcp://.*: nothing listens on port"):
        client.call("ping")  # the first server's port is free again: said at once
    again.close()
    client.close()


def test_a_server_that_dies_while_it_is_asked_is_told_at_once():
    server = Script(stock_groot.pack({}), None)
    client = GrootClient("127.0.0.1", server.port, timeout_s=20)
    client.call("ping")
    threading.Timer(0.3, server.close).start()
    began = time.monotonic()
    with pytest.raises(PolicyServerError, match="closed the connection"):
        client.call("get_action", {})
    assert time.monotonic() - began < 5
    client.close()


def test_a_client_that_is_forgotten_holds_nothing_up():
    """As one is whose server is refused: the collector meets its sockets in any order."""
    server = Script()
    client = GrootClient("127.0.0.1", server.port)
    client.itself = client
    del client
    began = time.monotonic()
    gc.collect()
    assert time.monotonic() - began < 5
    server.close()


def test_what_does_not_speak_the_protocol_is_told():
    server = Script(b"\xc1\xc1")
    client = GrootClient("127.0.0.1", server.port)
    with pytest.raises(PolicyServerError, match=r"does not speak GR00T's protocol: not msgpack"):
        client.call("ping")
    server.close()
    client.close()
