"""GR00T's inference protocol (ZMQ) in front of our policy server: Isaac-GR00T's clients get actions from this run.

Started by the supervisor as `python -m serl_launcher.serving.groot_server <run_dir>` when `serving.groot_port` is set.
Torch-free; it hands each observation to the gateway, so clients share the policy server's batches.

    REQ clients ─▶ ROUTER ─▶ one task a message: decode ─▶ token ─▶ endpoint ─▶ gateway ─▶ policy server ─▶ answer

Where the stock server (a REP socket) works on one message at a time, here a client has one message under way and no
client waits for another's. Every message is answered, a bad one by `{"error": one line}`. `kill` is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio
from omegaconf import DictConfig

from openpi_client import groot_wire
from openpi_client.groot_layout import Layout
from serl_config.secrets import secret
from serl_launcher.run.alive import beat
from serl_launcher.run.config import read_config, task_spec
from serl_launcher.run.files import read_json
from serl_launcher.run.paths import RunPaths
from serl_launcher.run.ready import say_ready
from serl_launcher.serving.gateway_client import GatewayClient
from serl_launcher.serving.groot_keys import modality_configs, question
from serl_launcher.serving.openpi_keys import largest_message
from serl_transport.connection.reach import bracketed, is_ipv6
from serl_transport.contract.bounds import check_number, shown
from serl_transport.contract.errors import NotReady, WireError
from serl_transport.contract.specs import TaskSpec
from serl_transport.security.auth import is_loopback, raise_file_limit

log = logging.getLogger("groot")
GENERATIONS = ("n1_7", "n1_5")
BEAT_S = 0.5
HEARTBEAT_MS = 5000  # a peer that vanished is dropped after three of them
CUT_OFF = 4  # times the largest message: the socket cuts the connection, less is answered with an error
_ENDPOINTS = ("ping", "get_action", "reset", "get_modality_config")


@dataclass(frozen=True, slots=True)
class GrootSettings:
    """`serving.groot_*` of the config, checked."""

    host: str
    port: int  # 0: any free one
    token: str | None = field(repr=False)  # None: everyone who reaches the port
    layout: Layout
    n1_5: bool  # modality configs in N1.5's form; observations are understood in both
    max_bytes: int  # of one message
    timeout_s: float  # for one answer

    @staticmethod
    def of(cfg: DictConfig) -> GrootSettings:
        """Raises ValueError in the user's words."""
        serving, spec = cfg.serving, task_spec(cfg)
        token = secret(serving.groot_token, "serving.groot_token")
        if token is None and not is_loopback(serving.groot_host) and not cfg.insecure:
            raise ValueError(
                f"serving.groot_host={serving.groot_host} lets anyone on that network ask the policy; "
                "set serving.groot_token, or insecure=true if that network is yours alone"
            )
        if serving.groot_generation not in GENERATIONS:
            got = serving.groot_generation
            raise ValueError(f"serving.groot_generation: expected {' or '.join(GENERATIONS)}, got {shown(got)}")
        layout = Layout.read(serving.groot_modality, spec, "serving.groot_modality")
        if absent := sorted(set(spec.cameras) - set(layout.cameras.values())):
            raise ValueError(f"serving.groot_modality: video has no entry for the task's camera {absent[0]!r}")
        return GrootSettings(
            host=serving.groot_host,
            port=serving.groot_port,
            token=token,
            layout=layout,
            n1_5=serving.groot_generation == "n1_5",
            max_bytes=largest_message("serving.groot_max_mb", serving.groot_max_mb, spec),
            timeout_s=check_number("serving.groot_timeout_s", serving.groot_timeout_s, 0.1, 600),
        )


