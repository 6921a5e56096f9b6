"""The openpi websocket protocol in front of our policy server: a stock openpi client gets actions from this run.

Started by the supervisor as `python -m serl_launcher.serving.openpi_server <run_dir>` when `serving.openpi_port` is
set. Torch-free; it hands each observation to the gateway, so clients share the policy server's batches.

    client ─▶ handshake (token) ─▶ metadata ─▶ { observation ─▶ gateway ─▶ policy server ─▶ answer } …
    GET /healthz ─▶ 200 OK

Protocol: binary messages are msgpack with arrays as openpi packs them; a text message is an error, in words for people
and never a traceback, after which the next observation may follow. A message that is no such msgpack closes the
connection. Dtypes that would need pickle are refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import http
import logging
import signal
import ssl
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from websockets.asyncio.server import Request, Response, Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode

from openpi_client import msgpack_numpy
from serl_config.secrets import check_private, secret
from serl_launcher.run.alive import beat
from serl_launcher.run.config import read_config, task_spec
from serl_launcher.run.files import read_json
from serl_launcher.run.paths import RunPaths
from serl_launcher.run.ready import say_ready
from serl_launcher.serving.gateway_client import GatewayClient
from serl_launcher.serving.openpi_keys import infer_body, largest_message
from serl_transport.contract.errors import WireError
from serl_transport.contract.specs import TaskSpec
from serl_transport.security.auth import is_loopback, raise_file_limit

log = logging.getLogger("openpi")
HANDSHAKE_S, CLOSE_S, IDLE_PING_S, BEAT_S = 10.0, 2.0, 20.0, 0.5


@dataclass(frozen=True, slots=True)
class OpenpiSettings:
    """`serving.openpi_*` of the config, checked."""

    host: str
    port: int  # 0: any free one
    token: str | None = field(repr=False)  # bearer token; None: everyone who reaches the port
    tls: tuple[str, str] | None  # certificate chain and key files
    max_bytes: int  # of one message
    max_clients: int
    timeout_s: float  # for one answer
    keys: dict[str, str]  # camera or "state" -> key in the client's observations

    @staticmethod
    def of(cfg: DictConfig) -> OpenpiSettings:
        """Raises ValueError in the user's words."""
        serving = cfg.serving
        cert, key = serving.openpi_tls_cert, serving.openpi_tls_key
        if (cert is None) != (key is None):
            raise ValueError("serving.openpi_tls_cert and serving.openpi_tls_key: expected both or none")
        for name, path in (("cert", cert), ("key", key)):
            if path is not None and not Path(path).is_file():
                raise ValueError(f"serving.openpi_tls_{name}: no file {path}")
        if key is not None:
            check_private(Path(key), "serving.openpi_tls_key", others=0o007)
        token = secret(serving.openpi_token, "serving.openpi_token")
        if token is not None and not token.isascii():
            raise ValueError("serving.openpi_token: expected ASCII characters, as HTTP headers take them")
        if token is None and not is_loopback(serving.openpi_host) and not cfg.insecure:
            raise ValueError(
                f"serving.openpi_host={serving.openpi_host} lets anyone on that network ask the policy; "
                "set serving.openpi_token, or insecure=true if that network is yours alone"
            )
        known = {*cfg.task.spec.cameras, "state"}
        spec = task_spec(cfg)
        keys = {str(k): str(v) for k, v in (serving.openpi_keys or {}).items()}
        if unknown := sorted(set(keys) - known):
            raise ValueError(f"serving.openpi_keys.{unknown[0]}: expected one of {', '.join(sorted(known))}")
        return OpenpiSettings(
            host=serving.openpi_host,
            port=serving.openpi_port,
            token=token,
            tls=None if cert is None else (cert, key),
            max_bytes=largest_message("serving.openpi_max_mb", serving.openpi_max_mb, spec),
            max_clients=serving.openpi_max_clients,
            timeout_s=serving.openpi_timeout_s,
            keys=keys,
        )


