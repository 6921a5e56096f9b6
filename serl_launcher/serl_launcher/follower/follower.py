"""The follower's loop: ask the gateway for what the journal got, keep it, fill the ring of this host from it.

    gateway ── follow ─▶ JournalCopy (journal/) ─▶ EpisodeStream ─▶ RingWriter ── /dev/shm ─▶ ranks of this host
            ── status ─▶ status.json of this host, with this ring and this host's troubles ─▶ supervisor's screen, ranks

One thread, which blocks on the gateway's answer (bounded) and on the disk. It goes on from what is on disk: after kill
-9 of this process or of the gateway, and after a cut link, it asks for what comes behind its last whole record.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serl_launcher.follower.settings import FollowerSettings
from serl_launcher.replay.durable import Position
from serl_launcher.replay.episodes import EpisodeStream
from serl_launcher.replay.filling import fill
from serl_launcher.replay.journal_copy import DamagedInTransitError, JournalCopy
from serl_launcher.replay.journal_writer import JournalLock
from serl_launcher.replay.ring import RingWriter
from serl_launcher.run.alive import beat, busy
from serl_launcher.run.files import disk_trouble, write_json
from serl_launcher.run.followed import config_keys, states, store
from serl_launcher.run.paths import RunPaths
from serl_launcher.run.ready import say_ready
from serl_transport.client import TrainerClient
from serl_transport.contract.errors import NotReady, ServerSilent, WireError

log = logging.getLogger("follower")
LEAST_BYTES, FIRST_BYTES, MOST_BYTES = 64 << 10, 1 << 20, 8 << 20  # of a reply
ANSWER_S = 3.0  # for a reply: what takes longer is asked for in smaller parts
FAST_S = 0.5  # a whole reply that came so fast may be larger
STATUS_S = 1.0
RETRY_S = 1.0  # after a disk that refused, or a record that came damaged
SILENT_S = 4.0  # of the gateway, until people are told


class GatewayGoneError(RuntimeError):
    """The gateway was silent for follower.patience_s; the message is for people."""


@dataclass(slots=True)
class _Link:
    """How the way to the gateway is."""

    heard: float  # monotonic time of its last answer
    bytes: int = FIRST_BYTES  # to be asked for at once
    told: bool = False  # that it is silent

    def answered(self, took_s: float, size: int) -> None:
        self.heard = time.monotonic()
        if size == self.bytes and took_s < FAST_S:
            self.bytes = min(2 * self.bytes, MOST_BYTES)

    def unanswered(self) -> None:
        self.bytes = max(self.bytes // 2, LEAST_BYTES)


class Follower:
    """One run's follower on this host; owns the copy of the journal and the ring.

    Raises, with a message for people: RunFolderBusyError, RingError, JournalCorrupt, SpecChangedError, OSError.
    """

    def __init__(self, settings: FollowerSettings, paths: RunPaths, client: TrainerClient) -> None:
        self._settings, self._paths, self._client = settings, paths, client
        self._lock = JournalLock(paths.journal)
        with busy(3600.0, "reading the copy of the journal"):
            self.copy = JournalCopy(paths.journal)
        self.ring = RingWriter(settings.spec, settings.capacity_frames, paths.root, memory_share=settings.memory_share)
        self._stream = EpisodeStream(paths.root, settings.spec, follow=True)
        self._files = states(paths.root)
        self._link = _Link(time.monotonic())
        self._told_config = False
        self._gateway: dict[str, Any] = {}  # its last status document
        self._there = 0  # records of the gateway's journal, as it last said
        self._trouble: str | None = None  # of this host: its disk, what came damaged
        self._next_status = 0.0
        self._fill()

    def run(self) -> None:
        """Follow until something is raised: SystemExit by a signal, GatewayGoneError, Refused by the gateway."""
        while True:
            beat()
            try:
                self.turn()
            except OSError as error:
                trouble = disk_trouble(error)
                if trouble is None:
                    raise
                self._wait(f"{trouble}: the copy of the journal waits", RETRY_S)
            except DamagedInTransitError as damage:
                self._wait(f"{damage}; it is asked for again", RETRY_S)

    def turn(self) -> None:
        """Ask once and take what comes; a gateway that does not answer is waited for."""
        began = time.monotonic()
        reply = self._ask()
        if reply is not None:
            size = len(reply["data"])
            self._link.answered(time.monotonic() - began, size)
            self._take(reply)
            self._pace(size, began)
        self._write_status()

    def close(self) -> None:
        """Let go of the ring and the folder; what is on disk is whole."""
        self._stream.close()
        self.copy.close()
        self.ring.close()
        self._lock.release()

    def _ask(self) -> dict[str, Any] | None:
        """The gateway's answer to where this copy stands; None: there is none now."""
        mark, witness = self.copy.mark, self.copy.witness
        question: dict[str, Any] = {
            "segment": mark.position.segment,
            "offset": self.copy.received,
            "witness": None,
            "records": mark.sequence,
            "rows": self.ring.rows,
            "most": self.most,
            "files": self._files,
        }
        if witness is not None:
            at = witness.at
            question["witness"] = {"segment": at.segment, "offset": at.offset, "header": witness.header}
        if not self._told_config:
            question["config"] = config_keys(self._settings.config)
        try:
            with busy(10 * ANSWER_S, "waiting for the gateway"):
                reply = self._client.request("follow", question, timeout_ms=1e3 * ANSWER_S)
        except (ServerSilent, NotReady) as error:
            self._unanswered(error)
            return None
        self._told_config = True
        return reply

    def _unanswered(self, error: WireError) -> None:
        self._link.unanswered()
        silent_s = time.monotonic() - self._link.heard
        if not self._link.told and silent_s > SILENT_S:
            self._link.told = True
            log.warning("the gateway is silent: %s", error.message)
        if silent_s > self._settings.patience_s:
            raise GatewayGoneError(
                f"the gateway at {self._settings.gateway} has been silent for "
                f"{silent_s:.0f} s, longer than follower.patience_s={self._settings.patience_s:g}: {error.message}"
            )
        time.sleep(0.1)

    def _take(self, reply: Mapping[str, Any]) -> None:
        if self._link.told:
            self._link.told = False
            log.warning("the gateway answers again")
        at = Position(reply["segment"], reply["offset"])
        records = self.copy.take(at, reply["data"], reply["until"], reply["ends"])
        if reply["records"] is not None:
            self._there = reply["records"]
        if reply["files"]:
            for name in store(self._paths.root, reply["files"]):
                log.debug("%s has grown", name)
            self._files = states(self._paths.root)
        if records:
            self._fill()
        self._trouble = None
        if self.behind == 0:
            say_ready()

    @property
    def behind(self) -> int:
        """Records of the gateway's journal that are not here."""
        return max(0, self._there - (self.copy.mark.sequence or 0))

    def _fill(self) -> None:
        """What the copy has closed since, into the ring."""
        for closed in self._stream.poll():
            fill(self.ring, closed, closed.build())
        for unfit in self._stream.take_unfit():
            log.error("item %s of the journal does not fit and is left out: %s", unfit.name, unfit.why)

    @property
    def most(self) -> int:
        """Bytes to ask for: what the link takes, and no more than follower.mbit_s brings in a second."""
        bound = self._settings.mbit_s
        return self._link.bytes if bound is None else min(self._link.bytes, max(1, int(bound * 125_000)))

    def _pace(self, size: int, began: float) -> None:
        """Not faster than follower.mbit_s; a reply is at most a second's worth (`most`)."""
        if self._settings.mbit_s is not None:
            time.sleep(max(0.0, began + size * 8e-6 / self._settings.mbit_s - time.monotonic()))

    def _wait(self, trouble: str, seconds: float) -> None:
        if trouble != self._trouble:
            log.warning("%s", trouble)
        self._trouble = trouble
        self._write_status()
        time.sleep(seconds)

    def _write_status(self) -> None:
        """Once a second: the gateway's document as this host's, with the ring and the troubles that are here."""
        now = time.monotonic()
        if now < self._next_status:
            return
        self._next_status = now + STATUS_S
        if now - self._link.heard < STATUS_S:
            try:
                with busy(10 * ANSWER_S, "waiting for the gateway"):
                    self._gateway = self._client.request("status", {}, timeout_ms=1e3 * ANSWER_S)
            except (ServerSilent, NotReady) as error:
                log.debug("no status: %s", error.message)
        self._put_status()

    def _put_status(self) -> None:
        trouble = self.trouble()
        troubles = {**self._gateway.get("troubles", {}), **({"follower": trouble} if trouble else {})}
        own = {"name": self._settings.name, "records": self.copy.mark.sequence, "behind": self.behind}
        body = {**self._gateway, "ring": str(self.ring.path), "troubles": troubles, "follower": own}
        try:
            write_json(self._paths.status, body)
        except OSError as error:
            log.error("cannot write %s: %s", self._paths.status, error.strerror)

    def trouble(self) -> str | None:
        """What ails this host's copy, for people; None: it has what the gateway has."""
        silent_s = time.monotonic() - self._link.heard
        if silent_s > SILENT_S:
            rest = self._settings.patience_s - silent_s
            return f"the gateway is silent for {silent_s:.0f} s; the ranks here wait, for {rest:.0f} s more at most"
        if self._trouble:
            return self._trouble
        return f"{self.behind} records behind the gateway's journal" if self.behind else None
