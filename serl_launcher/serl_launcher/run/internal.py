"""How the other roles talk to the gateway: request and reply over its ipc socket, and the policy server's work queue.

    trainer, exporter, supervisor ── InternalClient.progress() … ─▶ gateway ─▶ status document
    supervisor ── SupervisorLink.tell() ─▶ gateway ─▶ status document, actors' heartbeats
    policy server ── PolicyLink.serving() ─▶ gateway        gateway ── infer ─▶ receive() … reply() ─▶ gateway ─▶ actor

A role outlives the gateway: calls are retried on a fresh socket until the patience is over, and the policy server is
registered again by its next `serving`. Torch-free, like everything here.
"""

import contextlib
import itertools
import os
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq

from serl_launcher.run.paths import internal_endpoint
from serl_transport.contract.errors import ServerSilent, WireError
from serl_transport.wire import codec
from serl_transport.wire.envelope import REPLY, Envelope

ATTEMPT_S = 2.0
DEAF_S = 10.0  # a policy server that the gateway has not answered for so long tries a fresh socket
INFER, INFER_REPLY = "infer", "infer_reply"


class _Link:
    """One DEALER to the gateway."""

    def __init__(self, run_dir: str | Path, role: str) -> None:
        self.role = role
        self._endpoint = internal_endpoint(run_dir)
        self._context = zmq.Context()
        # A context that is collected with an open socket would wait for it for ever.
        self._finish = weakref.finalize(self, self._context.destroy, linger=0)
        self._ids = itertools.count(1)
        self.socket = self._connect()

    def close(self) -> None:
        self._finish()

    def _connect(self) -> zmq.Socket:
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RECONNECT_IVL, 50)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        socket.connect(self._endpoint)
        return socket

    def _send(self, envelope: Envelope, frames: codec.Frames) -> None:
        # A full queue means a gateway that has been away for long: what it missed is asked again or out of date.
        with contextlib.suppress(zmq.Again):
            self.socket.send_multipart([envelope.to_frame(), *frames], zmq.NOBLOCK)

    def _receive(self, timeout_s: float) -> tuple[Envelope, codec.Frames] | None:
        if not self.socket.poll(max(0, int(timeout_s * 1e3))):
            return None
        parts = self.socket.recv_multipart(copy=False)
        return Envelope.from_frame(parts[0]), parts[1:]


