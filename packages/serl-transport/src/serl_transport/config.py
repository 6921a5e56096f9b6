"""The ports and limits that a server and its clients agree on (agentlace's `TrainerConfig`)."""

from dataclasses import dataclass, field

from serl_transport.wire.codec import Limits


@dataclass(frozen=True, slots=True)
class TrainerConfig:
    """Given to both `TrainerServer` and `TrainerClient`."""

    port_number: int = 5588  # experience, inference, requests; 0: any free port (server only)
    broadcast_port: int = 5589  # notifications; 0: any free port (server only)
    request_types: list[str] = field(default_factory=list)  # what `request_callback` answers
    bind_host: str = "127.0.0.1"  # where the server listens; anything but loopback needs keys or insecure=True
    insecure: bool = False  # allow an unprotected bind beyond loopback, with a warning
    keys_dir: str | None = None  # folder of CURVE keys (see keys.py); None: no keys
    allow_list: str | None = None  # server only: who may do what; None: <keys_dir>/allow_list
    limits: Limits = field(default_factory=Limits)  # bounds of a message
    version: str = "0.1.0"  # of the application; the handshake refuses another one
    peer_timeout_s: float = 60.0  # a connection silent for longer is forgotten and must say hello again

    def __post_init__(self) -> None:
        for key in ("port_number", "broadcast_port"):
            port = getattr(self, key)
            if type(port) is not int or not 0 <= port <= 65535:
                raise ValueError(f"{key}: expected a port from 0 to 65535, got {port!r}")
        if self.port_number and self.port_number == self.broadcast_port:
            raise ValueError(f"port_number and broadcast_port must differ, both are {self.port_number}")
        if self.allow_list is not None and self.keys_dir is None:
            raise ValueError("security.allow_list names keys, and there are none: give security.keys_dir too")
