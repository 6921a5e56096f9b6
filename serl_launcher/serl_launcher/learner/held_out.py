"""Episodes that do not train, and what the policy makes of them: loss and open-loop error, episode by episode.

learner.fine_tuning calls `measure` every `sft.eval_period` steps. Measured is the averaged policy, which is what gets
published, always with the same noise, so that two figures differ by the parameters alone.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from serl_launcher.learner.learner import Learner
from serl_launcher.learner.sampling import seed_noise
from serl_launcher.learner.sft import Chunks
from serl_launcher.policies.base import PolicyInput, sample
from serl_launcher.replay.views import ChunkBatch


def split(episodes: int, share: float, seed: int) -> list[int]:
    """The episodes that are held out, ascending: `share` of them, rounded, drawn by the seed; never all of them."""
    count = min(round(share * episodes), episodes - 1)
    return sorted(np.random.default_rng(seed).permutation(episodes)[:count].tolist())


class HeldOut:
    """The held-out episodes of one dataset, or others that are to be measured as they are.

    rows: episode -> int64[n], its rows; samples: that are measured in all, evenly spaced in each episode; ticks: of a
    chunk that are compared, as the actor executes them; steps: of the flow; group: of the metrics.
    """

    def __init__(
        self,
        chunks: Chunks,
        rows: dict[int, np.ndarray],
        *,
        samples: int,
        ticks: int,
        steps: int,
        batch_size: int,
        group: str = "held_out",
    ) -> None:
        each = max(1, samples // max(1, len(rows)))
        spaced = {e: np.linspace(0, len(r) - 1, min(each, len(r))).round().astype(int) for e, r in rows.items()}
        self.loss, self.error = f"{group}/loss", f"{group}/open_loop_mse"
        self.rows = {episode: rows[episode][places].tolist() for episode, places in spaced.items()}
        self._chunks, self._ticks, self._steps, self._batch_size = chunks, ticks, steps, batch_size

    @torch.no_grad()
    def measure(self, learner: Learner) -> dict[str, float]:
        """`<group>/loss` (as `losses/flow`) and `<group>/open_loop_mse` (in the model's units, as
        tools/eval_open_loop.py), the means over samples, and both of each episode. Empty without held-out episodes."""
        sums: dict[int, np.ndarray] = {}
        with learner.averaged_in_place() as agent:
            for episode, rows in self.rows.items():
                found = [np.array(self._of_batch(agent, b, k)) * len(b) for k, b in enumerate(self._batches(rows))]
                sums[episode] = np.sum(found, axis=0)
        if not sums:
            return {}
        total = np.sum(list(sums.values()), axis=0) / sum(len(rows) for rows in self.rows.values())
        out = {self.loss: float(total[0]), self.error: float(total[1])}
        for episode, summed in sums.items():
            loss, error = summed / len(self.rows[episode])
            out |= {f"{self.loss}_episode_{episode}": float(loss), f"{self.error}_episode_{episode}": float(error)}
        return out

    def _batches(self, rows: Sequence[int]) -> Iterator[ChunkBatch]:
        for start in range(0, len(rows), self._batch_size):
            yield self._chunks.collate([self._chunks[row] for row in rows[start : start + self._batch_size]])

    def _of_batch(self, agent: torch.nn.Module, batch: ChunkBatch, number: int) -> tuple[float, float]:
        """Mean loss and mean open-loop error of a batch."""
        seed_noise(0, number)
        loss = sum(agent(batch, 0)[0].values())
        return float(loss), self._open_loop(agent, batch)

    def _open_loop(self, agent: torch.nn.Module, batch: ChunkBatch) -> float:
        policy = agent.policy
        prefix = policy.encode(PolicyInput(batch.images, batch.state, batch.prompts))
        noise = torch.randn(len(batch), policy.action_horizon, policy.action_dim, device=policy.device)
        chosen = policy.physical_actions(sample(policy, prefix, noise, self._steps), prefix.anchor)[:, : self._ticks]
        recorded = torch.as_tensor(batch.action, device=chosen.device)[:, : chosen.shape[1]]
        keep = ~torch.as_tensor(batch.is_pad, device=chosen.device)[:, : chosen.shape[1]]
        error = ((chosen - recorded) / policy.action_units.unit).square().mean(-1)
        return float(((error * keep).sum(-1) / keep.sum(-1).clamp(min=1)).mean())