class InternalClient(_Link):
    """Blocking calls of one role. Each returns the gateway's answer or raises the WireError it sent.

    role: trainer, exporter, supervisor, … ; patience_s: how long a call goes on trying while the gateway is away
    before it raises ServerSilent.
    """

    def __init__(self, run_dir: str | Path, role: str, patience_s: float = 60.0) -> None:
        super().__init__(run_dir, role)
        self._patience_s = patience_s

    def hello(self) -> dict[str, Any]:
        """Announce the role. A trainer's next progress may then go back: it has resumed from a checkpoint."""
        return self.call("role_hello", {"role": self.role, "pid": os.getpid()})

    def status(self) -> dict[str, Any]:
        return self.call("status", {})

    def progress(
        self,
        *,
        step: int,
        stage_steps: Mapping[str, int],
        version: int,
        metrics: Mapping[str, float] | None = None,
        troubles: Mapping[str, str] | None = None,
        waits: str | None = None,
        obeyed: int = 0,
    ) -> dict[str, Any]:
        """The trainer's report, at least once a second; the status document.

        troubles: of it, by name; waits: what it waits for; both for people. obeyed: number of the last act for which it
        published a version.
        """
        body = {"step": step, "stage_steps": dict(stage_steps), "version": version, "metrics": dict(metrics or {})}
        body |= {"troubles": dict(troubles or {}), "waits": waits, "obeyed": obeyed}
        return self.call("progress", body)

    def call(self, kind: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """One request, repeated until answered (every kind may be repeated without harm)."""
        deadline = time.monotonic() + self._patience_s
        while True:
            request_id = next(self._ids)
            self._send(Envelope(kind, self.role, request_id=request_id), codec.pack(dict(body)))
            reply = self._wait_for(request_id, min(ATTEMPT_S, deadline - time.monotonic()))
            if reply is not None:
                return reply
            if time.monotonic() >= deadline:
                raise ServerSilent(
                    f"the gateway did not answer {kind} for {self._patience_s:.0f} s at {self._endpoint}: "
                    "is it running?"
                )
            self.socket.close()
            self.socket = self._connect()

    def _wait_for(self, request_id: int, timeout_s: float) -> dict[str, Any] | None:
        deadline = time.monotonic() + timeout_s
        while (message := self._receive(deadline - time.monotonic())) is not None:
            envelope, frames = message
            if envelope.kind == REPLY and envelope.request_id == request_id:
                envelope.raise_error()
                return codec.unpack(frames) if frames else {}
        return None


class SupervisorLink(_Link):
    """The supervisor's end: it tells, and waits for nothing."""

    def __init__(self, run_dir: str | Path) -> None:
        super().__init__(run_dir, "supervisor")

    def tell(self, troubles: Mapping[str, str]) -> None:
        """What ails the roles, by name, in words for people; once a second, also when nothing does."""
        self._send(Envelope("troubles", self.role, request_id=next(self._ids)), codec.pack({"roles": dict(troubles)}))


@dataclass(frozen=True, slots=True)
class InferRequest:
    """An actor's question, forwarded by the gateway."""

    token: bytes  # return address for `reply`
    body: dict[str, Any]  # the actor's `infer` body, arrays as read-only views that hold until it is answered
    actor: str = ""  # who asks
    arrived: float = 0.0  # monotonic seconds of this host, when the gateway got it


class PolicyLink(_Link):
    """The policy server's end: take forwarded questions, answer them in any order. One thread."""

    def __init__(self, run_dir: str | Path) -> None:
        super().__init__(run_dir, "policy")
        self._heard = time.monotonic()

    def receive(self, timeout_s: float) -> InferRequest | None:
        """The next question, or None after `timeout_s` (0: only what is there). Malformed ones are answered here."""
        deadline = time.monotonic() + timeout_s
        while (message := self._receive(deadline - time.monotonic())) is not None:
            envelope, frames = message
            self._heard = time.monotonic()
            if envelope.kind != INFER or not isinstance(envelope.request_id, bytes):
                continue  # the gateway's answer to `serving`
            try:
                return InferRequest(envelope.request_id, codec.unpack(frames), envelope.actor_id, envelope.seq / 1e9)
            except WireError as error:
                self.reply(envelope.request_id, error)
        return None

    def reply(self, token: bytes, result: Mapping[str, Any] | WireError) -> None:
        """Answer one question: `{actions, policy_version, server_ms}` or a typed error (NotReady, BadFrame, …)."""
        if isinstance(result, WireError):
            envelope = Envelope(INFER_REPLY, self.role, request_id=token, error=(result.code, result.message))
            self._send(envelope, [])
        else:
            self._send(Envelope(INFER_REPLY, self.role, request_id=token), codec.pack(dict(result)))

    def serving(self, *, version: int, trouble: str | None = None, **figures: float | None) -> None:
        """Register with the gateway and report, once a second; version −1: nothing to serve yet. Does not wait.

        trouble: why it does not serve what it should, for people; figures: shown in the status document's `serving`.
        """
        if time.monotonic() - self._heard > DEAF_S and not self.socket.poll(
            0
        ):  # away, or this socket is dead: a fresh one costs nothing
            self.socket.close()
            self.socket, self._heard = self._connect(), time.monotonic()
        body = {"pid": os.getpid(), "version": version, "trouble": trouble, **figures}
        self._send(Envelope("serving", self.role, request_id=next(self._ids)), codec.pack(body))
