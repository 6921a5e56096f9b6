"""The gateway's composition: which message goes to which part, and what happens once a second.

    5588 actors ─▶ data ─▶ Ingest          ipc roles ─▶ progress ─▶ TrainerProgress
                   infer ─▶ InferForwarder              serving, infer_reply ─▶ InferForwarder
                   heartbeat ◀─ Troubles ◀───────────── troubles (of the supervisor)
                   request ─▶ next_episode | status | params | follow, file (feed.py) | an operator's (operating.py)
    5589 ◀─ notify: params version, stage, stop

One thread owns all of it; the journal's thread only writes and posts back. Nothing here waits for a disk or a peer.
"""

import logging
import time
from dataclasses import replace
from functools import partial
from typing import Any

from serl_launcher.gateway.actors import Actors
from serl_launcher.gateway.ending import Ending
from serl_launcher.gateway.feed import Feed
from serl_launcher.gateway.forward import InferForwarder
from serl_launcher.gateway.hands import Hands
from serl_launcher.gateway.ingest import Ingest
from serl_launcher.gateway.journalled import Journalled
from serl_launcher.gateway.ledger import ADHOC, LedgerRow, scope_of
from serl_launcher.gateway.operating import Operating
from serl_launcher.gateway.operator_state import OperatorState
from serl_launcher.gateway.progress import TrainerProgress
from serl_launcher.gateway.published import PublishedParams
from serl_launcher.gateway.seal import Seal, load_secret
from serl_launcher.gateway.settings import GatewaySettings
from serl_launcher.gateway.tickets import Ticket, TicketOffice, stop, wait
from serl_launcher.gateway.troubles import Troubles
from serl_launcher.gateway.views import Views
from serl_launcher.replay.journal_writer import JournalLock
from serl_launcher.run.acts import Row
from serl_launcher.run.alive import beat
from serl_launcher.run.files import read_json, write_json
from serl_launcher.run.internal import INFER, INFER_REPLY
from serl_launcher.run.live_settings import of_actors
from serl_launcher.run.paths import RunPaths, internal_endpoint
from serl_launcher.run.schedule import Stage, StageState, current_stage
from serl_transport.config import TrainerConfig
from serl_transport.connection.router import Peer
from serl_transport.contract.bounds import INT32, shown
from serl_transport.contract.errors import BadFrame, Unauthorized, UnknownKind, WireError
from serl_transport.security.allow_list import FILE, FOLLOW, OPERATOR_REQUESTS
from serl_transport.server import TrainerServer
from serl_transport.wire.codec import Frames, pack
from serl_transport.wire.envelope import Envelope

log = logging.getLogger("gateway")
WANTS = ("follow", "demo", "online", "eval")
WAIT_S = 0.5  # until an actor asks again, while the learner trains or an operator paused the run
TICKET_GRACE_S = 5.0  # an actor that asks for the next episode has this long to deliver the last one


