"""CURVE key files: one pair per party, made by tools/keygen.py, read by servers and clients.

    <keys_dir>/learner.public      everyone: the learner's public key
    <keys_dir>/learner.secret      the learner only, mode 0600
    <keys_dir>/<name>.secret       that actor or operator only, mode 0600
    <keys_dir>/allow_list          the learner only (see allow_list.py)

A secret file holds both halves. Keys are 40 characters of Z85 (ZeroMQ RFC 32). Every mistake is a ValueError that
names the file and what to do.
"""

import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from serl_transport.security.files import check_private, check_unwritable

LEARNER = "learner"
_Z85_CHARS = 40


@dataclass(frozen=True, slots=True)
class KeyPair:
    """One party's identity."""

    public: bytes  # 40 characters of Z85
    secret: bytes = field(repr=False)  # 40 characters of Z85

    @classmethod
    def new(cls) -> "KeyPair":
        """A fresh random pair."""
        return cls(*zmq.curve_keypair())


@dataclass(frozen=True, slots=True)
class ServerKeys:
    """What a listening socket needs."""

    pair: KeyPair

    @classmethod
    def load(cls, keys_dir: str | Path) -> "ServerKeys":
        """From `learner.secret`."""
        return cls(read_secret(Path(keys_dir) / f"{LEARNER}.secret"))


@dataclass(frozen=True, slots=True)
class ClientKeys:
    """What a connecting socket needs."""

    pair: KeyPair
    server: bytes  # the learner's public key: nobody else can pose as the learner

    @classmethod
    def load(cls, keys_dir: str | Path, name: str) -> "ClientKeys":
        """From `<name>.secret` and `learner.public`."""
        folder = Path(keys_dir)
        return cls(read_secret(folder / f"{name}.secret"), read_public(folder / f"{LEARNER}.public"))


def write_pair(folder: Path, name: str, pair: KeyPair) -> None:
    """Write `<name>.secret` (0600) and `<name>.public`. FileExistsError leaves what is there untouched."""
    public = f"public {pair.public.decode()}\n"
    secret = f"# secret key of {name}: it stays on its machine\n{public}secret {pair.secret.decode()}\n"
    _create(folder / f"{name}.secret", secret, 0o600)
    _create(folder / f"{name}.public", public, 0o644)


def read_public(path: Path) -> bytes:
    """The public key in a file that nobody else may change."""
    public = _read(path, "public")["public"]
    check_unwritable(path)
    return public


def read_secret(path: Path) -> KeyPair:
    """The pair in a secret file that nobody else may read or change."""
    lines = _read(path, "public", "secret")
    check_private(path)
    if zmq.curve_public(lines["secret"]) != lines["public"]:
        raise ValueError(f"{path}: its public key belongs to another secret; make new keys with tools/keygen.py")
    return KeyPair(lines["public"], lines["secret"])


def check_key(text: str, where: str) -> bytes:
    """A key as bytes; ValueError naming `where` unless it is 40 characters of Z85."""
    key = text.encode("ascii", "replace")
    try:
        whole = len(key) == _Z85_CHARS and len(zmq.utils.z85.decode(key)) == 32
    except (KeyError, ValueError, ArithmeticError, struct.error):  # struct: five characters that say more than 32 bits
        whole = False
    if not whole:
        raise ValueError(f"{where}: expected a key of {_Z85_CHARS} Z85 characters, got {len(text)} characters")
    return key


def _read(path: Path, *wanted: str) -> dict[str, bytes]:
    try:
        text = path.read_text(encoding="ascii")
    except FileNotFoundError:
        raise ValueError(
            f"no key file {path}: make keys with tools/keygen.py and point security.keys_dir at their folder"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the key file {path}: {error}") from None
    found = dict(line.split(maxsplit=1) for line in text.splitlines() if len(line.split()) == 2)
    for word in wanted:
        if word not in found:
            raise ValueError(f"{path} has no line '{word} <key>'; make new keys with tools/keygen.py")
    return {word: check_key(found[word], f"{path}: {word}") for word in wanted}


def _create(path: Path, text: str, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "w") as file:
        os.fchmod(descriptor, mode)  # whatever the umask says
        file.write(text)
