"""Budgets of what the released sizes run on a card; and the card that is not there (benchmarks/card) counts right."""

import pytest
import torch
from card import backward
from card.calls import BUILDERS, CAPTURED, served
from card.count import Kernel
from card.fake import DEVICE, FakeCard
from card.forecast import CARDS, by_part, fused, milliseconds
from card.steps import STEPS, trained
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

SAMPLE_MOST = 4_500  # kernels of ten flow steps


@pytest.fixture(scope="module")
def pi0():
    """One answer in two flow steps."""
    with FakeCard() as card:
        return served(card, "pi0", flow_steps=2)


def test_ten_flow_steps_of_pi0_stay_within_their_kernels(pi0):
    one, two = pi0.once.operations, pi0.counts["sample"].operations
    assert 0 < two - one < two
    assert two + 8 * (two - one) <= SAMPLE_MOST, pi0.counts["sample"].kinds()


@pytest.mark.slow
def test_ten_flow_steps_of_pi0_counted_one_by_one():
    with FakeCard() as card:
        answer = served(card, "pi0")
    assert len(answer.counts["sample"].attention) - len(answer.once.attention) == 9 * 18
    assert answer.counts["sample"].operations <= SAMPLE_MOST


def test_a_graph_of_pi0_neither_reads_back_nor_sends_over(pi0):
    for call in CAPTURED:
        assert not pi0.counts[call].crossings
        assert not pi0.counts[call].reads


def test_attention_gets_bf16_of_one_type(pi0):
    encode, once, sample = pi0.counts["encode"], pi0.once, pi0.counts["sample"]
    assert len(encode.attention) == 27 + 17  # the last layer of language ends at its keys and values
    assert len(sample.attention) - len(once.attention) == 18
    assert {call.dtypes for call in encode.attention + sample.attention} == {(torch.bfloat16,) * 3}
    assert {call.mask for call in encode.attention + sample.attention} <= {None, torch.bfloat16}  # none is converted


def test_keys_and_values_of_the_prefix_are_bf16_and_lie_where_they_are_read(pi0):
    assert pi0.counts["sample"].prefix_dtypes == {torch.bfloat16}
    assert not pi0.counts["sample"].on_prefix["concatenation"]


def test_compiled_layers_are_forecast_faster_and_no_faster_than_the_weights_are_read(pi0):
    weights = sum(p.numel() * p.element_size() for n, p in pi0.policy.named_parameters() if "embed_tokens" not in n)
    for card in CARDS:
        plain, compiled = (
            sum(milliseconds(way(kernels), card) for kernels in by_part(pi0.counts).values()) for way in (list, fused)
        )
        assert 1e3 * weights / card.memory < compiled < 0.9 * plain


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BUILDERS if name != "pi0"])
def test_a_graph_of_every_other_head_neither_reads_back_nor_sends_over(name):
    with FakeCard() as card:
        answer = served(card, name, guided=True)
    for call in (*CAPTURED, "guided"):
        assert not answer.counts[call].reads
        assert not answer.counts[call].crossings
        assert {len(set(attention.dtypes)) for attention in answer.counts[call].attention} == {1}
    assert answer.counts["guided"].operations > 2 * answer.counts["sample"].operations


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pi0", "groot_n1_7"])
def test_a_graph_of_the_best_of_16_neither_reads_back_nor_sends_over(name):
    """The choice among the chunks is a part of what is captured."""
    with FakeCard() as card:
        best, one = (served(card, name, flow_steps=2, candidates=n) for n in (16, 1))
    for call in CAPTURED:
        assert not best.counts[call].reads
        assert not best.counts[call].crossings
    assert 0 < best.counts["sample"].operations - one.counts["sample"].operations < 300  # copies of keys, the critics
    assert best.counts["sample"].attention[-1].query[0] == 16


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", STEPS)
def test_a_step_that_is_not_logged_does_not_wait_for_the_card(name):
    with FakeCard() as card:  # two flow steps of a critic's chunks: SAC's actor is moved through each
        step = trained(card, name, 2, "serving.flow_steps=2")
    assert not step.counts.reads
    assert not step.counts.crossings  # the batch is on the card already
    assert step.counts.kinds()["optimizer"] >= 4  # norm, clipping, Adam, average
    assert step.kept > 0


# The card itself.


def test_operations_are_counted_by_what_they_are():
    layer = nn.Linear(8, 8, bias=False)
    with FakeCard() as card:
        with torch.device("meta"):
            layer = nn.Linear(8, 8, bias=False)
        card.place(layer)
        host, x = torch.ones(4, 8), torch.zeros(4, 8, device=DEVICE)
        with card.counting(layer) as counts, torch.autocast("cuda", torch.bfloat16), torch.no_grad():
            y = layer(x)  # casts of both, a product
            z = torch.cat([y, y], 1).t()[:4]  # one concatenation; views launch nothing
            F.layer_norm(z.t(), (4,))  # in fp32 by CUDA's rules: a cast
            assert y.dtype == torch.bfloat16
            x + host.to(DEVICE)
            z.sum().item()
            z.cpu()
            host.sum().item()  # the host's own
    assert counts.kinds() == {"cast": 3, "matmul": 1, "concatenation": 1, "reduction": 2, "elementwise": 1}
    assert counts.crossings == {"to the card": 1, "to the host": 1}
    assert counts.reads == {"_local_scalar_dense": 1, "copy": 1}
    product = next(kernel for kernel in counts.kernels if kernel.kind == "matmul")
    assert (product.flops, product.bytes, product.half) == (2 * 4 * 8 * 8, 2 * (32 + 64 + 32), True)


def test_attention_of_two_types_fails_as_on_a_card():
    with FakeCard():
        q, k = (torch.zeros(1, 1, 4, 8, dtype=t, device=DEVICE) for t in (torch.bfloat16, torch.float32))
        with pytest.raises(RuntimeError, match="one type"):
            F.scaled_dot_product_attention(q, k, k)


def test_the_backward_pass_in_python_is_pytorchs():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.SiLU(), nn.Linear(8, 3))
    x, calls = torch.randn(5, 4, requires_grad=True), []

    def loss(inner):
        y = inner(x)
        q, k = (y * y + x[:, :3]).split([1, 2], 1)
        return q.sum() + (k * y[:, 1:] + y[:, :1]).square().sum()

    def counted(given):
        calls.append(1)
        return net(given)

    inputs = [x, *net.parameters()]
    want = torch.autograd.grad(loss(net), inputs)
    for got in (
        backward.grad(loss(net), inputs),
        backward.grad(loss(lambda given: checkpoint(counted, given, use_reentrant=False)), inputs),
    ):
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other)
    assert len(calls) == 2  # recomputed once
    backward.backward(loss(net))
    backward.backward(loss(net))
    torch.testing.assert_close(x.grad, 2 * want[0])


def test_what_lies_between_two_products_becomes_one_kernel():
    def kernel(kind, reads, writes, layer=1):
        return Kernel("x", kind, "flow", layer, 0, True, [(k, 10) for k in reads], [(k, 10) for k in writes])

    given = [
        kernel("matmul", [1], [2]),
        kernel("cast", [2], [3]),
        kernel("elementwise", [3, 4], [5]),  # 3 is read here alone
        kernel("matmul", [5], [6]),
        kernel("elementwise", [6], [7], layer=0),  # not in a layer
    ]
    left = fused(given)
    assert [k.kind for k in left] == ["matmul", "fused", "matmul", "elementwise"]
    assert (left[1].reads, left[1].writes) == ([(2, 10), (4, 10)], [(5, 10)])
