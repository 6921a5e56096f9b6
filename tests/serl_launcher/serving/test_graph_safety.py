"""What a CUDA graph may hold: the device's part of an answer neither reads a value back nor sends one over.

A capture fails on both. Here every operation of the forward pass is looked at, on a CPU.
"""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from serving_samples import body
from tiny import HORIZON, ROOT, SPEC, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from serl_launcher.serving.engine import PolicyEngine
from serl_launcher.serving.query import query_from_body

READS_BACK = ("_local_scalar_dense", "nonzero", "masked_select", "equal.default", "is_nonzero", "unique")
SENDS_OVER = ("lift_fresh",)  # torch.tensor of a host's list


class Watch(TorchDispatchMode):
    """Names of operations that a capture would refuse."""

    def __init__(self):
        super().__init__()
        self.found, self.seen = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen += 1
        name = str(function)
        by_mask = name.startswith("aten.index") and any(
            isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in (args[1] if len(args) > 1 else []) or []
        )
        if by_mask or any(word in name for word in READS_BACK + SENDS_OVER):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("algo", ["reject_sampling_pi0", "dsrl_pi0", "best_of_n_pi0"])
@pytest.mark.parametrize("name", ["pi0_tiny", "pi05_tiny", "groot_tiny"])
def test_nothing_crosses_between_host_and_device(name, algo, precision, tmp_path):
    cfg = tiny_config(algo, serving__device="cpu")
    options = {"action_horizon": HORIZON, "precision": precision, "attention": "sdpa"}
    cfg.policy = OmegaConf.merge(OmegaConf.load(ROOT / "config" / "policy" / f"{name}.yaml"), options)
    cfg.policy.size.image_size = 32
    cfg.policy.seed = 0
    engine = PolicyEngine(cfg, tmp_path)
    queries = [query_from_body(body(k), SPEC) for k in range(2)]
    with torch.inference_mode():
        inputs = engine.policy.prepare(engine._observation(queries)) | {"noise": engine._draw(queries)}
        want = engine._forward(inputs)  # tables that are made once are there from here on
        with Watch() as watch:
            got = engine._forward(inputs)
    assert watch.seen > 100
    # The picture grid lies on the host by intention: its values name the bucket.
    grid = {"aten.is_nonzero.default"} if name == "groot_tiny" else set()
    assert not set(watch.found) - grid, watch.found
    assert len(watch.found) <= 1
    np.testing.assert_array_equal(got, want)
