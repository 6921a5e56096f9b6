"""What a card computes with: chosen once and said, watched in a pass, and set aside where two paths are compared."""

import logging

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from serl_launcher.policies.kernels import ATTENTION, AttentionCalls, exact, pin_kernels


def flags():
    kernels = {name: getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in ATTENTION}
    return kernels, torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


@pytest.fixture
def restored():
    (kernels, products, _) = flags()
    yield
    for name, on in kernels.items():
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(on)
    torch.set_float32_matmul_precision(products)


def test_a_card_is_pinned_and_told_in_one_line_and_a_cpu_is_left_alone(restored, caplog):
    caplog.set_level(logging.INFO, "policy")
    before = flags()
    pin_kernels(torch.device("cpu"))
    assert flags() == before
    pin_kernels(torch.device("cuda"))
    assert flags()[:2] == (ATTENTION, "high")
    assert [record.getMessage() for record in caplog.records] == [
        "cuda: attention kernels flash, mem_efficient, math (cudnn off); float32 products in TF32"
    ]


def test_a_comparison_is_exact_and_what_was_chosen_comes_back(restored):
    pin_kernels(torch.device("cuda"))
    before = flags()
    with exact():
        assert flags()[1:] == ("highest", False)
    assert flags() == before


def test_attention_that_is_not_fused_is_told(caplog):
    caplog.set_level(logging.INFO, "policy")
    q, mask = torch.randn(1, 2, 3, 8), torch.ones(1, 1, 3, 3, dtype=torch.bool)
    with torch.no_grad(), AttentionCalls() as calls:
        F.scaled_dot_product_attention(q, q, q)
        F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
    calls.say()
    with torch.no_grad(), AttentionCalls() as calls, sdpa_kernel(SDPBackend.MATH):
        F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
    calls.say()
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "attention calls of an answer: flash_for_cpu 2"),
        ("WARNING", "attention calls of an answer: math 1; what runs as math no fused kernel takes, and is slow"),
    ]
