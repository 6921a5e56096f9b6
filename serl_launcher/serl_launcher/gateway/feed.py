"""The journal for hosts beyond the first: a follower asks for what comes after its copy, and waits until there is some.

    follower ── follow {segment, offset, …} ─▶ Feed.take ─▶ [ queue ] ─▶ thread: read ─▶ reply {data, until, files, …}
                                                                     └ nothing new: looked at again, up to WAIT_S

Bytes of a segment go out as they lie there and never beyond the durable mark, so a copy never holds what the writer may
still take back. The thread reads files alone; the loop only queues. What each follower has goes into the status.
"""

import os
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from serl_launcher.replay.durable import MARK_FILE, Position, read_mark
from serl_launcher.replay.journal import RECORD_HEADER, segment_path
from serl_launcher.run.followed import Offered, config_keys
from serl_launcher.run.paths import RunPaths
from serl_transport.connection.router import Peer, Reply
from serl_transport.contract.bounds import INT64, check_text, check_whole, shown
from serl_transport.contract.errors import BadFrame, NotReady, Refused, SchemaMismatch, Unauthorized, WireError
from serl_transport.security.allow_list import FILE
from serl_transport.wire.envelope import Envelope

WAIT_S = 1.0  # a question that nothing new answers is answered then
LOOK_S = 0.05  # between two looks for something new, while a follower waits
MOST_BYTES = 8 << 20  # of a reply
SILENT_S = 4.0  # a follower asks at least once in WAIT_S
FORGET_S = 600.0
FOLLOWERS = 64  # names that are remembered
FETCHED = re.compile(r"checkpoints/step_\d+/[a-z]+\.(json|pt|safetensors)|params/v\d+\.(json|safetensors)")


@dataclass(frozen=True, slots=True)
class Question:
    """What a follower has, validated."""

    name: str
    token: bytes
    at: Position  # where its copy goes on
    witness: tuple[Position, bytes] | None  # its last record: where it begins, and its header
    records: int  # in its copy
    rows: int  # of its ring
    most: int  # bytes that it takes
    files: Mapping[str, Any]  # name -> [bytes, crc32]
    until: float = field(default_factory=lambda: time.monotonic() + WAIT_S)


@dataclass(frozen=True, slots=True)
class FileQuestion:
    """A part of a checkpoint or a version that a rank of another host goes on from, validated."""

    token: bytes
    name: str  # inside the run folder
    offset: int
    most: int


