"""The actor's end of the wire: acknowledged data, inference, requests, notifications, parameters.

    send_item / update ─▶ spool ─▶ outbox ─▶ data link ───▶ 5588
    infer, request ────────────────────────▶ control link ─▶ 5588
    callbacks ◀── listener thread ◀──────── SUB ◀───────── 5589

The robot's thread calls in; sockets live on the links' threads. Nothing here needs torch.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from socket import gethostname
from typing import Any

from serl_transport.config import TrainerConfig
from serl_transport.connection.link import Link
from serl_transport.connection.reach import Watch, bracketed, obstacle
from serl_transport.connection.subscriber import Subscriber
from serl_transport.contract.bounds import check_name
from serl_transport.contract.errors import ServerSilent
from serl_transport.contract.specs import TaskSpec
from serl_transport.data_store import DataStoreBase
from serl_transport.delivery.outbox import Ledger, Outbox
from serl_transport.delivery.spool import DEFAULT_BYTES, ItemKey, open_spool
from serl_transport.parameters.listener import Listener
from serl_transport.parameters.params import ParametersBlob, pull
from serl_transport.security.keys import ClientKeys
from serl_transport.wire.codec import pack
from serl_transport.wire.pictures import RAW, check_pictures

log = logging.getLogger(__name__)

RESEND_S = 10.0


class TrainerClient:
    """One actor's connection, named by its `unique_identifier`."""

    def __init__(
        self,
        name: str,
        server_ip: str,
        config: TrainerConfig,
        data_store: DataStoreBase | None = None,
        data_stores: dict[str, DataStoreBase] | None = None,
        *,
        spec: TaskSpec | None = None,
        spool_dir: str | Path | None = None,
        spool_bytes: int = DEFAULT_BYTES,
        ledger_path: str | Path | None = None,
        role: str = "actor",
        pictures: str = RAW,
        wait_for_server: bool = True,
        timeout_ms: float = 5000,
        on_wait: Callable[[str], None] | None = None,
        run: str | None = None,
    ):
        """Connect, and wait until the learner accepts (`wait_for_server`), telling `on_wait` once a second.

        `role` operator: a connection that asks (and may steer the run), sends no data and needs no spec.
        Without `wait_for_server` it raises ServerSilent after `timeout_ms`. A refusal (another task, version,
        protocol or key) raises the typed WireError at once; ValueError names a missing key file; SpoolBusy and
        SpoolError say what is wrong with `spool_dir`. `run`: a learner of another run refuses this client; None: any
        will do. pictures: how those of items are packed, `raw`, `lossless` or `jpeg:<quality>` (wire/pictures.py).
        """
        check_name("a client's name (unique_identifier)", name)
        self.name, self.config, self.timeout_ms = name, config, timeout_ms
        self._pictures = check_pictures("pictures", pictures)
        self._host = bracketed(server_ip)
        self._server = f"{self._host}:{config.port_number}"
        self._spec, self._role, self._run = spec, role, run
        self._keys = None if config.keys_dir is None else ClientKeys.load(config.keys_dir, name)
        self._stores = dict(data_stores or {}) | ({name: data_store} if data_store is not None else {})
        self._sent_ids = dict.fromkeys(self._stores, -1)
        self._status: dict[str, Any] = {}
        self._troubles: dict[str, str] = {}
        self._over: str | None = None
        self._watched = False
        self._updater: _Repeater | None = None
        self._resources = ExitStack()  # closed last in, first out: the links before what they use
        try:
            self._open(spool_dir, spool_bytes, ledger_path)
            self._await_server(wait_for_server, on_wait or _log_wait)
        except BaseException:
            self.stop()
            raise

    # Data.

    def send_item(self, body: dict[str, Any], store: str = "") -> int:
        """Keep one item (a `StepBatch.to_body()`) in the spool and return its seq at once; it is sent by itself.

        Raises SpoolFull when the learner has been away for too long, TooLarge for a body above the limits.
        """
        seq = self._spool.append([store.encode(), *pack(body, self.config.limits, self._pictures)])
        self._outbox.offer(ItemKey(self.boot_id, seq))
        return seq

    @property
    def backlog(self) -> int:
        """Items that the learner has not acknowledged."""
        return len(self._spool)

    @property
    def refused_items(self) -> int:
        """Items that the learner will never take; they are in the spool's `refused` folder, with the reason."""
        return self._outbox.refused

    def flush(self, timeout_s: float) -> bool:
        """Wait until every item is acknowledged (or set aside); False after `timeout_s`."""
        return self._outbox.wait(timeout_s)

    def update(self) -> bool:
        """Send what is new in the data stores and wait for its acknowledgement; True when all of it was taken."""
        refused = self._outbox.refused
        for name, store in self._stores.items():
            items, latest = store.since(self._sent_ids[name])
            missed = latest - self._sent_ids[name] - len(items)
            if missed > 0:
                log.warning("data store %r overflowed: %d items were dropped before they were sent", name, missed)
            for item in items:
                self.send_item({"item": item}, name)
            self._sent_ids[name] = latest
        return self.flush(self.timeout_ms / 1e3) and self._outbox.refused == refused

    def start_async_update(self, interval: float = 10.0, *, interval_ms: float | None = None) -> None:
        """Send what is new in the data stores every `interval` seconds (or `interval_ms`), without blocking."""
        if self._updater is None:
            self._updater = _Repeater(interval if interval_ms is None else interval_ms / 1e3, self.update)

    # Questions.

    def infer(self, body: dict[str, Any], timeout_ms: float | None = None) -> dict[str, Any]:
        """Ask the policy: see docs/contracts/requests.md. Raises NotReady, ServerSilent or another WireError."""
        return self._control.call("infer", body, timeout_ms=timeout_ms or self.timeout_ms)

    def request(self, type: str, payload: dict[str, Any] | None = None, timeout_ms: float | None = None) -> dict:
        """Ask the learner something. Raises the learner's typed WireError, or ServerSilent.

        After a cut link an unanswered request is sent again, so a handler may see it twice.
        """
        return self._control.call("request", payload or {}, target=type, timeout_ms=timeout_ms or self.timeout_ms)

    def fetch_params(self, version: int | None = None) -> ParametersBlob:
        """Pull the newest (or one) version of the parameters, whole and checked."""
        # Over the data link: a large reply would hold up the answers to `infer` on the other one.
        return pull(lambda payload: self._data.ask("request", payload, target="params"), version)

    # Being told.

    def recv_network_callback(self, callback: Callable[[Any], None], *, raw: bool = False) -> None:
        """Call `callback(params)` with the newest parameters, now and whenever there are newer ones.

        With `raw` it gets the `ParametersBlob` (safetensors). A callback that raises is reported; the next version is
        tried. Versions that were superseded before they were pulled are skipped.
        """
        self._listener.on_network(callback, raw)

    def on_notify(self, fn: Callable[[dict[str, Any]], None]) -> None:
        """Call `fn(body)` for each notification that reaches this client."""
        self._listener.on_notify(fn)

    # Being seen.

    def set_status(self, **status: Any) -> None:
        """What heartbeats tell the learner beside the backlog, for example policy_version and mode."""
        self._status = {**self._status, **status}

    @property
    def silent_s(self) -> float:
        """Seconds since the learner was last heard (it answers a heartbeat every second)."""
        return self._control.silent_s

    @property
    def troubles(self) -> dict[str, str]:
        """What ails the learner's roles, by name, in words, as it last said; empty when nothing does."""
        return self._troubles

    @property
    def over(self) -> str | None:
        """Why the learner has no more tickets, in words, as it last said; None while its run goes on."""
        return self._over

    @property
    def watched(self) -> bool:
        """Does somebody look at this run at the learner's console, as it last said?"""
        return self._watched

    @property
    def hello_reply(self) -> dict[str, Any]:
        """What the learner said when it last accepted this client."""
        return self._control.hello_reply

    def stop(self) -> None:
        """Close everything; unacknowledged items stay in the spool for the next start."""
        if self._updater is not None:
            self._updater.stop()
        self._resources.close()

    # Inside.

    def _open(self, spool_dir: str | Path | None, spool_bytes: int, ledger_path: str | Path | None) -> None:
        self._spool = open_spool(spool_dir, spool_bytes)
        self._resources.callback(self._spool.close)
        self.boot_id = self._spool.boot_id
        ledger = None
        if ledger_path is not None:
            ledger = Ledger(ledger_path)
            self._resources.callback(ledger.close)
        self._listener = Listener(self.fetch_params, self.config.limits)
        self._resources.callback(self._listener.stop)
        self._control = self._link("control", self._heard, None)
        self._data = self._link("data", None, RESEND_S)
        self._control.on_ready(lambda: self._listener.saw_version(self._control.hello_reply))
        self._control.on_restart(self._listener.forget)
        Subscriber(
            self._control.loop,
            self._control.context,
            f"tcp://{self._host}:{self.config.broadcast_port}",
            self._listener.deliver,
            limits=self.config.limits,
            keys=self._keys,
        )
        self._outbox = Outbox(self._data, self._spool, ledger)
        self._control.start()
        self._data.start()

    def _heard(self, reply: dict[str, Any]) -> None:
        """The answer to a heartbeat."""
        self._listener.saw_version(reply)
        self._watched = reply.get("watched") is True
        over, troubles = reply.get("over"), reply.get("troubles")
        self._over = None if over is None else str(over)
        self._troubles = {str(k): str(v) for k, v in troubles.items()} if isinstance(troubles, dict) else {}

    def _link(self, name: str, on_heartbeat: Callable[[dict], None] | None, resend_s: float | None) -> Link:
        link = Link(
            f"tcp://{self._server}",
            name=f"trainer-client-{name}",
            actor_id=self.name,
            boot_id=self.boot_id,
            hello=lambda: {**self._hello(), "link": name},
            heartbeat=lambda: {"link": name, "backlog": self.backlog, **self._status},
            on_heartbeat=on_heartbeat,
            resend_s=resend_s,
            limits=self.config.limits,
            keys=self._keys,
        )
        self._resources.callback(link.stop)
        return link

    def _hello(self) -> dict[str, Any]:
        return {
            "version": self.config.version,
            "role": self._role,
            "run": self._run,
            "limits": asdict(self.config.limits),
            "spec": None if self._spec is None else self._spec.to_dict(),
            "backlog": self.backlog,
            "session": self._spool.session,
            "host": f"{gethostname()}, process {os.getpid()}",
        }

    def _await_server(self, forever: bool, on_wait: Callable[[str], None]) -> None:
        start, reach = time.monotonic(), None
        for link in (self._control, self._data):
            while not link.settled.wait(1.0 if forever else self.timeout_ms / 1e3):
                for other in (self._control, self._data):
                    if other.refused is not None:
                        raise other.refused
                waited = time.monotonic() - start
                if not forever:
                    why = obstacle(self._host, self.config.port_number, ipv4_names=True)
                    raise ServerSilent(
                        f"no learner at {self._server} in {waited:.1f} s; is it running, on that port?"
                        + (f": {why} (check ip= and port=)" if why else "")
                    )
                reach = reach or Watch(self._host, self.config.port_number)  # a learner that answers is not probed
                why = f"{reach.words} (check ip= and port=)" if reach.words else ""
                on_wait(f"waiting for learner at {self._server} ({waited:.0f} s){why}")
            if link.refused is not None:
                raise link.refused


class _Repeater:
    """Calls a function every `interval_s` on a thread of its own until stopped."""

    def __init__(self, interval_s: float, fn: Callable[[], Any]):
        self._stopping = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(interval_s, fn), name="trainer-client-update", daemon=True
        )
        self._thread.start()

    def _run(self, interval_s: float, fn: Callable[[], Any]) -> None:
        while not self._stopping.wait(interval_s):
            try:
                fn()
            except Exception:
                log.exception("the asynchronous update failed; trying again in %g s", interval_s)

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        self._thread.join()


def _log_wait(message: str) -> None:
    log.warning("%s", message)
