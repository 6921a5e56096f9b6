"""The policy inside an actor's process: the same engine, fed by parameters pulled from the learner.

Named by `rollout.local_policy` in yaml and built by the actor when `rollout.policy=local`; answers like the remote
policy. Evaluating a finished run needs no learner: `checkpoint_path=runs/<name>`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from serl_transport.errors import NotReady

from serl_launcher.learner.parameters import Published, find_parameters
from serl_launcher.serving.engine import PolicyEngine, query_from_body


class LocalPolicy:
    """`infer(body) -> {actions, policy_version, server_ms}` in this process."""

    def __init__(self, cfg: DictConfig, params_dir: Path) -> None:
        self._engine = PolicyEngine(cfg, params_dir)

    @classmethod
    def from_checkpoint(cls, cfg: DictConfig) -> LocalPolicy:
        """Serve `cfg.checkpoint_path` and nothing newer. Raises FileNotFoundError or ValueError in the user's words."""
        path = find_parameters(cfg.checkpoint_path)
        policy = cls(cfg, path.parent)
        published = Published.read(path.parent)
        version = published.version if published and published.file == path.name else 0
        policy._engine.load_or_raise(path, version)
        return policy

    def refresh(self) -> bool:
        """Take the newest parameters of the folder; called between chunks. True when the version changed."""
        return self._engine.refresh()

    def infer(self, body: dict[str, Any]) -> dict[str, Any]:
        """Answer an `infer` body as the policy server would. Raises NotReady below `min_version`."""
        started = time.perf_counter()
        wanted = int(body.get("min_version") or 0)
        if self._engine.version < wanted:
            self._engine.refresh()
        if self._engine.version < wanted:
            raise NotReady(f"policy version {wanted} wanted, {self._engine.version} is served")
        actions = self._engine.act([query_from_body(body, self._engine.spec)])[0]
        return {
            "actions": actions,
            "policy_version": self._engine.version,
            "server_ms": (time.perf_counter() - started) * 1e3,
        }
