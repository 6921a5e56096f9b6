"""GR00T's inference protocol from a control loop on a host without torch: one ZMQ REQ socket to one policy server.

    call(endpoint, data) ─▶ request ─▶ server ─▶ answer      no answer in time, or the connection breaks: a new socket

A REQ socket that waits for a lost answer can never ask again, so it is thrown away; the socket's monitor tells of a
server that dies while it is asked, long before the timeout.
"""

from typing import Any

import zmq

from openpi_client.groot_wire import ModalityConfig, packb, unpackb
from openpi_client.websocket_client_policy import AccessDeniedError, AnswerError, PolicyServerError
from serl_transport.connection.reach import bracketed, obstacle

UNAUTHORIZED = "Unauthorized"  # what the stock server's refusal of a token begins with
_MAX_BYTES = 64 << 20  # of an answer
_BROKEN = zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL


class GrootClient:
    """Asks one server; connects at once.

    Args:
        host: name or address.
        port: TCP port; 5555 is the stock one.
        api_token: sent in each request.
        timeout_s: for each answer, seconds.

    Raises:
        PolicyServerError: naming the address and why nothing can be had there, within seconds.
    """

    def __init__(self, host: str, port: int, api_token: str | None = None, timeout_s: float = 10.0) -> None:
        self.uri = f"tcp://{bracketed(host)}:{port}"
        self._host, self._port, self._token, self._timeout_s = host, port, api_token, timeout_s
        self._socket: zmq.Socket | None = None
        self._connect()

    def call(self, endpoint: str, data: dict[str, Any] | None = None, timeout_s: float | None = None) -> Any:
        """The server's answer to `endpoint`. PolicyServerError when it is silent, gone or no such server, AnswerError
        with its own words when it fails, AccessDeniedError when it does not accept the token."""
        request = {"endpoint": endpoint} | ({} if data is None else {"data": data})
        request |= {"api_token": self._token} if self._token else {}
        try:
            answer = self._ask(packb(request), self._timeout_s if timeout_s is None else timeout_s)
        except PolicyServerError:
            self.close()
            raise
        if isinstance(answer, dict) and "error" in answer:
            reason = str(answer["error"])
            if reason.startswith(UNAUTHORIZED):
                raise AccessDeniedError(f"{self.uri} does not accept our token ({reason})")
            raise AnswerError(self.uri, reason)
        return answer

    def modality_configs(self, timeout_s: float | None = None) -> dict[str, ModalityConfig]:
        """What the policy reads and gives, by modality. AnswerError for a server that does not say."""
        answer = self.call("get_modality_config", timeout_s=timeout_s)
        configs = answer if isinstance(answer, dict) else {}
        missing = [name for name in ("video", "state", "action") if not isinstance(configs.get(name), ModalityConfig)]
        if missing:
            raise AnswerError(self.uri, f"it does not say which keys of {missing[0]} its policy has")
        return {name: config for name, config in configs.items() if isinstance(config, ModalityConfig)}

    def close(self) -> None:
        """Hang up; idempotent, the next call connects again."""
        if self._socket is not None:
            self._socket.disable_monitor()
            for socket in (self._monitor, self._socket):
                socket.close(linger=0)
            self._socket = None

    def _connect(self) -> None:
        if why := obstacle(self._host, self._port):
            raise PolicyServerError(f"no GR00T policy server at {self.uri}: {why}")
        # The process's context: one of its own would wait for its sockets when both are garbage.
        socket = self._socket = zmq.Context.instance().socket(zmq.REQ)
        for option, value in {zmq.LINGER: 0, zmq.MAXMSGSIZE: _MAX_BYTES, zmq.IPV6: 1}.items():
            socket.setsockopt(option, value)
        self._monitor = socket.get_monitor_socket(_BROKEN)
        socket.connect(self.uri)

    def _ask(self, request: bytes, seconds: float) -> Any:
        if self._socket is None:
            self._connect()
        elif self._monitor.poll(0):  # who is there now may serve another policy: the caller looks again
            raise PolicyServerError(f"the policy server at {self.uri} closed the connection since its last answer")
        assert self._socket is not None
        self._socket.send(request)
        poller = zmq.Poller()
        for socket in (self._socket, self._monitor):
            poller.register(socket, zmq.POLLIN)
        ready = dict(poller.poll(seconds * 1e3))
        if self._socket not in ready:
            told = "closed the connection" if ready else f"gave no answer within {seconds:g} s"
            raise PolicyServerError(f"the policy server at {self.uri} {told}")
        try:
            return unpackb(self._socket.recv())
        except ValueError as error:
            raise PolicyServerError(f"{self.uri} does not speak GR00T's protocol: {error}") from None
