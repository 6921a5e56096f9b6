"""GR00T's ZMQ protocol as its stock clients and servers speak it, written from the wire format alone.

Independent of our packers on purpose: what these understand, Isaac-GR00T's own understand (of N1.6 and N1.7
gr00t/policy/server_client.py, of N1.5 gr00t/eval/service.py; the package is on no registry).

    array     {"__ndarray_class__": True, "as_npy": np.save's bytes}
    modality  {"__ModalityConfig_class__": True, "as_json": a dict, in N1.5 a JSON text}
    client    REQ: {"endpoint", "data", "api_token"}; server: REP, which works on one message at a time
"""

import io
import json
import sys

import msgpack
import numpy as np
import zmq


class Modality:
    """As theirs: keyword arguments are its fields."""

    def __init__(self, delta_indices, modality_keys, as_text=False, **others):
        self.delta_indices, self.modality_keys, self.as_text = delta_indices, modality_keys, as_text


def encode(value):
    if isinstance(value, np.ndarray):
        out = io.BytesIO()
        np.save(out, value, allow_pickle=False)
        return {"__ndarray_class__": True, "as_npy": out.getvalue()}
    if isinstance(value, Modality):
        content = {"delta_indices": value.delta_indices, "modality_keys": value.modality_keys}
        content |= {"sin_cos_embedding_keys": None, "action_configs": None}
        return {"__ModalityConfig_class__": True, "as_json": json.dumps(content) if value.as_text else content}
    return value


def decode(value):
    if "__ModalityConfig_class__" in value:
        content = value["as_json"]
        return Modality(**(json.loads(content) if isinstance(content, str) else content))
    if "__ndarray_class__" in value:
        return np.load(io.BytesIO(value["as_npy"]), allow_pickle=False)
    return value


def pack(body):
    return msgpack.packb(body, default=encode)


def unpack(data):
    return msgpack.unpackb(data, object_hook=decode)


class StockClient:
    """Their `PolicyClient` and N1.5's `ExternalRobotInferenceClient`: the one asks get_action with named arguments."""

    def __init__(self, port, api_token=None):
        self.context, self.api_token = zmq.Context(), api_token
        self.socket = self.context.socket(zmq.REQ)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(f"tcp://localhost:{port}")

    def call(self, endpoint, data=None):
        request = {"endpoint": endpoint} | ({} if data is None else {"data": data})
        self.socket.send(pack(request | ({"api_token": self.api_token} if self.api_token else {})))
        return self.receive()

    def receive(self):
        assert self.socket.poll(20_000), "the server is silent"
        response = unpack(self.socket.recv())
        if isinstance(response, dict) and "error" in response:
            raise RuntimeError(f"Server error: {response['error']}")
        return response

    def get_action(self, observation, options=None):
        """N1.6 and later."""
        return tuple(self.call("get_action", {"observation": observation, "options": options}))

    def get_action_n1_5(self, observations):
        return self.call("get_action", observations)

    def close(self):
        self.context.destroy(linger=0)


def check(observation, options):
    """What the stock policies insist on, AssertionError otherwise; the shapes that came."""
    parts, n1_5 = options["state"], options["n1_5"]
    if n1_5:
        observation = {
            "video": {k.removeprefix("video."): v[None] for k, v in observation.items() if k.startswith("video.")},
            "state": {k.removeprefix("state."): v[None] for k, v in observation.items() if k.startswith("state.")},
            "language": {k: [v] for k, v in observation.items() if k.startswith("annotation.")},
        }
    for camera in options["video"]:
        picture = observation["video"][camera]
        assert (picture.dtype, picture.ndim, picture.shape[:2]) == (np.uint8, 5, (1, 1)), picture.shape
    for part, dims in parts.items():
        state = observation["state"][part]
        assert (state.dtype, state.shape) == (np.float32, (1, 1, dims)), state.shape
    (text,) = observation["language"][options["language"]]
    assert [type(one) for one in text] == [str]
    return {name: {key: getattr(x, "shape", x) for key, x in entries.items()} for name, entries in observation.items()}


def main(options):
    """A server as a process: prints its port, then a JSON line for each observation.

    video: its cameras; state and action: part -> dims; language: its key; n1_5: generation; value: of every action;
    ticks: of a chunk; token; fail: get_action raises; deltas: of its state.
    """
    socket = zmq.Context().socket(zmq.REP)
    socket.bind(f"tcp://127.0.0.1:{options.get('port') or '*'}")
    print(socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2], flush=True)
    n1_5 = options["n1_5"]
    before = {name: f"{name}." if n1_5 else "" for name in ("video", "state", "action")}
    configs = {name: Modality([0], [before[name] + key for key in options[name]], n1_5) for name in before}
    configs["state"].delta_indices = options.get("deltas", [0])
    configs["language"] = Modality([0], [options["language"]], n1_5)
    while True:
        request = unpack(socket.recv())
        try:
            if options.get("token") and request.get("api_token") != options["token"]:
                socket.send(pack({"error": "Unauthorized: Invalid API token"}))
                continue
            endpoint = request.get("endpoint", "get_action")
            if endpoint == "get_modality_config":
                socket.send(pack(configs))
                continue
            if endpoint == "reset":
                print(json.dumps("reset"), flush=True)
                socket.send(pack({}))
                continue
            if endpoint != "get_action":
                raise ValueError(f"Unknown endpoint: {endpoint}")
            if options.get("fail"):
                raise KeyError(options["fail"])
            data = request["data"]
            print(json.dumps(check(data if n1_5 else data["observation"], options)), flush=True)
            shape = () if n1_5 else (1,)
            actions = {
                f"action.{part}" if n1_5 else part: np.full((*shape, options.get("ticks", 8), dims), options["value"])
                for part, dims in options["action"].items()
            }
            if n1_5:  # it squeezes what has one dim
                actions = {key: np.squeeze(x) for key, x in actions.items()}
            socket.send(pack(actions if n1_5 else (actions, {})))
        except Exception as error:
            socket.send(pack({"error": str(error)}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
