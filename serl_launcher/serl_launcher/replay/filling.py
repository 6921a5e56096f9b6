"""Episodes of the journal into the ring: the one rule of what enters it, for the gateway and for each other host.

A ring is a function of the journal: the rows of two rings that were filled from the same records, with the same
capacity, have the same numbers and frames. By that the ranks of several hosts draw the same batch.
"""

import logging

from serl_launcher.replay.assembler import ClosedEpisode
from serl_launcher.replay.ring import RingError, RingWriter
from serl_transport.contract.schema import DISCARD, Episode

log = logging.getLogger("replay")


def is_experience(mode: str, truncated_by: str | None) -> bool:
    """May anything be learned from it? Not from evaluations, nor from what a person threw away."""
    return mode != "eval" and truncated_by != DISCARD


def fill(ring: RingWriter, closed: ClosedEpisode, episode: Episode) -> None:
    """Append an episode that is experience, as it was recorded: a person's later word is the views'."""
    info, outcome = episode.info, episode.outcome
    if not is_experience(info.mode, outcome.truncated_by):
        return
    try:
        ring.append(closed.ordinal, info.mode, outcome.success, episode.arrays, info.prompt, info.episode_id)
    except RingError as error:
        log.error("episode %s is recorded but cannot be trained on: %s", info.episode_id, error)