class GrootServer:
    """Serves one run."""

    def __init__(self, settings: GrootSettings, spec: TaskSpec, paths: RunPaths) -> None:
        self._settings, self._spec, self._paths = settings, spec, paths
        self._busy: set[bytes] = set()  # identities of clients whose message is worked on
        self._tasks: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[tuple[int, asyncio.Task[None]]]:
        """Serve clients in here: the port, and the task that reads it. zmq.ZMQError for one that cannot be had."""
        context = zmq.asyncio.Context()
        self._socket = context.socket(zmq.ROUTER)
        bound = {zmq.MAXMSGSIZE: CUT_OFF * self._settings.max_bytes, zmq.RCVHWM: 2, zmq.SNDHWM: 8}
        beats = {zmq.HEARTBEAT_IVL: HEARTBEAT_MS, zmq.HEARTBEAT_TIMEOUT: 3 * HEARTBEAT_MS}
        for option, value in {zmq.LINGER: 0, zmq.IPV6: is_ipv6(self._settings.host), **bound, **beats}.items():
            self._socket.setsockopt(option, value)
        self._gateway = GatewayClient(self._paths.root)
        try:
            self._socket.bind(f"tcp://{bracketed(self._settings.host)}:{self._settings.port or '*'}")
            reader = asyncio.create_task(self._read())
            yield int(self._socket.getsockopt(zmq.LAST_ENDPOINT).rpartition(b":")[2].rstrip(b"\0")), reader
            reader.cancel()
        finally:
            for task in self._tasks:
                task.cancel()
            self._gateway.close()
            context.destroy(linger=0)

    async def _read(self) -> None:
        while True:
            identity, *frames = await self._socket.recv_multipart()
            if len(frames) != 2 or frames[0]:
                await self._send(identity, {"error": "bad_frame: expected one message of a REQ socket"})
            elif identity in self._busy:
                await self._send(identity, {"error": "one question at a time: the last one is not answered yet"})
            else:
                self._busy.add(identity)
                task = asyncio.create_task(self._serve(identity, frames[1]))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _serve(self, identity: bytes, message: bytes) -> None:
        try:
            answer = await self._answer(f"groot-{identity.hex()}", message)
        except ValueError as mistake:
            answer = {"error": f"schema_mismatch: {mistake}"}
        except WireError as error:
            answer = {"error": f"{error.code}: {error.message}"}
        except Exception:
            log.exception("a message of %s failed", identity.hex())
            answer = {"error": "internal: the server failed on this message; see its log"}
        finally:
            self._busy.discard(identity)
        await self._send(identity, answer)

    async def _send(self, identity: bytes, answer: Any) -> None:
        """A peer that is gone or does not read is given up: a ROUTER drops what it cannot deliver."""
        await self._socket.send_multipart([identity, b"", groot_wire.packb(answer)])

    async def _answer(self, name: str, message: bytes) -> Any:
        if len(message) > self._settings.max_bytes:
            log.warning("%s sent %d bytes (serving.groot_max_mb)", name, len(message))
            raise ValueError(f"a message of {len(message)} bytes, expected at most {self._settings.max_bytes}")
        request = await asyncio.to_thread(groot_wire.unpackb, message)  # beside the loop: the others are answered
        if not isinstance(request, dict):
            raise ValueError(f"expected a map, got {type(request).__name__}")
        if not self._token_fits(request.get("api_token")):
            return {"error": "Unauthorized: Invalid API token"}  # the stock server's words, which clients know
        match request.get("endpoint", "get_action"):
            case "ping":
                return {"status": "ok", "message": "Server is running"}
            case "reset":
                return {}  # a policy here carries nothing from one episode to the next
            case "get_modality_config":
                return modality_configs(self._settings.layout, self._ticks(), self._settings.n1_5)
            case "get_action":
                return await self._act(name, request.get("data"))
            case "kill":
                log.warning("%s asked to kill the server; refused", name)
                return {"error": "kill is refused: the learner's supervisor ends this server"}
            case other:
                raise ValueError(f"endpoint: expected one of {', '.join(_ENDPOINTS)}, got {shown(other)}")

    async def _act(self, name: str, data: Any) -> Any:
        settings = self._settings
        asked = await asyncio.to_thread(question, data, self._spec, settings.layout)
        deadline = {"deadline_ms": settings.timeout_s * 1e3}
        waiting = (self._gateway.infer(body | deadline, name, settings.timeout_s) for body in asked.bodies)
        answers = await asyncio.gather(*waiting)
        info = {"policy_version": int(answers[0]["policy_version"]), "server_ms": float(answers[0]["server_ms"])}
        return asked.answer([answer["actions"] for answer in answers], info, settings.layout)

    def _token_fits(self, given: Any) -> bool:
        if self._settings.token is None:
            return True
        return isinstance(given, str) and hmac.compare_digest(given.encode(), self._settings.token.encode())

    def _ticks(self) -> int:
        """Of a chunk, as the policy server last said."""
        ticks = ((read_json(self._paths.status) or {}).get("serving") or {}).get("chunk")
        if type(ticks) is not int:
            raise NotReady("no policy server is running yet (or it is restarting); ask again")
        return ticks


async def run(server: GrootServer, host: str) -> None:
    """Serve until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with server.listening() as (port, reader):
        log.info("GR00T clients: %s port %d", host, port)
        say_ready()
        while not stop.is_set():
            if reader.done():
                reader.result()  # it never ends by itself: what it died of ends this process
            beat()  # by the loop that serves the clients: when it hangs, so does this
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), BEAT_S)


def main(run_dir: str) -> int:
    """Entry of the role. Returns 2 on a mistake in the config or a port that is taken, said in one line."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", datefmt="%H:%M:%S")
    paths = RunPaths(Path(run_dir))
    raise_file_limit()
    try:
        cfg = read_config(paths.config)
        settings = GrootSettings.of(cfg)
        asyncio.run(run(GrootServer(settings, task_spec(cfg), paths), settings.host))
    except (ValueError, zmq.ZMQError) as mistake:
        log.error("%s", mistake)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
