"""SAC and DSRL on the real PI0 classes, tiny: what moves in which stage, and that what is trained is what is served."""

import pytest
import torch
from accelerate import Accelerator
from hydra.utils import instantiate
from tiny import HORIZON, SIZE, SPEC, random_batch, random_transitions, tiny_config, tiny_policy

from serl_launcher.agents.build import build_agent, build_policy
from serl_launcher.agents.flow_matching import imitation_loss
from serl_launcher.agents.observations import observation
from serl_launcher.learner.learner import Learner
from serl_launcher.policies.base import trainable
from serl_launcher.policies.pi0 import head
from serl_launcher.policies.pi0.build import build_pi0
from serl_launcher.replay.learning import LearningBatch
from serl_launcher.run.parameters import base_sha256, publish
from serl_launcher.serving.engine import PolicyEngine


def config(algo, **agent):
    cfg = tiny_config(algo, rollout__execute_horizon=2, serving__flow_steps=2, serving__device="cpu")
    cfg.algo.agent.update({"warmup_steps": 1, "critics": 2, "widths": [16]})
    if "actor_period" in cfg.algo.agent:
        cfg.algo.agent.actor_period = 1
    cfg.algo.agent.update(agent)
    return cfg


def make(algo, **agent):
    cfg = config(algo, **agent)
    torch.manual_seed(0)
    policy = build_policy(cfg, SPEC)
    agent = build_agent(cfg, policy, SPEC)
    optimizers = {name: instantiate(node, _partial_=True) for name, node in cfg.algo.optimizers.items()}
    learner = Learner(
        agent, lambda p: torch.optim.AdamW(p, lr=1e-3), Accelerator(cpu=True), max_grad_norm=1.0, ema_decay=0.5,
        optimizers=optimizers,
    )  # fmt: skip
    return cfg, policy, learner


def steps(learner, n):
    for k in range(n):
        metrics = learner.step(LearningBatch(random_batch(seed=k), random_transitions(seed=k)), 1.0)
    return metrics


def moved(policy, before):
    return {name for name, p in trainable(policy).items() if not torch.equal(p, before[name])}


def snapshot(policy):
    return {name: p.detach().clone() for name, p in trainable(policy).items()}


def test_sac_trains_the_backbone_in_a_train_stage_and_values_move_the_expert_alone_online():
    _, policy, learner = make("sac_pi0", imitation_weight=0.0, behaviour_weight=1.0)
    before = snapshot(policy)
    learner.begin_stage("train")
    assert "losses/flow" in steps(learner, 2)
    assert any("vision_tower" in name for name in moved(policy, before))
    learner.begin_stage("online")
    before = snapshot(policy)
    metrics = steps(learner, 3)
    assert {"losses/actor", "losses/critic", "actor/temperature"} <= metrics.keys()
    names = moved(policy, before)
    assert names
    assert not [name for name in names if "paligemma.model" in name]
    assert metrics["actor/drift"] > 0


def test_sac_imitates_accepted_chunks_online_backbone_included():
    _, policy, learner = make("sac_pi0")
    learner.begin_stage("online")
    before = snapshot(policy)
    metrics = steps(learner, 2)
    assert {"losses/actor", "losses/flow"} <= metrics.keys()
    assert any("vision_tower" in name for name in moved(policy, before))


def test_dsrl_moves_the_noise_policy_alone_online_and_opens_its_gate():
    _, policy, learner = make("dsrl_pi0")
    learner.begin_stage("online")
    before = snapshot(policy)
    steps(learner, 3)
    names = moved(policy, before)
    assert names
    assert all(name.startswith("steering.") for name in names)
    assert policy.steering.gate.item() == 1.0


