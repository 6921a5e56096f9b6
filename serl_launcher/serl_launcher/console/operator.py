"""The console as an operator of the gateway: what a person does at the page goes out as tools/operate.py sends it.

    page ─▶ app ─▶ ConsoleOperator.request() ─▶ TrainerClient, role operator ─▶ gateway, which decides and answers

With keys it acts by a key of its own name (console.name); which person it was the payload says.
"""

import threading
from typing import Any

from omegaconf import DictConfig, OmegaConf

from serl_transport import TrainerClient, TrainerConfig
from serl_transport.contract.errors import Refused

FRAME_MS, ACT_MS = 3000, 10_000
SERVE_MS = 60_000  # it compares the checksum of a version, which may be large


class ConsoleOperator:
    """One connection, opened by the first request. Thread-safe; every call may wait for some seconds."""

    def __init__(self, name: str, host: str, config: TrainerConfig) -> None:
        self._name, self._host, self._config = name, host, config
        self._lock = threading.Lock()
        self._client: TrainerClient | None = None

    @staticmethod
    def of(cfg: DictConfig) -> "ConsoleOperator":
        """Of a run's config."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(cfg.bind_host, cfg.bind_host)
        keys_dir = OmegaConf.select(cfg, "security.keys_dir")
        config = TrainerConfig(port_number=cfg.port, broadcast_port=cfg.broadcast_port, keys_dir=keys_dir)
        return ConsoleOperator(cfg.console.name, host, config)

    def request(self, kind: str, payload: dict[str, Any]) -> dict[str, Any]:
        """The gateway's answer. Raises its typed WireError, or Refused where this console has no key to act by."""
        timeout_ms = {"drive": FRAME_MS, "serve": SERVE_MS}.get(kind, ACT_MS)
        return self._connected().request(kind, payload, timeout_ms=timeout_ms)

    def close(self) -> None:
        """Hang up."""
        with self._lock:
            if self._client is not None:
                self._client.stop()
                self._client = None

    def _connected(self) -> TrainerClient:
        with self._lock:
            if self._client is None:
                try:
                    self._client = TrainerClient(
                        self._name, self._host, self._config,
                        role="operator", wait_for_server=False, timeout_ms=FRAME_MS,
                    )  # fmt: skip
                except ValueError as mistake:  # no key file
                    raise Refused(f"this console may only look: {mistake}, --operator {self._name}") from None
            return self._client
