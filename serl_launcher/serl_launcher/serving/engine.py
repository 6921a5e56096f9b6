"""A policy with its newest published parameters, answering batches of observations.

The policy server (serving.server) and the local policy (serving.local) own one. Parameters are swapped between two
batches, never inside one; a file that does not fit is reported and the last good version goes on serving.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from serl_launcher.learner.parameters import Published, base_sha256, load_into
from serl_launcher.policies.base import PolicyInput, sample
from serl_transport.specs import TaskSpec

log = logging.getLogger("policy")


@dataclass(frozen=True, slots=True)
class Query:
    """One observation that wants a chunk."""

    images: dict[str, np.ndarray]  # camera -> uint8[h, w, 3]
    state: np.ndarray  # float32[s], physical units
    prompt: str
    seed: int | None = None  # of the sampling noise; None draws from the engine's generator


class PolicyEngine:
    """Serves a policy from a params folder."""

    def __init__(self, cfg: DictConfig, params_dir: Path) -> None:
        torch.set_num_threads(cfg.serving.threads)
        wanted = cfg.serving.device
        self.device = torch.device(
            "cuda" if wanted == "auto" and torch.cuda.is_available() else "cpu" if wanted == "auto" else wanted
        )
        self.spec = TaskSpec.from_dict(OmegaConf.to_container(cfg.task.spec, resolve=True))
        self.policy = instantiate(cfg.policy, spec=self.spec).to(self.device).eval()
        self._base = base_sha256(self.policy)
        self._params_dir, self._steps = params_dir, cfg.serving.flow_steps
        self._noise = torch.Generator().manual_seed(cfg.seed)
        self._seen: Published | None = None
        self.version = -1

    def refresh(self) -> bool:
        """Load the newest published version if there is a new one; True when the served version changed."""
        newest = Published.read(self._params_dir)
        if newest is None or newest == self._seen:
            return False
        self._seen = newest
        return self.load(self._params_dir / newest.file, newest.version)

    def load(self, path: Path, version: int) -> bool:
        """Serve this file as `version`; False, with the reason logged, when it does not fit."""
        try:
            self.load_or_raise(path, version)
        except (ValueError, OSError) as problem:
            log.error("version %d refused, serving %d on: %s", version, self.version, problem)
            return False
        return True

    def load_or_raise(self, path: Path, version: int) -> None:
        """Serve this file as `version`. Raises ValueError that names what does not fit."""
        load_into(self.policy, path, self._base)
        self.version = version

    @torch.inference_mode()
    def act(self, queries: list[Query]) -> np.ndarray:
        """One chunk a query: float32[b, ah, ad], physical units, within the task's limits."""
        observation = PolicyInput(
            images={camera: np.stack([q.images[camera] for q in queries]) for camera in self.spec.cameras},
            state=np.stack([q.state for q in queries]),
            prompts=[q.prompt for q in queries],
        )
        prefix = self.policy.encode(observation)
        noise = torch.cat([self._draw(q.seed) for q in queries]).to(self.device)
        chunk = sample(self.policy, prefix, noise, self._steps)
        return self.policy.physical_actions(chunk).float().cpu().numpy()

    def _draw(self, seed: int | None) -> torch.Tensor:
        generator = self._noise if seed is None else torch.Generator().manual_seed(seed)
        return torch.randn(1, self.policy.action_horizon, self.policy.action_dim, generator=generator)


def query_from_body(body: dict[str, Any], spec: TaskSpec) -> Query:
    """Validate an `infer` body. Raises ValueError naming the key, what was expected and what came."""
    from serl_transport.schema import Observation

    observation = body.get("observation")
    if not isinstance(observation, dict) or not isinstance(observation.get("images"), dict):
        raise ValueError("infer: expected observation {images: {camera: uint8[h, w, 3]}, state: float32[s]}")
    checked = Observation(images=observation["images"], state=observation.get("state"))
    spec.check_observation(checked)
    seed = body.get("seed")
    return Query(
        dict(checked.images), checked.state, str(body.get("prompt") or spec.prompt), None if seed is None else int(seed)
    )
