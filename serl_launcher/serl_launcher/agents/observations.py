"""The observations of a batch, as a policy encodes them; `on_device` makes their host's part beforehand.

An agent's `prepare` calls it, in the thread that makes batches ahead (learner.ahead); its losses call the other two.
"""

from dataclasses import fields, replace
from typing import Any

import numpy as np

from serl_launcher.policies.base import FlowPolicy, PolicyInput
from serl_launcher.policies.transfer import to_device
from serl_launcher.replay.transitions import TransitionBatch
from serl_launcher.replay.views import ChunkBatch


def observation(batch: ChunkBatch | TransitionBatch) -> PolicyInput:
    """What the batch's actions were chosen from."""
    return PolicyInput(batch.images, batch.state, batch.prompts, batch.prepared)


def next_observation(batch: TransitionBatch) -> PolicyInput:
    """What came of them."""
    return PolicyInput(batch.next_images, batch.next_state, batch.prompts, batch.next_prepared)


def on_device[Batch: (ChunkBatch, TransitionBatch)](policy: FlowPolicy, batch: Batch) -> Batch:
    """The batch with its arrays as tensors on the policy's device, and its observations as `policy.prepare` makes them;
    pictures stay where they are."""
    found: dict[str, Any] = {"prepared": policy.prepare(observation(batch))}
    if isinstance(batch, TransitionBatch):
        found["next_prepared"] = policy.prepare(next_observation(batch))
    for field in fields(batch):
        if isinstance(value := getattr(batch, field.name), np.ndarray):
            found[field.name] = to_device(value, policy.device)
    return replace(batch, **found)
