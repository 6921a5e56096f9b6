"""openpi's websocket protocol as its stock client and server speak it, written from the wire format alone.

Independent of our packers on purpose: what these two understand, openpi's own understand.

    array    {b"__ndarray__": True, b"data": bytes, b"dtype": "<f4", b"shape": [2, 3]}
    scalar   {b"__npgeneric__": True, b"data": 1.5, b"dtype": "<f4"}
    client   connects without compression and without a size limit, header `Authorization: Api-Key <key>`
    server   sends its metadata, then one binary answer an observation; on failure the traceback as text, and closes
"""

import http
import json
import sys
import threading
import traceback

import msgpack
import numpy as np
from websockets.sync.client import connect
from websockets.sync.server import serve


def encode(value):
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(type(value))


def decode(value):
    if b"__ndarray__" in value:
        return np.ndarray(buffer=value[b"data"], dtype=np.dtype(value[b"dtype"]), shape=value[b"shape"])
    if b"__npgeneric__" in value:
        return np.dtype(value[b"dtype"]).type(value[b"data"])
    return value


def pack(body):
    return msgpack.packb(body, default=encode)


def unpack(data):
    return msgpack.unpackb(data, object_hook=decode)


class StockClient:
    """As a robot script uses it."""

    def __init__(self, port, api_key=None):
        headers = {"Authorization": f"Api-Key {api_key}"} if api_key else None
        self.socket = connect(
            f"ws://127.0.0.1:{port}", compression=None, max_size=None, additional_headers=headers, open_timeout=10
        )
        self.metadata = unpack(self.socket.recv(timeout=10))

    def infer(self, observation):
        self.socket.send(pack(observation))
        reply = self.socket.recv(timeout=20)
        if isinstance(reply, str):
            raise RuntimeError(f"Error in inference server:\n{reply}")
        return unpack(reply)


class StockServer:
    """Serves `answer(observation) -> dict`; context manager with `port`. authorization: what a proxy wants."""

    def __init__(self, answer, metadata, port=0, authorization=None):
        self._answer, self._metadata, self._authorization = answer, metadata, authorization
        self._server = serve(
            self._serve, "127.0.0.1", port, compression=None, max_size=None, process_request=self._admit
        )
        self.port = self._server.socket.getsockname()[1]
        self._thread = threading.Thread(target=self._server.serve_forever)

    def _admit(self, socket, request):
        if request.path == "/healthz":
            return socket.respond(http.HTTPStatus.OK, "OK\n")
        if self._authorization and request.headers.get("Authorization") != self._authorization:
            return socket.respond(http.HTTPStatus.UNAUTHORIZED, "who are you\n")
        return None

    def _serve(self, socket):
        socket.send(pack(self._metadata))
        for message in socket:
            try:
                socket.send(pack({**self._answer(unpack(message)), "server_timing": {"infer_ms": 1.0}}))
            except Exception:
                socket.send(traceback.format_exc())
                socket.close(1011, "Internal server error. Traceback included in previous frame.")

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._thread.join()


def main(options):
    """A server as a process: prints its port, then a JSON line for each observation, the keys and what they hold.

    wants: the keys of an observation that it cannot do without; action: one action; ticks: actions in a chunk.
    """

    def answer(observation):
        for key in options["wants"]:
            observation[key]
        seen = {k: list(v.shape) if isinstance(v, np.ndarray) else v for k, v in observation.items()}
        print(json.dumps(seen, default=str), flush=True)
        return {"actions": np.tile(np.array(options["action"]), (options.get("ticks", 8), 1))}  # float64, as stock ones

    server = StockServer(answer, options.get("metadata", {}), options.get("port", 0), options.get("authorization"))
    print(server.port, flush=True)
    with server:
        threading.Event().wait()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
