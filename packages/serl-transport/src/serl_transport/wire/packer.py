"""msgpack without a new packer, and its buffer of 256 kB, for every message. Codec, envelope and router call it."""

import threading

import msgpack


class _Local(threading.local):
    """One packer for each thread: a packer is not re-entrant."""

    def __init__(self) -> None:
        self.pack = msgpack.Packer().pack


_local = _Local()


def packb(value: object) -> bytes:
    """`msgpack.packb(value)`; TypeError, ValueError or OverflowError for what has no form in msgpack."""
    return _local.pack(value)
