"""A learned reward: asks the reward server on the GPU box about every observation. Torch-free.

Outcome classifier: reward 1 and termination when `patience` observations in a row reach the threshold. Process
classifier: reward for each stage reached for the first time, 1 in sum; the last stage is success. `reward=classifier`.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from serl_config.reward_stages import stage_after
from serl_robot_infra.envs.base import StepResult
from serl_transport.client import TrainerClient
from serl_transport.config import TrainerConfig
from serl_transport.connection.reach import Watch
from serl_transport.contract.errors import Internal, NotReady, ServerSilent
from serl_transport.contract.specs import TaskSpec

log = logging.getLogger(__name__)
RETRY_S = 0.2


class ClassifierReward:
    """Answers `rewards.base.RewardSource`.

    environment_may_end: does a termination by the environment itself (a robot's safety stop, a lost object) end the
    episode, as a failure; its success and reward never count. patience_s: a reward server that is silent for longer
    ends the episode as truncated, its last tick kept with reward 0.
    """

    success_source = "classifier"

    def __init__(self, link: TrainerClient, patience_s: float = 5.0, environment_may_end: bool = False) -> None:
        self._link, self._patience_s, self._environment_may_end = link, patience_s, environment_may_end
        self.reset()

    def reset(self) -> None:
        self._in_a_row = 0
        self._stage = 0

    def judge(self, result: StepResult) -> StepResult:
        """The classifier's reward, success and termination for this step."""
        answer = self._ask(result)
        if answer is None:
            return replace(result, reward=0.0, terminated=False, truncated=True, success=False)
        reward, success = self._outcome(answer) if answer["kind"] == "outcome" else self._process(answer)
        ended = success or (result.terminated and self._environment_may_end)
        return replace(result, reward=reward, success=success, terminated=ended, truncated=result.truncated)

    def _outcome(self, answer: Mapping[str, Any]) -> tuple[float, bool]:
        sure = float(answer["probabilities"][1]) >= answer["threshold"]
        self._in_a_row = self._in_a_row + 1 if sure else 0
        success = self._in_a_row >= answer["patience"]
        return float(success), success

    def _process(self, answer: Mapping[str, Any]) -> tuple[float, bool]:
        probabilities = np.asarray(answer["probabilities"])
        last, before = len(probabilities) - 1, self._stage
        self._stage = stage_after(before, probabilities)
        return (self._stage - before) / last, self._stage == last

    def _ask(self, result: StepResult) -> dict[str, Any] | None:
        """The answer, or None when the server stayed silent; the robot holds meanwhile."""
        payload = {"images": dict(result.observation.images), "state": result.observation.state}
        since = time.monotonic()
        while True:
            try:
                return self._link.request("reward", payload, timeout_ms=1000 * self._patience_s)
            except (ServerSilent, NotReady, Internal) as problem:
                if time.monotonic() - since >= self._patience_s:
                    log.warning("no reward for %.0f s, the episode ends here: %s", self._patience_s, problem)
                    return None
                time.sleep(RETRY_S)


def connect(
    ip: str,
    port: int,
    name: str,
    spec: Mapping[str, Any],
    patience_s: float = 5.0,
    environment_may_end: bool = False,
    keys_dir: str | None = None,
    model: str | None = None,
    on_wait: Callable[[str], None] = log.warning,
) -> ClassifierReward:
    """The reward of config/reward/classifier.yaml; waits for the reward server, telling `on_wait` once a second.

    `model` is the server's business.
    """
    config = TrainerConfig(port_number=port, broadcast_port=port + 1, keys_dir=keys_dir)
    line = (
        f"waiting for the reward server at {ip}:{port} (reward.ip, reward.port); "
        "the learner starts one when it has reward=classifier reward.model=<folder>"
    )
    reach = Watch(ip, port)
    told = lambda _: on_wait(f"{line}{reach.words}")  # noqa: E731
    client = TrainerClient(name, ip, config, spec=TaskSpec.from_dict(dict(spec)), on_wait=told)
    return ClassifierReward(client, patience_s, environment_may_end)
