"""Keeps the trainer from wearing a small replay out: a bound on steps per new transition.

The trainer asks before each online step. The idea is the rate limiter of Reverb (Cassirer et al., 2102.04736), with one
side only: actors are never held back by the trainer.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepLimiter:
    """At most `max_steps_per_tick` steps per transition that entered the replay."""

    max_steps_per_tick: float

    def allows(self, steps: int, transitions: int) -> bool:
        """May step number `steps` of the stage be taken, when `transitions` came in since the stage began?"""
        return steps < self.max_steps_per_tick * transitions
