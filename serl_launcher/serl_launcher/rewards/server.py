"""The reward server role: actors send an observation, it answers what the classifier says of it.

Started by the supervisor as `python -m serl_launcher.rewards <run_dir>` where `reward.model` is set, on `reward.port`.
Same transport, handshake, limits and keys as the gateway. Request `reward`:

    {images: {camera: uint8[h, w, 3]}, state: float32[s]}
      -> {kind, probabilities: float32[classes], threshold, patience}

Verdicts over an episode (patience, stages) are the actor's: the server keeps nothing of anybody.
"""

import logging
import signal
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from serl_launcher.rewards.model import RewardClassifier, load
from serl_launcher.run.alive import beat
from serl_launcher.run.config import read_config, task_spec
from serl_launcher.run.paths import RunPaths
from serl_launcher.run.ready import say_ready
from serl_transport.config import TrainerConfig
from serl_transport.contract.errors import CannotListen, Internal, SchemaMismatch
from serl_transport.contract.schema import Observation
from serl_transport.contract.specs import TaskSpec, all_finite
from serl_transport.server import TrainerServer

log = logging.getLogger("reward")


class RewardServer:
    """Serves one classifier. Raises ValueError when it was trained on another task."""

    def __init__(self, model: RewardClassifier, spec: TaskSpec, config: TrainerConfig) -> None:
        lines = spec.differences(model.card.spec, "of this run", "of the reward model")
        if lines:
            raise ValueError("reward.model was trained on another task:\n  " + "\n  ".join(lines))
        self._model, self._spec = model, spec
        self.server = TrainerServer(config, request_callback=self._answer, spec=spec)

    def _answer(self, kind: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            observation = Observation(images=body["images"], state=body["state"])
            self._spec.check_observation(observation)
        except (KeyError, TypeError, ValueError) as mistake:
            raise SchemaMismatch(f"reward: expected {{images, state}} of the task: {mistake}") from None
        card = self._model.card
        images = {camera: observation.images[camera][None].copy() for camera in card.cameras}
        said = self._model.probabilities(images, observation.state[None].copy())[0]
        if not all_finite(said):  # compared with a threshold NaN would be "no success", without a word
            raise Internal("reward.model answers NaN to this observation: train it again")
        return {
            "kind": card.kind,
            "probabilities": said.astype("float32"),
            "threshold": card.threshold,
            "patience": card.patience,
        }


def build(cfg: DictConfig) -> RewardServer:
    """The server of a run's config. Raises ValueError, FileNotFoundError or CannotListen in the user's words."""
    config = TrainerConfig(
        port_number=cfg.reward.port,
        broadcast_port=cfg.reward.port + 1 if cfg.reward.port else 0,
        request_types=["reward"],
        bind_host=cfg.bind_host,
        insecure=cfg.insecure,
        keys_dir=OmegaConf.select(cfg, "security.keys_dir"),
        allow_list=OmegaConf.select(cfg, "security.allow_list"),
    )
    return RewardServer(load(cfg.reward.model), task_spec(cfg), config)


def main(run_dir: str) -> int:
    """Entry of the role. Returns 2 on a mistake in the config, said in one line."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", datefmt="%H:%M:%S")
    try:
        cfg = read_config(RunPaths(Path(run_dir)).config)
        torch.set_num_threads(cfg.serving.threads)
        reward = build(cfg)
    except (ValueError, OSError, CannotListen) as mistake:
        log.error("%s", mistake)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: reward.server.loop.stop())
    log.info("serving %s on port %d", cfg.reward.model, reward.server.config.port_number)
    reward.server.loop.every(0.5, beat)
    reward.server.call_soon(say_ready)
    reward.server.start()
    return 0
