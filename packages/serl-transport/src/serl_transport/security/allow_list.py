"""Who may do what: public keys and their roles, from a file that is read again whenever it changes.

    # role    name     public key
    actor     robot-1  E]y)JJ(IZ*...
    operator  alice    Yne@$w-vo<...
    follower  host-1   m)x^R#4tQ%...

An actor may push, infer and ask; an operator may also say what the run is to do (OPERATOR_REQUESTS); a follower, a
trainer's host beyond the first, reads the journal and the status and does nothing else. A name binds the key to one
`unique_identifier`; `*` leaves it open. The authenticator asks `lookup` per connection, the router `permit` per
message, so that a line taken out of the file ends a running connection's rights within a second. A file that cannot be
read admits nobody.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from serl_transport.contract.bounds import shown
from serl_transport.contract.errors import Unauthorized
from serl_transport.security.files import check_unwritable
from serl_transport.security.keys import check_key
from serl_transport.wire.envelope import Envelope

log = logging.getLogger(__name__)

ROLES = ("actor", "operator", "follower")
ACTOR_KINDS = frozenset({"hello", "heartbeat", "data", "infer", "request"})
OPERATOR_REQUESTS = frozenset(
    ["pause", "resume", "training_pause", "training_resume", "verdict", "serve", "set", "end_stage", "publish", "stop"]
) | {"drive"}  # from a page of the console
FOLLOW = "follow"  # the request for what the journal got since
FILE = "file"  # the request for a part of a checkpoint, or of a published version
FOLLOWER_REQUESTS = frozenset({FOLLOW, FILE, "status"})
CHECK_S = 1.0


@dataclass(frozen=True, slots=True)
class Entry:
    """One line."""

    role: str  # one of ROLES
    name: str  # the unique_identifier it may use; *: any
    key: bytes  # public, 40 characters of Z85


class AllowList:
    """Owns the file's newest content. One thread. on_revoked: called when a key is not listed any more."""

    def __init__(self, path: str | Path):
        """Read it; ValueError names the line that is wrong."""
        self.path = Path(path)
        self.on_revoked: Callable[[], None] = lambda: None
        self._stamp = self._look()
        self._entries = read_allow_list(self.path)
        self._next_look = time.monotonic() + CHECK_S

    def lookup(self, key: bytes) -> Entry | None:
        """The line of a public key, None for a stranger."""
        self.refresh()
        return self._entries.get(key)

    def permit(self, key: bytes, envelope: Envelope) -> None:
        """Raise Unauthorized unless this key's role allows this message."""
        entry = self.lookup(key)
        if entry is None:
            raise Unauthorized("this key is not in the learner's allow-list (any more)")
        if entry.name not in ("*", envelope.actor_id):
            raise Unauthorized(f"this key belongs to {entry.name!r}, not to {shown(envelope.actor_id)}")
        if envelope.kind not in ACTOR_KINDS:
            raise Unauthorized(f"role {entry.role} may not send {shown(envelope.kind)}")
        if envelope.kind == "request" and envelope.target in OPERATOR_REQUESTS and entry.role != "operator":
            raise Unauthorized(f"{envelope.target}: expected an operator's key, {entry.name!r} has role {entry.role}")

        reads = envelope.kind != "request" or envelope.target in FOLLOWER_REQUESTS
        if entry.role == "follower" and (envelope.kind in ("data", "infer") or not reads):
            raise Unauthorized(f"{entry.name!r} has role follower, which reads the journal and the status alone")
        if envelope.kind == "request" and envelope.target in (FOLLOW, FILE) and entry.role != "follower":
            raise Unauthorized(f"{envelope.target}: expected a follower's key, {entry.name!r} has role {entry.role}")

    def refresh(self) -> None:
        """Read the file again when it has changed; looked at once a second at most."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + CHECK_S
        stamp = self._look()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        before = self._entries.keys()
        try:
            self._entries = read_allow_list(self.path)
            log.info("allow-list %s: %d keys", self.path, len(self._entries))
        except ValueError as error:
            self._entries = {}
            log.error("nobody is admitted until this is mended: %s", error)
        if before - self._entries.keys():
            self.on_revoked()

    def _look(self) -> tuple[int, ...] | None:
        try:
            stat = self.path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino, stat.st_mode


def read_allow_list(path: Path) -> dict[bytes, Entry]:
    """Key -> entry. ValueError names file, line, what was expected and what came."""
    try:
        check_unwritable(path)
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the allow-list {path}: {error}; tools/keygen.py writes one") from None
    entries: dict[bytes, Entry] = {}
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.startswith("#"):
            entry = _read_line(line, f"{path} line {number}")
            if entry.key in entries:
                raise ValueError(f"{path} line {number}: this key is listed already, as {entries[entry.key].name!r}")
            entries[entry.key] = entry
    return entries


def _read_line(line: str, where: str) -> Entry:
    parts = line.split()
    if len(parts) != 3:
        raise ValueError(f"{where}: expected 'role name public-key', got {len(parts)} words")
    role, name, key = parts
    if role not in ROLES:
        raise ValueError(f"{where}: expected role actor, operator or follower, got {role!r}")
    return Entry(role, name, check_key(key, where))
