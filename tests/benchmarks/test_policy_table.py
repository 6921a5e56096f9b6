"""The policy suite's bookkeeping: floors, and weights that are counted."""

import torch
from suites._policy_table import Cost, Peaks, flops_of, middle_models, served_bytes, timed

from serl_launcher.policies.pi0.tiny import TinySize

CPU = torch.device("cpu")


def test_the_floor_is_the_longer_of_arithmetic_and_reading():
    rows = list(timed(CPU, "x", lambda: None, Cost(flops=2 * 10**9, bytes=3 * 10**9), Peaks(1e12, 1e12), 1))
    assert rows[0].floor == 3.0
    rows = list(timed(CPU, "x", lambda: None, Cost(flops=5 * 10**9, bytes=3 * 10**9), Peaks(1e12, 1e12), 1))
    assert rows[0].floor == 5.0


def test_weights_that_are_read_at_every_step_count_as_often():
    """Per-robot weights are read for one robot, tables and dead weights not at all."""
    size = TinySize(width=16, vision_width=16, image_size=32, patch_size=16, conv_stem=False)
    for model in middle_models(size, 2):
        policy = model.build("full", "float32")
        one, two, three = (served_bytes(policy, steps) for steps in (1, 2, 3))
        assert two - one == three - two > 0
        assert one < sum(p.numel() * 4 for p in policy.parameters())
        assert flops_of(policy, lambda: torch.ones(4, 4) @ torch.ones(4, 4)) == 2 * 4**3