class OpenpiServer:
    """Serves one run."""

    def __init__(self, settings: OpenpiSettings, spec: TaskSpec, run: str, paths: RunPaths) -> None:
        self._settings, self._spec, self._run, self._paths = settings, spec, run, paths
        self._clients = 0
        self._gateway: GatewayClient | None = None

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[Server]:
        """Serve clients in here. Raises OSError for a port that cannot be had, ValueError for certificates that do not
        fit."""
        settings = self._settings
        context = None
        if settings.tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            try:
                context.load_cert_chain(*settings.tls)
            except ssl.SSLError as error:
                raise ValueError(f"serving.openpi_tls_cert and _key do not fit: {error.reason}") from None
        options = {"open_timeout": HANDSHAKE_S, "close_timeout": CLOSE_S, "ping_interval": IDLE_PING_S}
        # max_queue: a client that asks faster than it is answered is slowed down by its socket.
        options |= {"max_size": settings.max_bytes, "max_queue": 1, "compression": None}
        self._gateway = GatewayClient(self._paths.root)
        try:
            async with serve(
                self._serve_client, settings.host, settings.port, ssl=context, process_request=self._admit, **options
            ) as server:
                yield server
        finally:
            self._gateway.close()

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        """Before the handshake: health, token, number of clients."""
        if request.path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if not self._token_fits(request.headers.get_all("Authorization")):
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, "expected Authorization: Bearer <token>\n")
        if self._clients >= self._settings.max_clients:
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "too many clients\n")
        return None

    def _token_fits(self, headers: list[str]) -> bool:
        """`Bearer <token>`, or `Api-Key <token>` as the stock client sends it; compared in constant time."""
        if self._settings.token is None:
            return True
        scheme, _, given = headers[0].partition(" ") if len(headers) == 1 else ("", "", "")
        same = hmac.compare_digest(given.strip().encode(), self._settings.token.encode())
        return same and scheme.lower() in ("bearer", "api-key")

    async def _serve_client(self, socket: ServerConnection) -> None:
        if self._clients >= self._settings.max_clients:  # they came at once, all admitted before the first was counted
            await socket.close(CloseCode.TRY_AGAIN_LATER, "too many clients")
            return
        self._clients += 1
        name = f"openpi-{socket.remote_address[0]}:{socket.remote_address[1]}"
        log.info("%s connected", name)
        try:
            await socket.send(msgpack_numpy.packb(self._metadata()))
            total_ms = None
            async for message in socket:
                started = time.monotonic()
                try:  # beside the event loop: the others are answered meanwhile
                    observation = await asyncio.to_thread(decode, message)
                except ValueError as error:
                    await socket.send(f"bad_frame: {error}")
                    await socket.close(CloseCode.INVALID_DATA, "not the openpi protocol")
                    return
                await socket.send(await self._answer(name, observation, total_ms))
                total_ms = (time.monotonic() - started) * 1e3
        except ConnectionClosed as closed:
            too_large = closed.sent is not None and closed.sent.code == CloseCode.MESSAGE_TOO_BIG
            if too_large:
                log.warning("%s sent more than %d bytes (serving.openpi_max_mb)", name, self._settings.max_bytes)
            else:
                log.debug("%s: %s", name, closed)
        finally:
            self._clients -= 1
            log.info("%s left", name)

    async def _answer(self, name: str, observation: dict[str, Any], previous_ms: float | None) -> bytes | str:
        """The packed answer, or an error in words."""
        assert self._gateway is not None
        try:
            started = time.monotonic()
            body = await asyncio.to_thread(infer_body, observation, self._spec, self._settings.keys)
            answer = await self._gateway.infer(body, name, self._settings.timeout_s)
        except ValueError as mistake:
            return f"schema_mismatch: {mistake}"
        except WireError as error:
            return f"{error.code}: {error.message}"
        except Exception:
            log.exception("a question of %s failed", name)
            return "internal: the server failed on this observation; see its log"
        timing = {"infer_ms": (time.monotonic() - started) * 1e3}
        if previous_ms is not None:
            timing["prev_total_ms"] = previous_ms
        return msgpack_numpy.packb(
            {
                "actions": answer["actions"],
                "policy_version": answer["policy_version"],
                "server_timing": timing,
                "policy_timing": {"infer_ms": answer["server_ms"]},
            }
        )

    def _metadata(self) -> dict[str, Any]:
        """What the client learns on connecting: the task, and which keys fill it."""
        serving = (read_json(self._paths.status) or {}).get("serving") or {}
        return {
            "server": "flowserl",
            "run": self._run,
            "task": self._spec.to_dict(),
            "keys": self._settings.keys,
            "policy_version": serving.get("version", -1),
        }


def decode(message: str | bytes) -> dict[str, Any]:
    """A client's message. Raises ValueError for text, other bytes, other types and dtypes that would need pickle."""
    if isinstance(message, str):
        raise ValueError("expected a binary message")
    body = msgpack_numpy.unpackb(message)
    if not isinstance(body, dict):
        raise ValueError(f"expected a map, got {type(body).__name__}")
    return body


async def run(server: OpenpiServer) -> None:
    """Serve until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with server.listening() as listening:
        for socket in listening.sockets:
            log.info("openpi clients: %s port %d", *socket.getsockname()[:2])
        say_ready()
        while not stop.is_set():
            beat()  # by the loop that serves the clients: when it hangs, so does this
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), BEAT_S)


def main(run_dir: str) -> int:
    """Entry of the role. Returns 2 on a mistake in the config or a port that is taken, said in one line."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("websockets").setLevel(logging.WARNING)
    paths = RunPaths(Path(run_dir))
    raise_file_limit()  # one per connection, half-open ones included
    try:
        cfg = read_config(paths.config)
        spec = task_spec(cfg)
        server = OpenpiServer(OpenpiSettings.of(cfg), spec, cfg.run, paths)
        asyncio.run(run(server))
    except (ValueError, OSError) as mistake:
        log.error("%s", mistake)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
