"""The policy inside an actor's process: the same engine, fed by parameters pulled from the learner.

`rollout.local_policy` in yaml names `build`; the actor calls it when `rollout.policy=local`. Answers like the remote
policy. Evaluating a finished run needs no learner: `ip=null checkpoint_path=runs/<name>`.

    learner ──5589 notify, 5588 params──▶ listener thread ─▶ folder/latest.json ─▶ stage ─▶ swap, between two chunks
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from serl_launcher.run.parameters import find_parameters, store, version_of
from serl_launcher.serving.engine import PolicyEngine
from serl_launcher.serving.query import query_from_body
from serl_transport.client import TrainerClient
from serl_transport.contract.errors import NotReady
from serl_transport.parameters.params import ParametersBlob


def build(cfg: DictConfig, link: TrainerClient) -> LocalPolicy:
    """The policy of `checkpoint_path`, fixed; without one, the learner's newest, followed as it trains.

    Raises ValueError or FileNotFoundError in the user's words.
    """
    if cfg.checkpoint_path:
        return LocalPolicy.from_checkpoint(cfg)
    if cfg.ip is None:
        raise ValueError("rollout.policy=local with ip=null needs checkpoint_path=runs/<name> or a parameters file")
    folder = tempfile.TemporaryDirectory(prefix="flowserl-params-")
    policy = LocalPolicy(cfg, Path(folder.name), owned=folder)

    def keep(blob: ParametersBlob) -> None:
        store(Path(folder.name), blob.version, blob.blob, time.time())
        policy.stage()

    link.recv_network_callback(keep, raw=True)
    return policy


class LocalPolicy:
    """`infer(body) -> {actions, policy_version, server_ms}` in this process."""

    def __init__(self, cfg: DictConfig, params_dir: Path, *, owned: tempfile.TemporaryDirectory | None = None) -> None:
        """params_dir: where `stage` looks; owned: a folder that lives as long as this policy."""
        self._engine = PolicyEngine(cfg, params_dir)
        self._owned = owned
        self._engine.stage()
        self._engine.warm_up()

    @classmethod
    def from_checkpoint(cls, cfg: DictConfig) -> LocalPolicy:
        """Serve `cfg.checkpoint_path` and nothing newer. Raises FileNotFoundError or ValueError in the user's words."""
        path = find_parameters(cfg.checkpoint_path)
        policy = cls(cfg, path.parent)
        policy._engine.stage_file(path, version_of(path))
        policy._engine.swap()
        return policy

    def stage(self) -> None:
        """Make the newest parameters of the folder ready for the next question; not in the control loop's thread."""
        self._engine.stage()

    def reset(self) -> None:
        """A new episode; there is nothing to forget."""

    def infer(self, body: dict[str, Any]) -> dict[str, Any]:
        """Answer an `infer` body as the policy server would. Raises NotReady below `min_version`."""
        started = time.perf_counter()
        wanted = int(body.get("min_version") or 0)
        self._engine.swap()
        if self._engine.version < wanted:
            raise NotReady(f"policy version {wanted} was asked for, {self._engine.version} is here")
        actions = self._engine.act([query_from_body(body, self._engine.spec)])[0]
        return {
            "actions": actions,
            "policy_version": self._engine.version,
            "server_ms": (time.perf_counter() - started) * 1e3,
        }
