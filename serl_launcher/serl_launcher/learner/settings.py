"""Keys of `trainer` in the config that the training loop goes by. learner.operated gives it those of now."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TrainerSettings:
    """How large a step is, and what is due after how many."""

    batch_size: int
    publish_period: int  # steps between published versions
    checkpoint_period: int  # steps between checkpoints