class Feed:
    """reply: answers by token, from any thread. config: of this run, which every host must have."""

    def __init__(
        self, paths: RunPaths, run: str, config: Mapping[str, Any], reply: Callable[[bytes, Reply], None]
    ) -> None:
        self._root, self._journal, self._run, self._reply = paths.root, paths.journal, run, reply
        self._offered = Offered(paths.root)
        self._keys = config_keys(config)
        self._queue: queue.SimpleQueue[Question | FileQuestion | None] = queue.SimpleQueue()
        self._seen: dict[str, tuple[float, Question]] = {}  # follower -> monotonic time of its last question
        self._thread: threading.Thread | None = None

    def take(self, peer: Peer, envelope: Envelope, body: dict[str, Any]) -> None:
        """One `follow` or `file` request; answered by the thread. Unauthorized, BadFrame, SchemaMismatch, Refused."""
        if peer.role != "follower":
            raise Unauthorized(f"{envelope.target}: expected a follower's connection, this one is of role {peer.role}")
        if envelope.target == FILE:
            self._ask_file(envelope.token, body)
        else:
            self._ask(peer, envelope.token, body)

    def _ask(self, peer: Peer, token: bytes, body: dict[str, Any]) -> None:
        if body.get("config") is not None:
            self._compare(body["config"])
        question = _question(peer.actor_id, token, body)
        if len(self._seen) < FOLLOWERS or question.name in self._seen:
            self._seen[question.name] = (time.monotonic(), question)
        self._put(question)

    def _ask_file(self, token: bytes, body: dict[str, Any]) -> None:
        try:
            name = check_text("name", body.get("name"), 256)
            question = FileQuestion(
                token, name, _whole(body, "offset"), check_whole("most", body.get("most"), 1, MOST_BYTES)
            )
        except (ValueError, KeyError) as error:
            raise SchemaMismatch(f"file: {error}") from None
        if not FETCHED.fullmatch(name):
            raise Refused(f"file: expected a file of a checkpoint or of params/, got {shown(name)}")
        self._put(question)

    def _put(self, question: Question | FileQuestion) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._serve, name="feed", daemon=True)
            self._thread.start()
        self._queue.put(question)

    def to_status(self) -> dict[str, dict[str, Any]]:
        """Follower -> what it had when it last asked, and how far that is behind."""
        now, mark = time.monotonic(), None
        self._seen = {name: seen for name, seen in self._seen.items() if now - seen[0] < FORGET_S}
        if self._seen:
            mark = read_mark(self._journal)
        sequence = mark.sequence if mark is not None and mark.sequence is not None else None
        return {
            name: {
                "records": question.records,
                "behind": None if sequence is None else max(0, sequence - question.records),
                "rows": question.rows,
                "last_seen_s": round(now - at, 1),
            }
            for name, (at, question) in self._seen.items()
        }

    def troubles(self) -> dict[str, str]:
        """Followers that are silent, for people."""
        now = time.monotonic()
        return {
            f"follower {name}": f"silent for {now - at:.0f} s: the ranks of its host wait for what came since"
            for name, (at, _) in self._seen.items()
            if SILENT_S < now - at < FORGET_S
        }

    def close(self) -> None:
        """No more answers."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()

    def _compare(self, theirs: Any) -> None:
        if not isinstance(theirs, dict):
            raise BadFrame("follow: config: expected {key: digest}")
        names = sorted(key for key in self._keys.keys() | theirs.keys() if self._keys.get(key) != theirs.get(key))
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise Refused(
                f"the config differs from the learner's in {', '.join(map(str, names[:5]))}{more}: start every host of "
                "the run with the same words, but for launch.machine_rank"
            )

    # In the thread.

    def _serve(self) -> None:
        waiting: list[Question] = []
        while True:
            try:
                question = self._queue.get(timeout=LOOK_S if waiting else None)
            except queue.Empty:
                question = False
            if question is None:
                return
            if isinstance(question, FileQuestion):
                self._answer_file(question)
                question = False
            waiting = [q for q in [*waiting, *([question] if question else [])] if not self._answer(q)]

    def _answer_file(self, question: FileQuestion) -> None:
        path = self._root / question.name
        try:
            data = _read(path, question.offset, question.most)
            answer: Reply = {"size": path.stat().st_size, "data": np.frombuffer(data, np.uint8)}
        except OSError as error:
            answer = Refused(f"{question.name} cannot be read on the first host: {error.strerror}")
        self._reply(question.token, answer)

    def _answer(self, question: Question) -> bool:
        """Send what is new; False while there is nothing and the question may wait."""
        try:
            answer: Reply = self._found(question)
        except WireError as error:
            answer = error
        except OSError as error:
            answer = NotReady(f"the journal cannot be read: {error.strerror}")
        nothing = isinstance(answer, dict) and not (len(answer["data"]) or answer["ends"] or answer["files"])
        if nothing and time.monotonic() < question.until:
            return False
        self._reply(question.token, answer)
        return True

    def _found(self, question: Question) -> dict[str, Any]:
        mark = read_mark(self._journal)
        if mark is None:
            raise NotReady(f"{self._journal / MARK_FILE} cannot be read")
        self._check_witness(question)
        at = question.at
        ends = at.segment < mark.position.segment
        path = segment_path(self._journal, at.segment)
        until = path.stat().st_size if ends else mark.position.offset if at.segment == mark.position.segment else 0
        data = _read(path, at.offset, min(question.most, until - at.offset)) if until > at.offset else b""
        return {
            "segment": at.segment,
            "offset": at.offset,
            "data": np.frombuffer(data, np.uint8),
            "until": until,
            "ends": ends,
            "records": mark.sequence,
            "files": self._offered.news(question.files),
        }

    def _check_witness(self, question: Question) -> None:
        if question.witness is None:
            return
        at, header = question.witness
        try:
            mine = _read(segment_path(self._journal, at.segment), at.offset, RECORD_HEADER.size)
        except FileNotFoundError:
            mine = b""
        if mine != header:
            raise Refused(
                f"the copy of the journal on {question.name} is of another run than {self._run!r}: its last record, at "
                f"segment {at.segment} byte {at.offset}, is not in this journal. Give both hosts the same run=, or "
                "move the run's folder on that host aside"
            )


def _question(name: str, token: bytes, body: Mapping[str, Any]) -> Question:
    """SchemaMismatch names what no follower would say."""
    try:
        at = Position(check_whole("segment", body.get("segment"), 1, INT64), _whole(body, "offset"))
        records, rows = _whole(body, "records"), _whole(body, "rows")
        most = check_whole("most", body.get("most"), 1, MOST_BYTES)
        witness, files = body.get("witness"), body.get("files")
        found = None
        if witness is not None:
            place = Position(check_whole("witness", witness["segment"], 1, INT64), _whole(witness, "offset"))
            found = (place, bytes(witness["header"]))
        states = {check_text("files", key, 64): (_whole(row, 0), _whole(row, 1)) for key, row in files.items()}
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise SchemaMismatch(f"follow: {error}") from None
    return Question(name, token, at, found, records, rows, most, states)


def _whole(body: Any, key: Any) -> int:
    return check_whole(str(key), body[key], 0, INT64)


def _read(path: Any, offset: int, size: int) -> bytes:
    file = os.open(path, os.O_RDONLY)
    try:
        return os.pread(file, size, offset)
    finally:
        os.close(file)