class Gateway:
    """One run's gateway. Construction takes the lock, the ports and the journal; `run` serves until `stop`.

    Raises, with a message for the user: RunFolderBusyError, CannotListen, ValueError (an open bind), JournalCorrupt,
    SpecChangedError, RingError, StorageFull.
    """

    def __init__(self, settings: GatewaySettings, paths: RunPaths) -> None:
        self.settings, self.paths = settings, paths
        self._lock = JournalLock(paths.journal)
        self.server = TrainerServer(
            TrainerConfig(
                port_number=settings.port,
                broadcast_port=settings.broadcast_port,
                bind_host=settings.bind_host,
                insecure=settings.insecure,
                keys_dir=settings.keys_dir,
                allow_list=settings.allow_list,
            ),
            spec=settings.spec,
            run=settings.run,
        )
        bound = self.server.config
        self.port, self.broadcast_port = bound.port_number, bound.broadcast_port  # of actors, of notifications
        try:
            self._compose()
        except BaseException:
            self.server.stop()
            self._lock.release()
            raise

    def _compose(self) -> None:
        settings, paths, server = self.settings, self.paths, self.server
        self.actors = Actors(settings.dead_actor_s)
        self.operator = OperatorState(paths, settings.config)
        self.progress = TrainerProgress(paths.stage_progress, paths.checkpoints, self.operator.live.stages)
        self.params = PublishedParams(paths.params, server.call_soon, self._announce_params)
        self.journalled = Journalled(settings, paths, self.actors, server.reply, self._episode_closed)
        reader = self.journalled.recover()
        seal = Seal(load_secret(paths.ticket_secret, used=reader.next_sequence > 1), settings.unticketed)
        grace_s = min(TICKET_GRACE_S, settings.dead_actor_s)
        self.tickets = TicketOffice(settings.seed, grace_s, self.actors.alive, seal)
        self.ending = Ending(self.actors, self.tickets, settings.dead_actor_s)
        self.ingest = Ingest(settings, paths, self.actors, self.journalled, reader, server.call_soon, seal)
        self.troubles = Troubles(self.ingest, self.progress)
        self.views, self.hands = Views(), Hands(server.reply, server.loop.call_later, self.operator.note)
        self.feed = Feed(paths, settings.run, settings.config, server.reply)
        self._restore_tickets()
        self._roles = server.add_router(internal_endpoint(paths.root))
        self.forwarder = InferForwarder(self._roles)
        self.params.pin(self.operator.state.served)
        self._stage = self._current_stage()
        self.operating = Operating(
            paths,
            self.operator,
            self.actors,
            self.journalled.ledger,
            self.progress,
            lambda: self._stage,
            server.call_soon,
        )
        self._exported: dict[str, Any] = {}
        self._status_late = False
        self._register_handlers()
        server.loop.every(0.25, self.params.look)
        server.loop.every(1.0, self._every_second)
        server.loop.every(0.5, self._beat)
        server.loop.every(60.0, self.ingest.problems.report)

    def _register_handlers(self) -> None:
        server, roles = self.server, self._roles
        server.on_hello(self._hello)
        server.handle("heartbeat", self._heartbeat)
        server.handle("data", self.ingest.data, raw=True)
        server.handle("infer", partial(self.forwarder.infer, server.reply), raw=True)
        server.handle("request", self._request)
        roles.handle("role_hello", self._role_hello)
        roles.handle("progress", self._progress)
        roles.handle("status", lambda peer, envelope, body: self.status())
        roles.handle("serving", self._serving)
        roles.handle("troubles", self.troubles.take)
        roles.handle("views", self._give_views)
        roles.handle(INFER, partial(self.forwarder.infer, roles.reply), raw=True)
        roles.handle(INFER_REPLY, self.forwarder.answered, raw=True)

    def run(self) -> None:
        """Serve until `stop`, then leave a whole journal and a last status behind."""
        where = f"{self.settings.bind_host}:{self.port}"
        log.info("run %s: listening on %s, notifying on %d", self.settings.run, where, self.broadcast_port)
        self._write_status()
        try:
            self.server.start()
        finally:
            self.feed.close()
            self.ingest.close()
            self.journalled.hang_up()
            self.server.loop.finish()  # what the journal took last is in the ledger, too
            self.journalled.ring.close()
            self._write_status()
            self._lock.release()

    def stop(self) -> None:
        """Make `run` return; from any thread or a signal handler."""
        self.server.loop.stop()

    def status(self) -> dict[str, Any]:
        """The status document of docs/contracts/requests.md."""
        ledger = self.journalled.ledger
        return {
            "run": self.settings.run,
            "time": time.time(),
            "stage": self._stage.to_status(),
            "done": self.done,
            "ending": self.ending.to_status(self.done),
            "operator": self.operator.to_status(),
            "ring": str(self.journalled.ring.path),
            "storage": self.ingest.storage,
            "counts": ledger.counts(),
            "rates": {"transitions_per_s": self.journalled.transitions_per_s(), **ledger.rates()},
            "eval": ledger.evaluations(),
            "trainer": self.progress.to_status(),
            "serving": self.forwarder.to_status(),
            "actors": self.actors.to_status(self.params.times),
            "exporter": self._exported,
            "followers": self.feed.to_status(),
            "troubles": self._troubles(),
        }

    # Actors.

    def _hello(self, peer: Peer, body: dict[str, Any]) -> dict[str, Any]:
        if peer.role == "actor":
            self.actors.joined(peer.actor_id, peer.boot_id)
        return {"run": self.settings.run, "stage": self._stage.to_status(), "done": self.done}

    def _heartbeat(self, peer: Peer, envelope: Envelope, body: dict[str, Any]) -> dict[str, Any]:
        if peer.role == "actor":
            self.actors.heartbeat(peer.actor_id, body)
        told = {"troubles": self._troubles(), "over": self.over, "watched": self.views.watched}
        return self.server.heartbeat_reply() | told

    def _request(self, peer: Peer, envelope: Envelope, body: dict[str, Any]) -> dict[str, Any] | Frames | None:
        self.actors.seen(peer.actor_id)
        if envelope.target == "next_episode":
            if peer.role != "actor":
                raise Unauthorized(f"next_episode: this connection said hello with role {peer.role}, not as an actor's")
            return self.next_episode(peer.actor_id, peer.boot_id, body)
        if envelope.target == "leave" and peer.role == "actor":
            self.actors.leaves(peer.actor_id, peer.boot_id, body.get("reason"))
            return {}
        if envelope.target in ("live", "hands") and peer.role == "actor":
            return self._from_actor(peer, envelope, body)
        if envelope.target in (FOLLOW, FILE):
            return self.feed.take(peer, envelope, body)
        if envelope.target == "drive":
            return self.hands.drive(peer.actor_id, body)
        if envelope.target == "status":
            return self.status()
        if envelope.target == "params":
            self.params.look()
            return pack(self.params.chunk(body))
        if envelope.target == "acts":
            return self.operator.listed(body)
        if envelope.target in OPERATOR_REQUESTS:
            # Who may is the allow-list's business (without keys: whoever reaches the port).
            self.operating.take(envelope.target, body, peer.actor_id, partial(self._acted, envelope.token))
            return None
        known = ["next_episode", "status", "params", "acts", "leave", "live", "hands", FOLLOW, FILE]
        known += sorted(OPERATOR_REQUESTS)
        raise UnknownKind(f"no request {envelope.target!r}; the requests are {', '.join(known)}")

    def _from_actor(self, peer: Peer, envelope: Envelope, body: dict[str, Any]) -> dict[str, Any] | None:
        """What an actor says to the people at the console, and asks them."""
        if envelope.target == "live":
            return self.views.take(peer.actor_id, body)
        return self.hands.poll(peer.actor_id, envelope.token, body)

    def _give_views(self, peer: Peer, envelope: Envelope, body: dict[str, Any]) -> dict[str, Any]:
        return self.views.give(peer, envelope, body) | {"hands": self.hands.to_view()}

    def _acted(self, token: bytes, act: Row | WireError) -> None:
        """A person's request is kept, and in force from here on; or it is refused, with the reason."""
        if isinstance(act, WireError):
            self.server.reply(token, act)
            return
        self._take_acts()
        self.server.notify({"topic": act["act"], "by": act["by"]})
        self._write_status()
        self.server.reply(token, {"act": act, "operator": self.operator.to_status(), "done": self.done})

    def _take_acts(self) -> None:
        """What the ledger of acts says, into the parts that go by it."""
        self.params.pin(self.operator.state.served)
        self.progress.take_goals(self.operator.live.stages)
        self._update_stage()

    def _troubles(self) -> dict[str, str]:
        serving = self.forwarder.to_status().get("trouble")
        told = {"serving": serving} if serving else {}
        others = self.operator.troubles() | self.params.troubles() | self.feed.troubles()
        return self.troubles.current() | others | told

    @property
    def done(self) -> bool:
        """Nothing is left to do; actors may still be at their last episodes (`ending`)."""
        return self.over is not None

    @property
    def over(self) -> str | None:
        """Why no tickets are left, for people; None while the run goes on."""
        if self.operator.state.stopped:
            return "an operator stopped the run"
        return "every stage of the schedule is done" if self._stage.done else None

    def next_episode(self, actor: str, boot: str, payload: dict[str, Any]) -> dict[str, Any]:
        """Run, wait or stop, as the schedule (`want: follow`) or the actor itself says."""
        want, limit = payload.get("want", "follow"), payload.get("episodes")
        if want not in WANTS:
            raise BadFrame(f"next_episode: want: expected one of {', '.join(WANTS)}, got {shown(want)}")
        if limit is not None and (type(limit) is not int or not 1 <= limit <= INT32):
            raise BadFrame(
                f"next_episode: episodes: expected a whole number from 1 to {INT32}, or null, got {shown(limit)}"
            )
        backlog = self.actors.asked(actor, payload.get("backlog"))
        if self.over is not None:
            self.tickets.release(actor, boot, time.monotonic())
            return self.ending.answer(actor, backlog, self.over)
        if paused := self.operator.paused(actor):
            return wait(WAIT_S, paused)
        state = self._stage
        current = state.stage
        if current is not None and (want == "follow" or (want == current.mode and limit is None)):
            return self._ticket(current, actor, boot, state.min_version)
        if want == "follow":
            return stop("the schedule names no stage; an actor may ask for rollout.mode=demo, online or eval")
        needed = {"demo": -1, "online": 0, "eval": max(self.params.served or 0, 0)}[want]
        stage = Stage(f"{ADHOC}{want}", want, limit, takeover=want != "eval")
        return self._ticket(stage, actor, boot, needed)

    def _ticket(self, stage: Stage, actor: str, boot: str, min_version: int) -> dict[str, Any]:
        if stage.mode == "train":
            state = self._stage
            return wait(WAIT_S, f"stage {stage.name}: the learner trains, step {state.steps} of {stage.steps}")
        scope = scope_of(stage.name, actor, boot)
        counts = self.journalled.ledger.scope(scope)
        if stage.name.startswith(ADHOC) and stage.episodes and counts.counted >= stage.episodes:
            return stop(f"{stage.episodes} episodes are done")
        ticket = self.tickets.issue(stage, scope, counts, actor, boot, min_version, time.monotonic())
        changed = of_actors(self.operator.live.settings) if ticket["action"] == "run" else {}
        return ticket | ({"rollout": changed} if changed else {})

    # Roles.

    def _role_hello(self, peer: Peer, envelope: Envelope, body: dict[str, Any]) -> dict[str, Any]:
        log.info("role %s (pid %s) is here", body.get("role"), body.get("pid"))
        if body.get("role") == "trainer":
            self.progress.hello()
        return self.status()

    def _progress(self, peer: Peer, envelope: Envelope, body: dict[str, Any]) -> dict[str, Any]:
        self.progress.report(body)
        self.operating.obeyed(body.get("obeyed"), self.progress.version)
        self.params.look()
        self._update_stage()
        return self.status()

    def _serving(self, peer: Peer, envelope: Envelope, body: dict[str, Any]) -> dict[str, Any]:
        self.forwarder.serving(peer, body)
        return {}

    # Inside.

    def _episode_closed(self, row: LedgerRow) -> None:
        self.tickets.finish(row.episode_id)
        self._update_stage()

    def _current_stage(self) -> StageState:
        counted, live = self.journalled.ledger.stage_episodes(), self.operator.live
        versions = self.progress.end_versions | {name: v for name, v in live.ended.items() if v is not None}
        state = current_stage(live.stages, counted, self.progress.stage_steps, versions, live.ended)
        pinned = self.operator.state.served
        return state if pinned is None else replace(state, min_version=min(state.min_version, pinned))

    def _update_stage(self) -> None:
        before, self._stage = self._stage, self._current_stage()
        stage = self._stage.stage
        if self._stage.done and not before.done:
            log.info("every stage of the schedule is done")
            self.server.notify({"topic": "stop", "reason": "every stage of the schedule is done"})
        elif stage is not None and (self._stage.index, self._stage.done) != (before.index, before.done):
            log.info("stage %s (%s)", stage.name, stage.mode)
            self.server.notify({"topic": "stage", **self._stage.to_status()})

    def _restore_tickets(self) -> None:
        """Episodes that were open when the last gateway ended are still being made by their actors."""
        started = dict(self.journalled.ledger.started)
        for episode_id, opened in self.journalled.assembler.open.items():
            info = opened.info
            scope = scope_of(info.stage, opened.actor, opened.boot)
            self.tickets.restore(Ticket(episode_id, scope, info.seed, opened.actor, opened.boot))
            started[info.stage] = started.get(info.stage, 0) + 1
        for stage, count in started.items():
            self.tickets.skip_seeds(stage, count)

    def _announce_params(self, version: int) -> None:
        log.info("actors are told of policy version %d", version)
        self.server.announce_params(version)

    def _every_second(self) -> None:
        self.actors.report_silence()
        self.ingest.close_abandoned()
        self.journalled.write_ledger()
        self.forwarder.check()
        self._take_acts()
        self._exported = read_json(self.paths.root / "dataset_status.json") or {"episodes": 0}
        self._write_status()

    def _beat(self) -> None:
        """Without the journal's thread nothing would ever be acknowledged again: fall silent, and be restarted."""
        if self.ingest.writing:
            beat()

    def _write_status(self) -> None:
        try:
            write_json(self.paths.status, self.status())
            self._status_late = False
        except OSError as error:
            if not self._status_late:
                log.error("cannot write %s: %s", self.paths.status, error.strerror)
            self._status_late = True
