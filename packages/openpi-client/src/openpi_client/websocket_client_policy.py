"""A policy that runs behind an openpi websocket server. Called by control loops on hosts without torch.

Protocol: on connecting the server sends its metadata; then each request is one packed observation and each reply one
packed answer. A text message is the server's error.
"""

import ipaddress
import ssl
from typing import Any

from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.sync.client import ClientConnection, connect

from openpi_client import msgpack_numpy
from openpi_client.base_policy import BasePolicy


class PolicyServerError(RuntimeError):
    """The policy server is not there, refused us, or failed while answering."""


class AccessDeniedError(PolicyServerError):
    """The policy server, or a proxy before it, does not accept our key."""


class AnswerError(PolicyServerError):
    """The policy server answered with an error, `reason`: a stock one with its traceback, and hangs up."""

    def __init__(self, uri: str, reason: str):
        super().__init__(f"the policy server at {uri} failed: {reason}")
        self.reason = reason


class WebsocketClientPolicy(BasePolicy):
    """Talks to one policy server; connects at once.

    Args:
        host: name or address, or a whole `ws://` or `wss://` address.
        port: TCP port; None when `host` is a whole address.
        api_key: sent as `Authorization: <auth_scheme> <key>`.
        timeout_s: bound on connecting and on each reply, seconds.
        max_bytes: largest reply accepted.
        ca_file: certificates (PEM) to trust for wss://; None: the system's.
        auth_scheme: Api-Key, as openpi's own client sends, or Bearer.
        connect_s: bound on connecting, seconds; None: timeout_s.

    Raises:
        PolicyServerError: naming the address and what to change; AccessDeniedError when the key is not accepted.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int | None = 8000,
        api_key: str | None = None,
        timeout_s: float = 10.0,
        max_bytes: int = 64 << 20,
        ca_file: str | None = None,
        auth_scheme: str = "Api-Key",
        connect_s: float | None = None,
    ):
        scheme_and_host = host if "://" in host else f"ws://{_bracketed(host)}"
        self.uri = scheme_and_host if port is None else f"{scheme_and_host}:{port}"
        self._timeout_s = timeout_s
        self._connect_s = timeout_s if connect_s is None else connect_s
        self._max_bytes = max_bytes
        self._headers = {"Authorization": f"{auth_scheme} {api_key}"} if api_key else None
        self._tls = ssl.create_default_context(cafile=ca_file) if self.uri.startswith("wss:") else None
        self._socket = self._connect()
        self.metadata = self._receive()  # what the server said about itself on connecting

    def infer(self, obs: dict[str, Any]) -> dict[str, Any]:
        """The server's answer; PolicyServerError when it fails, is gone or is silent."""
        try:
            self._socket.send(msgpack_numpy.packb(obs))
        except ConnectionClosed as error:
            raise PolicyServerError(f"the policy server at {self.uri} closed the connection: {error}") from error
        return self._receive()

    def close(self) -> None:
        """Close the connection; idempotent."""
        self._socket.close()

    def _connect(self) -> ClientConnection:
        try:
            return connect(
                self.uri,
                compression=None,
                max_size=self._max_bytes,
                open_timeout=self._connect_s,
                additional_headers=self._headers,
                ssl=self._tls,
            )
        except InvalidStatus as error:
            if error.response.status_code in (401, 403):
                raise AccessDeniedError(f"{self.uri} does not accept our key ({error})") from error
            raise PolicyServerError(
                f"no policy server at {self.uri} ({error}); is it one, and at that path?"
            ) from error
        except (OSError, InvalidHandshake, InvalidURI) as error:
            raise PolicyServerError(
                f"no policy server at {self.uri} ({error}); start it, or change host and port"
            ) from error

    def _receive(self) -> dict[str, Any]:
        try:
            reply = self._socket.recv(timeout=self._timeout_s)
        except TimeoutError as error:
            # A late reply would be taken for the answer to the next question.
            self._socket.close()
            raise PolicyServerError(f"no answer from {self.uri} within {self._timeout_s:g} s") from error
        except ConnectionClosed as error:
            raise PolicyServerError(f"the policy server at {self.uri} closed the connection: {error}") from error
        if isinstance(reply, str):
            raise AnswerError(self.uri, reply)
        try:
            answer = msgpack_numpy.unpackb(reply)
            if not isinstance(answer, dict):
                raise ValueError(f"expected a map, got {type(answer).__name__}")
            return answer
        except ValueError as error:
            raise PolicyServerError(f"{self.uri} does not speak the openpi protocol: {error}") from error


def _bracketed(host: str) -> str:
    """An IPv6 address in brackets, as a URI takes it; anything else as it is."""
    try:
        return f"[{host}]" if ipaddress.ip_address(host.partition("%")[0]).version == 6 else host
    except ValueError:
        return host
