"""Fused optimizers where nothing else was asked for, and the step that the device leaves out."""

from functools import partial

import pytest
import torch
from hydra.utils import instantiate

from serl_launcher.learner.optimizers import for_device

GPU, CPU = torch.device("cuda"), torch.device("cpu")


def test_a_gpu_gets_the_fused_kernel_unless_yaml_decides():
    adam = instantiate({"_target_": "torch.optim.AdamW", "lr": 1e-3, "_partial_": True})
    made = for_device(adam, GPU)([torch.nn.Parameter(torch.ones(2))])
    assert (made.defaults["lr"], made.defaults["fused"]) == (1e-3, True)
    assert for_device(adam, CPU)([torch.nn.Parameter(torch.ones(2))]).defaults["fused"]  # Adam's: for `found_inf`
    sgd = partial(torch.optim.SGD, lr=1.0)
    assert for_device(sgd, CPU) is sgd
    decided = partial(torch.optim.AdamW, foreach=True)
    assert for_device(decided, GPU) is decided
    other = partial(torch.optim.LBFGS, lr=1.0)
    assert for_device(other, GPU) is other


@pytest.mark.gpu
def test_the_fused_kernel_steps_as_the_plain_one():
    def moved(factory):
        p = torch.nn.Parameter(torch.arange(8.0, device="cuda"))
        optimizer = factory([p])
        for _ in range(3):
            p.grad = torch.ones_like(p)
            optimizer.step()
        return p.detach().cpu()

    plain = partial(torch.optim.AdamW, lr=0.1, foreach=False)
    torch.testing.assert_close(moved(for_device(partial(torch.optim.AdamW, lr=0.1), GPU)), moved(plain))
