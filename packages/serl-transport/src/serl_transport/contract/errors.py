"""What may go wrong on the wire, each with a stable code.

Servers raise these in handlers and send `to_body()`; clients turn the code back into the same class with `from_code`.
A message says what was expected, what came, and what to change. It may quote a stranger and ends on a terminal: it is
one line without control characters, and not longer than MESSAGE_CHARACTERS.
"""
# ruff: noqa: N818  (the names are the contract: they read as what happened)

from serl_transport.contract.bounds import printable

MESSAGE_CHARACTERS = 2000


class WireError(Exception):
    """Base of every error that a reply can carry; `code` is stable across versions, `message` is for people."""

    code = "internal"

    def __init__(self, message: str):
        short = message if len(message) <= MESSAGE_CHARACTERS else f"{message[:MESSAGE_CHARACTERS]}…"
        self.message = printable(short)
        super().__init__(self.message)

    def to_body(self) -> dict[str, str]:
        """The error as it travels: `{code, message}`."""
        return {"code": self.code, "message": self.message}

    @staticmethod
    def from_code(code: str, message: str) -> "WireError":
        """The class of `code` with `message`; a code of a newer version becomes a plain `WireError` naming it."""
        known = _BY_CODE.get(code)
        return known(message) if known else WireError(f"{code[:64]}: {message}")


class ProtocolMismatch(WireError):
    """The two sides speak different protocol versions."""

    code = "protocol_mismatch"


class SchemaMismatch(WireError):
    """The two sides, or a batch and the task, disagree about the task's spec."""

    code = "schema_mismatch"


class BadFrame(WireError):
    """Bytes that are no message of ours: wrong header, dtype, byte count, depth or key."""

    code = "bad_frame"


class Corrupt(WireError):
    """The message was changed on its way (its checksum differs): send it again."""

    code = "corrupt"


class TooLarge(WireError):
    """A message above the agreed limits."""

    code = "too_large"


class Unauthorized(WireError):
    """The peer may not do this."""

    code = "unauthorized"


class HelloRequired(WireError):
    """The server does not know this connection (it restarted, or the link was cut): say hello again, then re-send."""

    code = "hello_required"


class NotReady(WireError):
    """Right request, too early: ask again later."""

    code = "not_ready"


class DeadlineMissed(WireError):
    """The question waited past its deadline and was not executed: its answer would have come too late."""

    code = "deadline_missed"


class Refused(WireError):
    """A well-formed request that will never be accepted as it stands."""

    code = "refused"


class StorageFull(WireError):
    """The learner's disk is full: keep the item and ask again later."""

    code = "storage_full"


class UnknownKind(WireError):
    """No handler for this kind of message or request type."""

    code = "unknown_kind"


class Internal(WireError):
    """A handler failed for a reason that is not the sender's; the server's log has the traceback."""

    code = "internal"


class ServerSilent(WireError):
    """Client side only: no reply came within the timeout."""

    code = "server_silent"


_BY_CODE: dict[str, type[WireError]] = {
    kind.code: kind
    for kind in (
        ProtocolMismatch,
        SchemaMismatch,
        BadFrame,
        Corrupt,
        TooLarge,
        Unauthorized,
        HelloRequired,
        NotReady,
        DeadlineMissed,
        Refused,
        StorageFull,
        UnknownKind,
        Internal,
        ServerSilent,
    )
}


class SpoolError(Exception):
    """The actor's spool cannot be used; the message says why and what to change."""


class SpoolFull(SpoolError):
    """The spool has reached its bound, or its disk is full: the item was not kept."""


class SpoolBusy(SpoolError):
    """Another live process holds the spool of this `unique_identifier`."""


class CannotListen(Exception):
    """The server cannot bind its port: in use, not permitted, or no such address."""
