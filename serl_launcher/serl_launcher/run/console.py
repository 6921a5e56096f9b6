"""Where the console of a run is found, and the word that opens it: runs/<name>/console.json, mode 0600.

    learner's main ─▶ lay_out() ─▶ console.json ─▶ read() ◀─ console role
                          └▶ url ─▶ the learner's screen

Laid out once a start and kept from one start to the next, so that an open page finds a console that was started again.
"""

import secrets
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

from omegaconf import DictConfig

from serl_config.secrets import check_private
from serl_launcher.run.files import DamagedFileError, read_sealed, write_sealed
from serl_launcher.run.paths import RunPaths
from serl_transport.contract.bounds import check_name, check_whole
from serl_transport.security.auth import is_loopback

USUAL_PORT = 5592  # of console.port=auto, where it is free
_KEYS = ("host", "port", "token", "tls")


@dataclass(frozen=True, slots=True)
class ConsolePlace:
    """Where a console listens and what opens it."""

    host: str  # where it listens
    port: int  # there
    token: str  # opens it; 144 bits, URL-safe
    tls: bool  # https and wss

    @property
    def url(self) -> str:
        """What a person opens, on this machine where it listens everywhere."""
        host = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(self.host, self.host)
        return f"http{'s' if self.tls else ''}://{f'[{host}]' if ':' in host else host}:{self.port}/?t={self.token}"

    def __repr__(self) -> str:
        return f"ConsolePlace({self.host}:{self.port})"  # never the token


def check_console(cfg: DictConfig) -> None:
    """ValueError names the key of `console` that cannot be used as meant."""
    console = cfg.get("console")
    if not console or console.port is None:
        return
    if console.port != "auto":
        check_whole("console.port", console.port, 1, 65535)
        for key in ("port", "broadcast_port"):
            if cfg.get(key) == console.port:
                raise ValueError(f"console.port and {key} are both {console.port}; they must differ")
    cert, key = console.get("tls_cert"), console.get("tls_key")
    if (cert is None) != (key is None):
        raise ValueError("console.tls_cert and console.tls_key: expected both or none")
    for name, path in (("tls_cert", cert), ("tls_key", key)):
        if path is not None and not Path(path).is_file():
            raise ValueError(f"console.{name}: no file {path}")
    if key is not None:
        check_private(Path(key), "console.tls_key", others=0o007)
    check_name("console.name", console.name)
    if not is_loopback(console.host) and key is None and not cfg.insecure:
        raise ValueError(
            f"console.host={console.host}: whoever listens on that network could read the console's word; give "
            "console.tls_cert and console.tls_key, or insecure=true if that network is yours alone, or keep 127.0.0.1 "
            "and use an ssh tunnel"
        )


def lay_out(cfg: DictConfig, paths: RunPaths) -> ConsolePlace | None:
    """Settle port and word, keep them, and return them; None: this run has no console.

    ValueError as `check_console`, or for a port that is taken; OSError: the disk refuses.
    """
    check_console(cfg)
    console = cfg.get("console")
    if not console or console.port is None:
        return None
    before = _before(_path(paths))
    port = console.port
    if port == "auto":
        port = _free_port(console.host, [before.port] if before else [], USUAL_PORT)
    elif problem := _problem(console.host, port):
        raise ValueError(f"console.port={port} on {console.host}: {problem}; name another, or console.port=auto")
    token = before.token if before else secrets.token_urlsafe(18)
    place = ConsolePlace(console.host, port, token, console.get("tls_key") is not None)
    if place != before:
        write_sealed(_path(paths), asdict(place), mode=0o600)
    return place


def read(paths: RunPaths) -> ConsolePlace:
    """What `lay_out` kept. ValueError: it is not there, damaged, or others may read it."""
    check_private(_path(paths), "the console's word")
    body = read_sealed(_path(paths), _KEYS, _KEYS)
    assert body is not None
    return ConsolePlace(**body)


def _path(paths: RunPaths) -> Path:
    return paths.root / "console.json"


def _before(path: Path) -> ConsolePlace | None:
    """Of an earlier start; a file that cannot be used, or that others could read, is made anew."""
    try:
        check_private(path, "")
        body = read_sealed(path, _KEYS, _KEYS)
    except (DamagedFileError, ValueError):
        return None
    return None if body is None else ConsolePlace(**body)


def _free_port(host: str, wanted: list[int], usual: int) -> int:
    """The first of these that is free, else any."""
    return next((port for port in (*wanted, usual) if not _problem(host, port)), 0) or _any_port(host)


def _any_port(host: str) -> int:
    with _bound(host, 0) as probe:
        return probe.getsockname()[1]


def _problem(host: str, port: int) -> str:
    try:
        _bound(host, port).close()
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return ""


def _bound(host: str, port: int) -> socket.socket:
    family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    probe = socket.socket(family, kind, proto)
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        probe.bind(address)
    except OSError:
        probe.close()
        raise
    return probe
