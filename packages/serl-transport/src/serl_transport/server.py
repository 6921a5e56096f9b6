"""The learner's end of the wire: a ROUTER for everything actors send and a PUB for notifications, in one event loop.

    5588 ROUTER ─▶ hello | data | infer | request | heartbeat ─▶ handlers ─▶ replies
    5589 PUB    ◀─ notify(body)

Two ways to use it. agentlace-style: register data stores, give `request_callback`, call `publish_network`. As the
gateway does: replace the handlers of single kinds with `handle`, add sockets and timers, acknowledge data later.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from serl_transport.config import TrainerConfig
from serl_transport.connection.publisher import Publisher
from serl_transport.connection.router import Handler, Peer, Reply, Router
from serl_transport.connection.sessions import RETIRED, Sessions
from serl_transport.connection.subscriber import NOTIFY_TOPIC
from serl_transport.contract.bounds import INT64, check_name, check_text, check_whole, shown
from serl_transport.contract.errors import BadFrame, CannotListen, Refused, SchemaMismatch, UnknownKind
from serl_transport.contract.specs import TaskSpec
from serl_transport.data_store import DataStoreBase
from serl_transport.delivery.dedup import SeenItems
from serl_transport.parameters.params import Offer, read_chunk
from serl_transport.security import auth
from serl_transport.security.allow_list import CHECK_S, ROLES, AllowList
from serl_transport.security.keys import ServerKeys
from serl_transport.security.zap import Authenticator
from serl_transport.wire.blob import join_parts
from serl_transport.wire.codec import pack
from serl_transport.wire.envelope import PROTOCOL, Envelope
from serl_transport.wire.loop import EventLoop

log = logging.getLogger(__name__)

HELLO_CHARACTERS = 512  # of each text of a hello

DataCallback = Callable[[str, dict[str, Any]], Any]
RequestCallback = Callable[[str, Any], dict[str, Any]]


class TrainerServer:
    """Listens from construction, serves from `start`.

    Raises CannotListen (port in use and the like, with what to change) and ValueError (an unprotected bind, bad keys).
    """

    def __init__(
        self,
        config: TrainerConfig,
        data_callback: DataCallback | None = None,
        request_callback: RequestCallback | None = None,
        spec: TaskSpec | None = None,
        run: str | None = None,
    ):
        keys = None if config.keys_dir is None else ServerKeys.load(config.keys_dir)
        auth.check_bind(config.bind_host, config.insecure, has_keys=keys is not None)
        self.spec = spec  # actors must hold an equal one; None: any
        self.run = run  # an actor that says which run it works for must say this one; None: any
        self.params_version = 0  # newest published version, told in hello and heartbeat replies; 0: none
        self.failure: str | None = None  # why the server ended by itself
        self.loop = EventLoop()
        self.context = zmq.Context()
        self._data_callback = data_callback
        self._request_callback = request_callback
        self._on_hello: Callable[[Peer, dict[str, Any]], dict[str, Any] | None] | None = None
        self._stores: dict[str, DataStoreBase] = {}
        self._seen = SeenItems()
        self._extra_routers: list[Router] = []
        self._published: Offer | None = None
        self._ended: threading.Event | None = None  # set when `start` has returned; None: never started
        self.files = auth.raise_file_limit()  # one per connection, half-open ones included
        allowed = None if keys is None else AllowList(config.allow_list or Path(config.keys_dir or "") / "allow_list")
        self.authenticator = (
            None if allowed is None else Authenticator(self.loop, self.context, allowed, self._authenticator_died)
        )
        self._publisher = Publisher(self.loop, self.context, config.limits, keys)
        if allowed is not None:
            allowed.on_revoked = self._publisher.renew
            self.loop.every(CHECK_S / 2, allowed.refresh)
        permit = None if allowed is None else allowed.permit
        self.router = Router(
            self.loop, self.context, limits=config.limits, require_hello=True, keys=keys, permit=permit
        )
        self._sessions = Sessions(self.router.actors_named, self.router.is_connected, self.router.forget)
        self.config = self._bind(config)  # with the actual ports where 0 was asked for
        for kind, handler in self._default_handlers().items():
            self.router.handle(kind, handler)
        self.loop.every(
            max(0.1, config.peer_timeout_s / 6), lambda: self.router.forget_silent(self.config.peer_timeout_s)
        )

    # What an agentlace script calls.

    def register_data_store(self, name: str, data_store: DataStoreBase) -> None:
        """Insert what clients send for the store `name` into `data_store`, each item once."""
        self._stores[name] = data_store

    def data_store(self, name: str) -> DataStoreBase | None:
        """The store registered as `name`."""
        return self._stores.get(name)

    def store_names(self) -> set[str]:
        """Names of the registered stores."""
        return set(self._stores)

    def publish_network(self, params: Any) -> int:
        """Make `params` (nested dicts, lists and arrays) the newest version, tell clients to pull; returns the version.

        Thread-safe; the arrays are copied. Clients that missed the announcement or join later pull it as well.
        """
        parts = join_parts(pack({"params": params}, self.config.limits))
        # numpy's memory comes in huge pages: of 500 MB that is a quarter of the time that `join` takes.
        blob = np.concatenate([np.frombuffer(part, np.uint8) for part in parts])
        offer = Offer.of(self.params_version + 1, blob.data)
        self._published = offer
        self.announce_params(offer.version)
        return offer.version

    def start(self, threaded: bool = False) -> None:
        """Serve: in a thread of its own, or here until `stop`."""
        self._ended = threading.Event()
        if threaded:
            threading.Thread(target=self._serve, args=(self._ended,), name="trainer-server", daemon=True).start()
        else:
            self._serve(self._ended)

    def stop(self) -> None:
        """End serving and release the ports. From another thread it waits until that has happened."""
        self.loop.stop()
        if self._ended is None:
            self._close()
        elif not self.loop.in_loop:
            self._ended.wait()

    # What a gateway builds on.

    def handle(self, kind: str, fn: Handler, *, raw: bool = False) -> None:
        """Replace the handler of `kind`; see `Router.handle`. Not for `hello`, see `on_hello`."""
        if kind == "hello":
            raise ValueError("hello checks the contract itself; add to its reply with on_hello")
        self.router.handle(kind, fn, raw=raw)

    def on_hello(self, fn: Callable[[Peer, dict[str, Any]], dict[str, Any] | None]) -> None:
        """Call `fn(peer, hello body)` after a hello passed the checks; what it returns is added to the reply."""
        self._on_hello = fn

    def add_socket(self, socket: zmq.Socket, fn: Callable[[], None]) -> None:
        """Call `fn` in the loop whenever `socket` (made from `self.context`) is readable."""
        self.loop.add_socket(socket, fn)

    def add_router(self, endpoint: str) -> Router:
        """Another ROUTER in the same loop, for example ipc for the gateway's own roles; peers need no hello."""
        router = Router(self.loop, self.context, limits=self.config.limits, boot_id=self.router.boot_id)
        router.bind(endpoint, "Is another learner running in this folder?")
        self._extra_routers.append(router)
        return router

    def call_soon(self, fn: Callable[[], object]) -> None:
        """Run `fn` in the loop's thread; thread-safe."""
        self.loop.call_soon(fn)

    def reply(self, token: bytes, result: Reply) -> None:
        """Answer later what a handler left with None: a body, a WireError, or frames to forward. Thread-safe."""
        self.router.reply(token, result)

    def notify(self, body: dict[str, Any]) -> None:
        """Tell every listening client; whoever is away misses it. Thread-safe."""
        frames = [NOTIFY_TOPIC, *pack(body, self.config.limits)]
        self.loop.call_soon(lambda: self._publisher.send(frames))

    def announce_params(self, version: int) -> None:
        """Say that `version` is the newest; clients that want parameters pull it with a `params` request."""
        self.params_version = version
        self.notify({"topic": "params", "version": version})

    # Inside.

    def _bind(self, config: TrainerConfig) -> TrainerConfig:
        host = "127.0.0.1" if config.bind_host == "localhost" else config.bind_host
        address = f"[{host}]" if ":" in host else host
        try:
            if ":" in host:
                self.router.socket.setsockopt(zmq.IPV6, 1)
            endpoint = self.router.bind(f"tcp://{address}:{config.port_number or '*'}", _port_hint("port"))
            broadcast = self._publisher.bind(
                f"tcp://{address}:{config.broadcast_port or '*'}", _port_hint("broadcast_port")
            )
        except CannotListen:
            self._close()
            raise
        return replace(config, port_number=_port_of(endpoint), broadcast_port=_port_of(broadcast))

    def _default_handlers(self) -> dict[str, Handler]:
        return {
            "hello": self._hello,
            "heartbeat": lambda peer, envelope, body: self.heartbeat_reply(),
            "data": self._data,
            "request": self._request,
        }

    def heartbeat_reply(self) -> dict[str, Any]:
        """What a heartbeat is answered with; a handler of `heartbeat` should return it."""
        return {"params_version": self.params_version}

    def _hello(self, peer: Peer, envelope: Envelope, body: dict[str, Any]) -> Reply:
        _check_words(envelope, body)
        if body.get("version") != self.config.version:
            raise SchemaMismatch(
                f"version: {shown(body.get('version'))} on the actor, {self.config.version!r} on the learner; "
                "install the same release on both"
            )
        self._check_limits(body.get("limits"))
        role = body.get("role", "actor")
        if not isinstance(role, str) or role not in ROLES:
            raise BadFrame(f"hello: role: expected actor, operator or follower, got {shown(role)}")
        if role != "operator":
            self._check_run(body.get("run"))
            self._check_spec(body.get("spec"))
        self.router.make_room(peer, envelope.actor_id)
        if role == "actor" and not self._sessions.enter(
            envelope.actor_id, envelope.boot_id, body.get("session"), delivers=body.get("link") == "data"
        ):
            role = RETIRED
        peer.role = role
        peer.actor_id, peer.boot_id = envelope.actor_id, envelope.boot_id
        peer.session, peer.host = body.get("session"), body.get("host")
        extra = self._on_hello(peer, body) if self._on_hello and role != RETIRED else None
        self.router.peers[peer.address] = peer
        return {"protocol": PROTOCOL, "params_version": self.params_version, **(extra or {})}

    def _check_run(self, theirs: Any) -> None:
        """Two learners on one machine: what was meant for one must not end up in the other's journal."""
        if theirs is not None and self.run is not None and theirs != self.run:
            raise Refused(
                f"the learner on port {self.config.port_number} is of run {self.run!r}, this actor of run {theirs!r}: "
                f"give the actor run={self.run}, or the port= and broadcast_port= of its own learner"
            )

    def _check_limits(self, theirs: Any) -> None:
        """A peer that may send larger frames than we take would be cut off again and again without a word."""
        if not isinstance(theirs, dict):
            raise BadFrame("hello: limits: expected a map")
        for key, mine in asdict(self.config.limits).items():
            if type(theirs.get(key)) is not int or theirs[key] > mine:
                raise SchemaMismatch(f"limits.{key}: {shown(theirs.get(key))} on the actor, {mine} on the learner")

    def _check_spec(self, theirs: Any) -> None:
        if self.spec is None:
            return
        if theirs is None:
            raise SchemaMismatch(f"the learner runs task {self.spec.name!r}; the actor must say its task's spec")
        try:
            spec = TaskSpec.from_dict(theirs)
        except ValueError as error:
            raise BadFrame(f"hello: {error}") from None
        differences = spec.differences(self.spec, "on the actor", "on the learner")
        if differences:
            raise SchemaMismatch("the task differs; start both with the same task=: " + "; ".join(differences))

    def _data(self, peer: Peer, envelope: Envelope, body: dict[str, Any]) -> Reply:
        """Default: into the registered store and the data callback, once; the reply is the acknowledgement."""
        name, seq = envelope.target, envelope.seq
        if seq < 1:
            raise BadFrame(f"data: expected a seq from 1, got {seq}")
        store = self._stores.get(name)
        if store is None and (name or self._data_callback is None):
            raise Refused(f"no data store {name!r} is registered; the stores are {sorted(self._stores)}")
        if (envelope.actor_id, envelope.boot_id, seq) in self._seen:
            return {"duplicate": True}
        item = body["item"] if name and set(body) == {"item"} else body
        if store is not None:
            store.insert(item)
        self._seen.add(envelope.actor_id, envelope.boot_id, seq)
        if self._data_callback is not None:
            self._data_callback(name, {"data": [item], "last_id": seq})
        return {"duplicate": False}

    def _request(self, peer: Peer, envelope: Envelope, body: dict[str, Any]) -> Reply | None:
        """Default: `params` from the last `publish_network`, else `request_callback` for the configured types."""
        kind = envelope.target
        if kind == "params":
            # Packed here: frames are sent as they lie, without a copy.
            return pack(read_chunk(self._published, body), self.config.limits)
        if kind not in self.config.request_types or self._request_callback is None:
            raise UnknownKind(f"no request {kind!r} here; the types are {sorted(self.config.request_types)}")
        return self._request_callback(kind, body) or {}

    def _serve(self, ended: threading.Event) -> None:
        try:
            self.loop.run()
        finally:
            self._close()
            ended.set()

    def _authenticator_died(self) -> None:
        """Fail closed: nobody is served rather than everybody admitted. Whoever runs the server starts it again."""
        self.failure = "the authenticator failed"
        self.router.socket.close()
        self._publisher.close()
        self.loop.stop()

    def _close(self) -> None:
        for router in (self.router, *self._extra_routers):
            router.close()
        self._publisher.close()
        if self.authenticator is not None:
            self.authenticator.close()
        self.loop.close()
        self.context.destroy(linger=0)


def _check_words(envelope: Envelope, body: dict[str, Any]) -> None:
    """Every text of a hello can be shown and remembered; SchemaMismatch names the one that cannot."""
    try:
        check_name("hello: the actor's name (unique_identifier)", envelope.actor_id)
        check_name("hello: the process's boot id", envelope.boot_id)
        for key in ("run", "session", "host", "link"):
            if body.get(key) is not None:
                check_text(f"hello: {key}", body[key], HELLO_CHARACTERS)
        if body.get("backlog") is not None:
            check_whole("hello: backlog", body["backlog"], 0, INT64)
    except ValueError as error:
        raise SchemaMismatch(str(error)) from None


def _port_hint(option: str) -> str:
    return f"If another learner is running, stop it or give this one another {option}= (and the actor the same)"


def _port_of(endpoint: str) -> int:
    return int(endpoint.rsplit(":", 1)[1])
