"""LoRA on the tiny PI0: starts as no change, moves adapters and action projections alone, and merges to what it was."""

import torch
from tiny import HORIZON, SIZE, SPEC, random_batch

from serl_launcher.policies.base import PolicyInput, flow_loss, frozen_hash, sample, trainable
from serl_launcher.policies.parameter_table import parameter_table
from serl_launcher.policies.pi0.build import build_pi0
from serl_launcher.policies.saving import merged_state


def build(train):
    return build_pi0("t", SPEC, "random", 0, HORIZON, SIZE, train=train, lora_rank=4, attention="sdpa")


def observation(batch):
    return PolicyInput(batch.images, batch.state, [SPEC.prompt] * len(batch))


def train_a_little(policy, batch, steps=30):
    """Losses of a fixed batch with fixed noise."""
    chunk = policy.normalise_actions(torch.as_tensor(batch.action))
    torch.manual_seed(0)
    noise, t = torch.randn_like(chunk), torch.rand(len(batch))
    optimizer = torch.optim.AdamW(trainable(policy).values(), lr=3e-3)
    losses = []
    for _ in range(steps):
        prefix = policy.encode(observation(batch))
        loss = flow_loss(policy, prefix, chunk, torch.as_tensor(batch.is_pad), torch.ones(len(batch)), noise, t).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_adapters_start_as_no_change():
    batch, noise = random_batch(), torch.randn(6, HORIZON, 2)
    with torch.no_grad():
        plain, adapted = (sample(p, p.encode(observation(batch)), noise, 3) for p in (build("full"), build("lora")))
    torch.testing.assert_close(plain, adapted, atol=1e-6, rtol=1e-5)


def test_adapters_learn_and_what_is_frozen_stays():
    policy = build("lora")
    frozen = frozen_hash(policy)
    names = trainable(policy)
    assert any("lora_" in name for name in names)
    assert not [n for n in names if "lora_" not in n and ("language_model" in n or "gemma_expert" in n)]
    losses = train_a_little(policy, random_batch())
    assert losses[-1] < 0.8 * losses[0]
    assert frozen_hash(policy) == frozen
    assert "LoRA adapters" in parameter_table(policy)


def test_merged_weights_act_as_the_adapted_policy_does():
    policy, batch, noise = build("lora"), random_batch(), torch.randn(6, HORIZON, 2)
    train_a_little(policy, batch, steps=5)
    merged = build("full")
    merged.core.load_state_dict({name: tensor.make() for name, tensor in merged_state(policy.core).items()})
    with torch.no_grad():
        adapted, plain = (sample(p, p.encode(observation(batch)), noise, 3) for p in (policy, merged))
        untouched = build("full")
        before = sample(untouched, untouched.encode(observation(batch)), noise, 3)
    torch.testing.assert_close(adapted, plain, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(before, plain, atol=1e-3)
