"""Watches for new parameters beside the serving thread and makes them ready. Owned by the policy server.

params/latest.json ─▶ every PERIOD_S: engine.stage() ─▶ engine.swap(), by the serving thread, between two batches
"""

from __future__ import annotations

import logging
import threading

from serl_launcher.serving.engine import PolicyEngine

log = logging.getLogger("policy")
PERIOD_S = 0.05


class ParameterLoader:
    """One daemon thread; a failure is logged and the next version is tried."""

    def __init__(self, engine: PolicyEngine) -> None:
        self._engine = engine
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="parameter-loader", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(PERIOD_S):
            try:
                self._engine.stage()
            except Exception:
                log.exception("looking for new parameters failed; serving version %d on", self._engine.version)
