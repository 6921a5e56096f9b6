"""What an agent that learns values samples: accepted chunks for imitation, and transitions. sac_* and dsrl_* name it.

Both views read one ring. The trainer asks `ready` before a stage's steps and `sample` for each.
"""

from dataclasses import dataclass

import numpy as np

from serl_launcher.replay.ring import RingReader
from serl_launcher.replay.transitions import TransitionBatch, TransitionView
from serl_launcher.replay.views import EVERY_ROW, ChunkBatch, ViewSources


@dataclass(frozen=True, slots=True)
class LearningBatch:
    """One step's data of an agent that learns values."""

    imitation: ChunkBatch | None  # None while no tick is accepted
    transitions: TransitionBatch

    def __len__(self) -> int:
        return len(self.transitions)


class LearningView:
    """A View (replay.views): the accepted chunks and a transition view over one ring (`algo.view`).

    gamma: discount per tick. demo_share: of the transitions of a batch, those from demonstrations. min_online: online
    transitions before training may begin in an online stage. takeover_reward: of replay.transitions.index_stretches.
    """

    def __init__(
        self, sources: ViewSources, *, gamma: float, demo_share: float, min_online: int, takeover_reward: float | None
    ) -> None:
        self.imitation, self._min_online = sources.accepted, min_online
        self.transitions = TransitionView(
            sources.spec, sources.execute_horizon, gamma, demo_share, sources.words, takeover_reward
        )

    def attach(self, ring: RingReader) -> None:
        self.imitation.attach(ring)
        self.transitions.attach(ring)

    def refresh(self) -> int:
        self.imitation.refresh()
        return self.transitions.refresh()

    def ready(self, mode: str, min_accepted: int) -> bool:
        if mode == "online":
            enough = self.imitation.accepted["online"] >= min_accepted
            return enough and self.transitions.count("online") >= max(1, self._min_online)
        return len(self.imitation) > 0 and len(self.transitions) > 0

    def problem(self, mode: str, min_accepted: int) -> str | None:
        low, high = self.transitions.reward_range
        if mode == "online" and self.transitions.count("online") and low == high:
            return f"every transition has the same reward, {low:g}: a critic cannot tell good from bad"
        return self.imitation.problem(mode, min_accepted) if mode == "train" else None

    def sample(self, rng: np.random.Generator, b: int, share: slice = EVERY_ROW) -> LearningBatch:
        """b transitions, and b accepted chunks when there are any."""
        imitation = self.imitation.sample(rng, b, share) if len(self.imitation) else None
        return LearningBatch(imitation, self.transitions.sample(rng, b, share))

    def drop_before(self, frame: int) -> None:
        self.imitation.drop_before(frame)
        self.transitions.drop_before(frame)

    def fingerprint(self) -> int:
        return self.imitation.fingerprint() ^ (self.transitions.fingerprint() << 1)

    def counts(self) -> dict[str, float]:
        return self.imitation.counts() | {
            "replay/transitions_demo": float(self.transitions.count("demo")),
            "replay/transitions_online": float(self.transitions.count("online")),
        }
