"""LoRA and the other words of `policy.train` on the tiny GR00T, through its own forward path."""

import pytest
import torch
from tiny import HORIZON, SPEC, random_batch

from serl_launcher.policies.base import PolicyInput, flow_loss, frozen_hash, sample, trainable
from serl_launcher.policies.groot.build import build_groot
from serl_launcher.policies.groot.tiny import TinyGrootSize
from serl_launcher.policies.groot.trainable import flags_of
from serl_launcher.policies.saving import merged_state

pytest.importorskip("diffusers")


def build(train, **options):
    return build_groot("t", SPEC, "random", 0, HORIZON, TinyGrootSize(image_size=32), train=train, **options)


def answers(policy, batch, noise):
    with torch.no_grad():
        prefix = policy.encode(PolicyInput(batch.images, batch.state, [SPEC.prompt] * len(batch)))
        return sample(policy, prefix, noise, 2)


def take_steps(policy, batch, steps):
    """Losses of a fixed batch with fixed noise."""
    chunk = policy.normalise_actions(torch.as_tensor(batch.action))
    torch.manual_seed(0)
    noise, t, weight = torch.randn_like(chunk), torch.rand(len(batch)), torch.ones(len(batch))
    optimizer, losses = torch.optim.AdamW(trainable(policy).values(), lr=3e-3), []
    for _ in range(steps):
        prefix = policy.encode(PolicyInput(batch.images, batch.state, [SPEC.prompt] * len(batch)))
        loss = flow_loss(policy, prefix, chunk, torch.as_tensor(batch.is_pad), weight, noise, t).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_adapters_start_as_no_change_learn_and_merge_to_what_they_were():
    policy, batch = build("lora", lora_rank=4), random_batch()
    noise = torch.randn(len(batch), HORIZON, policy.action_dim)
    before, frozen = answers(build("full"), batch, noise), frozen_hash(policy)
    torch.testing.assert_close(answers(policy, batch, noise), before, atol=1e-6, rtol=1e-5)
    losses = take_steps(policy, batch, 12)
    assert losses[-1] < 0.9 * losses[0]
    assert frozen_hash(policy) == frozen
    merged = build("full")
    merged.core.load_state_dict({name: tensor.make() for name, tensor in merged_state(policy.core).items()})
    after = answers(policy, batch, noise)
    torch.testing.assert_close(answers(merged, batch, noise), after, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(after, before, atol=1e-3)


def test_each_word_trains_its_parts():
    names = {train: set(trainable(build(train))) for train in ("full", "expert", "lora")}
    assert any("language_model" in name for name in names["full"])
    assert names["expert"] < names["full"]
    assert all(name.startswith("core.action_head.") for name in names["expert"])
    adapters = {name for name in names["lora"] if ".lora_" in name}
    assert {"language_model", "vl_self_attention", "action_head.model"} <= {
        part
        for name in adapters
        for part in ("language_model", "vl_self_attention", "action_head.model")
        if part in name
    }
    assert names["lora"] - adapters < names["expert"]  # the projections of the embodiment
    with pytest.raises(ValueError, match=r"policy\.train: expected one of .*got 'lota'"):
        flags_of("lota", None)
    with pytest.raises(ValueError, match=r"policy\.tune: unknown flag 'vision'"):
        flags_of(None, {"vision": True})
