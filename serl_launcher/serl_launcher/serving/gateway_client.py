"""Asks the gateway for actions from an asyncio program: many questions under way on one socket.

coroutine ─▶ infer(body) ─▶ DEALER ─▶ gateway ─▶ policy server      reader task ─▶ [request id → future] ─▶ coroutine
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from serl_launcher.run.internal import INFER
from serl_launcher.run.paths import internal_endpoint
from serl_transport.contract.errors import ServerSilent, WireError
from serl_transport.wire import codec
from serl_transport.wire.envelope import REPLY, Envelope

log = logging.getLogger("openpi")


class GatewayClient:
    """One socket; made inside the running event loop."""

    def __init__(self, run_dir: str | Path) -> None:
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        self._socket.connect(internal_endpoint(run_dir))
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._reader = asyncio.create_task(self._read())

    async def infer(self, body: dict[str, Any], asker: str, timeout_s: float) -> dict[str, Any]:
        """The policy server's answer. Raises its WireError, or ServerSilent after `timeout_s`."""
        request_id = next(self._ids)
        future = self._waiting[request_id] = asyncio.get_running_loop().create_future()
        try:
            envelope = Envelope(INFER, asker, request_id=request_id)
            with contextlib.suppress(zmq.Again):  # a gateway that is away: the timeout says so
                await self._socket.send_multipart([envelope.to_frame(), *codec.pack(body)], zmq.NOBLOCK)
            return await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            raise ServerSilent(f"no answer from the gateway within {timeout_s:g} s") from None
        finally:
            del self._waiting[request_id]

    def close(self) -> None:
        """Close the socket; whoever waits is told."""
        self._reader.cancel()
        for future in self._waiting.values():
            future.cancel()
        self._context.destroy(linger=0)

    async def _read(self) -> None:
        while True:
            parts = await self._socket.recv_multipart(copy=False)
            try:
                envelope = Envelope.from_frame(parts[0])
                future = self._waiting.get(envelope.request_id) if isinstance(envelope.request_id, int) else None
                if envelope.kind != REPLY or future is None or future.done():
                    continue  # an answer that nobody waits for any more
                if envelope.error is not None:
                    future.set_exception(WireError.from_code(*envelope.error))
                else:
                    future.set_result(codec.unpack(parts[1:]) if len(parts) > 1 else {})
            except WireError:
                log.exception("a bad message from the gateway")
