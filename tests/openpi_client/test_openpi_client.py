"""The policy clients: broker, images, arrays in msgpack, websocket protocol against a real server."""

import threading

import msgpack
import numpy as np
import pytest
from websockets.sync.server import serve

from openpi_client import ActionChunkBroker, BasePolicy, msgpack_numpy
from openpi_client.image_tools import resize_with_pad
from openpi_client.websocket_client_policy import PolicyServerError, WebsocketClientPolicy


class Counting(BasePolicy):
    """Chunk k is [[10k, 10k], [10k + 1, ...], ...]."""

    def __init__(self, horizon):
        self.horizon, self.calls, self.resets = horizon, 0, 0

    def infer(self, obs):
        chunk = np.arange(self.horizon, dtype=np.float32)[:, None] + 10 * self.calls
        self.calls += 1
        return {"actions": np.repeat(chunk, 2, axis=1), "policy_version": self.calls}

    def reset(self):
        self.resets += 1


def test_broker_executes_its_horizon_then_asks_again():
    policy = Counting(8)
    broker = ActionChunkBroker(policy, 3)
    answers = [broker.infer({}) for _ in range(7)]
    assert [float(answer["actions"][0]) for answer in answers] == [0, 1, 2, 10, 11, 12, 20]
    assert answers[0]["actions"].shape == (2,)
    assert [answer["policy_version"] for answer in answers] == [1, 1, 1, 2, 2, 2, 3]
    assert policy.calls == 3
    plans = [answer["plan"][:, 0].tolist() if "plan" in answer else None for answer in answers]
    assert plans == [[*range(8)], None, None, [*range(10, 18)], None, None, [*range(20, 28)]]


def test_broker_drops_its_chunk():
    policy = Counting(8)
    broker = ActionChunkBroker(policy, 3)
    broker.infer({})
    broker.drop_chunk()
    assert float(broker.infer({})["actions"][0]) == 10
    assert policy.resets == 0
    broker.reset()
    assert policy.resets == 1
    assert float(broker.infer({})["actions"][0]) == 20


def test_broker_refuses_what_cannot_be_executed():
    with pytest.raises(ValueError, match="execute_horizon: expected at least 1, got 0"):
        ActionChunkBroker(Counting(8), 0)
    with pytest.raises(ValueError, match="execute_horizon=4 is longer than the chunk, 2 actions"):
        ActionChunkBroker(Counting(2), 4).infer({})


def test_resize_with_pad_keeps_the_shape_of_things():
    image = np.full((2, 10, 20, 3), 200, np.uint8)
    out = resize_with_pad(image, 8, 8)
    assert out.shape == (2, 8, 8, 3)
    assert out.dtype == np.uint8
    assert (out[:, 2:6] == 200).all()  # 20 x 10 becomes 8 x 4, centred
    assert (out[:, :2] == 0).all()
    assert (out[:, 6:] == 0).all()
    assert resize_with_pad(image, 10, 20) is image
    with pytest.raises(ValueError, match=r"expected images uint8\[..., h, w, 3\], got float32"):
        resize_with_pad(image.astype(np.float32), 8, 8)


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int64, np.float16, np.float32, np.float64])
def test_arrays_survive_msgpack(dtype):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    out = msgpack_numpy.unpackb(
        msgpack_numpy.packb({"a": [array, array[:, ::2]], "s": np.float32(2.5), "n": None, "t": "x"})
    )
    assert np.array_equal(out["a"][0], array)
    assert out["a"][0].dtype == array.dtype
    assert np.array_equal(out["a"][1], array[:, ::2])
    assert out["s"] == np.float32(2.5)
    assert (out["n"], out["t"]) == (None, "x")


def test_what_would_need_pickle_is_refused_both_ways():
    with pytest.raises(ValueError, match="dtype object"):
        msgpack_numpy.packb({"a": np.array([{}], dtype=object)})
    with pytest.raises(TypeError, match="cannot pack set"):
        msgpack_numpy.packb({"a": {1}})
    for name in ("|O", "V8", "<M8[s]", "2f4"):
        evil = msgpack.packb({b"__ndarray__": True, b"data": b"\0" * 8, b"dtype": name, b"shape": [1]})
        with pytest.raises(ValueError, match="dtype"):
            msgpack_numpy.unpackb(evil)
    short = msgpack.packb({b"__ndarray__": True, b"data": b"\0" * 7, b"dtype": "<f4", b"shape": [2]})
    with pytest.raises(ValueError, match="expected 8 bytes for float32"):
        msgpack_numpy.unpackb(short)


class Server:
    """A server of the openpi protocol on a free port; `answer(obs)` gives a dict, text, or None to hang up."""

    def __init__(self, answer, metadata=None):
        self.keys = []

        def handler(socket):
            self.keys.append(socket.request.headers.get("Authorization"))
            socket.send(msgpack_numpy.packb(metadata or {"name": "test"}))
            for message in socket:
                reply = answer(msgpack_numpy.unpackb(message))
                if reply is None:
                    return
                socket.send(reply if isinstance(reply, str) else msgpack_numpy.packb(reply))

        self._server = serve(handler, "127.0.0.1", 0, compression=None)
        self.port = self._server.socket.getsockname()[1]
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._thread.join()


def test_websocket_round_trip():
    def answer(obs):
        return {"actions": np.tile(obs["state"], (4, 1)), "server_timing": {"infer_ms": 1.0}}

    with Server(answer) as server:
        policy = WebsocketClientPolicy("127.0.0.1", server.port, api_key="secret")
        assert policy.metadata == {"name": "test"}
        state = np.float32([1, 2, 3])
        out = policy.infer({"state": state, "image": np.zeros((8, 8, 3), np.uint8), "prompt": "go"})
        assert np.array_equal(out["actions"], np.tile(state, (4, 1)))
        policy.close()
    assert server.keys == ["Api-Key secret"]


def test_a_server_that_is_not_there_is_named():
    with pytest.raises(PolicyServerError, match=r"no policy server at ws://127\.0\.0\.1:9 .*start it, or change"):
        WebsocketClientPolicy("127.0.0.1", 9, timeout_s=2)


def test_the_servers_own_error_and_a_hang_up_are_passed_on():
    with Server(lambda obs: "the model exploded") as server:
        policy = WebsocketClientPolicy(port=server.port)
        with pytest.raises(PolicyServerError, match="failed: the model exploded"):
            policy.infer({})
        policy.close()
    with Server(lambda obs: None) as server:
        policy = WebsocketClientPolicy(port=server.port)
        with pytest.raises(PolicyServerError, match="closed the connection"):
            policy.infer({})


def test_a_silent_server_is_not_waited_for_for_ever():
    release = threading.Event()
    with Server(lambda obs: release.wait(10) and {}) as server:
        policy = WebsocketClientPolicy(port=server.port, timeout_s=0.3)
        with pytest.raises(PolicyServerError, match=r"no answer .* within 0\.3 s"):
            policy.infer({})
        release.set()