def test_sacs_reference_is_the_whole_policy_of_the_start_though_imitation_trains_the_backbone():
    _, policy, learner = make("sac_pi0", behaviour_weight=1.0)
    agent, batch = learner.agent, random_transitions(seed=9)
    learner.begin_stage("online")
    noise, step_noise = agent.draw(len(batch), before := agent.observe(observation(batch)))
    log_std = agent.noise_scale(policy.features(before)).detach()
    with torch.no_grad():
        at_the_start = agent.path(before, noise, step_noise, log_std).chunk
    start = snapshot(policy)
    steps(learner, 3)
    assert any("vision_tower" in name for name in moved(policy, start))
    later = agent.reference_path(agent.reference_prefix(batch), noise, step_noise, log_std).chunk
    torch.testing.assert_close(later, at_the_start)


def test_dsrls_flow_is_frozen_in_a_train_stage_after_an_online_one():
    _, policy, learner = make("dsrl_pi0")
    learner.begin_stage("online")
    steps(learner, 1)
    before = snapshot(policy)
    learner.begin_stage("train")
    steps(learner, 2)
    assert all(name.startswith("steering.") for name in moved(policy, before))


@pytest.mark.parametrize("algo", ["sac_pi0", "dsrl_pi0", "best_of_n_pi0", "advantage_weighted_pi0"])
def test_the_policy_server_loads_what_the_learner_publishes(algo, tmp_path):
    cfg, policy, learner = make(algo)
    learner.begin_stage("online")
    steps(learner, 6)
    publish(tmp_path, learner.averaged, version=1, step=6, base=base_sha256(policy), policy="t", now=0.0, keep=2)
    engine = PolicyEngine(cfg, tmp_path)
    assert engine.refresh()
    assert engine.version == 1
    served = dict(engine.policy.named_parameters())
    for name, tensor in learner.averaged.items():
        torch.testing.assert_close(served[name].detach(), tensor)
    if algo == "dsrl_pi0":
        assert served["steering.gate"] > 0.5


def test_dsrl_starts_from_a_plain_policys_parameters():
    _, policy, learner = make("dsrl_pi0")
    plain = {name: p.detach() + 1 for name, p in trainable(tiny_policy()).items()}
    learner.start_from(plain)
    name = "core.action_out_proj.weight"
    assert torch.equal(dict(policy.named_parameters())[name], plain[name])
    with pytest.raises(ValueError, match=r"missing core\.action_out_proj\.weight"):
        learner.start_from({k: v for k, v in plain.items() if k != name})


def test_noise_samples_that_share_a_prefix_row_have_the_loss_and_gradients_of_repeated_ones(monkeypatch):
    policy, found = build_pi0("tiny", SPEC, "random", 0, HORIZON, SIZE, attention="sdpa"), []
    for shares in (True, False):
        monkeypatch.setattr(type(policy), "shares_prefix", shares)
        policy.zero_grad()
        torch.manual_seed(0)
        loss, _ = imitation_loss(policy, random_batch(), noise_samples=3)
        loss.backward()
        found.append(
            {name: p.grad for name, p in policy.named_parameters() if p.grad is not None} | {"": loss.detach()}
        )
    assert len(found[0]) > 40
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_a_vision_tower_that_trains_is_checkpointed_layer_by_layer_and_no_gradient_changes(monkeypatch):
    calls, found, layer = [], [], head.vision_layer
    monkeypatch.setattr(head, "vision_layer", lambda *given: calls.append(1) or layer(*given))
    for checkpointing in (False, True):
        policy = build_pi0("tiny", SPEC, "random", 0, HORIZON, SIZE, attention="sdpa", checkpointing=checkpointing)
        torch.manual_seed(0)
        imitation_loss(policy, random_batch(), noise_samples=2)[0].backward()
        found.append({name: p.grad for name, p in policy.named_parameters() if p.grad is not None})
        calls.append(0)
    layers = len(policy.backbone.model.vision_tower.vision_model.encoder.layers)
    assert calls == [1] * layers + [0] + [1] * (2 * layers) + [0]  # each a second time, in the backward pass
    assert any("vision_tower" in name for name in found[0])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
