"""The policy engine: seeded, batched, swapped between batches, and never serving what does not fit."""

import hashlib

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from serving_samples import body, put
from tiny import HORIZON, SPEC, tiny_config

from flowserl_cli.compose import ConfigError, load_config
from serl_launcher.agents.build import build_policy
from serl_launcher.policies.base import trainable
from serl_launcher.run.parameters import base_sha256, publish
from serl_launcher.serving.engine import PolicyEngine
from serl_launcher.serving.local import LocalPolicy, build
from serl_launcher.serving.query import Query, query_from_body
from serl_transport.contract.errors import NotReady
from serl_transport.contract.specs import TaskSpec
from serl_transport.parameters.params import ParametersBlob


@pytest.fixture
def engine(tmp_path):
    put(tmp_path, 0)
    engine = PolicyEngine(tiny_config(), tmp_path)
    assert engine.refresh()
    return engine


def test_a_batch_answers_as_its_members_would_alone(engine):
    queries = [query_from_body(body(seed), SPEC) for seed in range(3)]
    together = engine.act(queries)
    assert np.stack(together).shape == (3, HORIZON, 2)
    for query, chunk in zip(queries, together, strict=True):
        np.testing.assert_allclose(engine.act([query])[0], chunk, atol=1e-5)


def test_actions_are_physical_and_within_the_limits(engine):
    chunk = np.stack(engine.act([query_from_body(body(), SPEC)] * 8))
    assert (np.abs(chunk[..., 0]) <= 0.02).all()
    assert (np.abs(chunk[..., 1]) <= 1).all()


def test_new_parameters_change_the_answer_and_the_version(engine, tmp_path):
    query = query_from_body(body(), SPEC)
    before = engine.act([query])
    assert not engine.refresh()
    put(tmp_path, 1, shift=0.1)
    assert engine.refresh()
    assert engine.version == 1
    assert not np.allclose(before, engine.act([query]))


def test_parameters_that_do_not_fit_are_refused_and_the_last_version_serves_on(engine, tmp_path, caplog):
    query = query_from_body(body(), SPEC)
    before = engine.act([query])
    put(tmp_path, 1, shift=0.1, damage=True)
    assert not engine.refresh()
    assert engine.version == 0
    assert "missing core.action_out_proj.bias" in caplog.text
    np.testing.assert_array_equal(before, engine.act([query]))


def damage(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_not_served_and_the_version_before_is(tmp_path, caplog):
    for version in (1, 2):
        put(tmp_path, version, shift=0.1 * version)
    damage(tmp_path / "v000002.safetensors")
    engine = PolicyEngine(tiny_config(), tmp_path)
    assert engine.refresh()
    assert engine.version == 1
    assert not engine.will_serve(2)
    assert "v000002.safetensors is damaged: it does not match its sha256; version 1 is taken" in caplog.text
    put(tmp_path, 3, shift=0.3)
    assert engine.refresh()
    assert engine.version == 3


def test_a_learner_that_began_anew_is_followed_although_its_numbers_repeat(engine, tmp_path):
    before = engine.act([query_from_body(body(), SPEC)])
    for path in tmp_path.iterdir():
        path.unlink()
    put(tmp_path, 0, shift=0.1)
    assert engine.refresh()
    assert not np.allclose(before, engine.act([query_from_body(body(), SPEC)]))


def test_a_version_that_is_damaged_while_another_serves_changes_nothing(engine, tmp_path, caplog):
    put(tmp_path, 1, shift=0.1)
    damage(tmp_path / "v000001.safetensors")
    assert not engine.refresh()
    assert engine.version == 0
    assert "v000001.safetensors is damaged" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"observation": {"images": {}, "state": np.zeros(3, np.float32)}}, "front"),
        ({"observation": {"state": np.zeros(3, np.float32)}}, "expected observation"),
        ({"observation": None}, "expected observation"),
    ],
)
def test_a_malformed_question_names_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        query_from_body(body() | change, SPEC)


def test_a_state_that_is_not_finite_is_refused():
    question = body()
    question["observation"]["state"][1] = np.nan
    with pytest.raises(ValueError, match="b"):
        query_from_body(question, SPEC)


def test_the_local_policy_answers_and_waits_for_the_version_that_is_asked_for(tmp_path):
    put(tmp_path / "params", 3)
    policy = LocalPolicy.from_checkpoint(tiny_config(checkpoint_path=str(tmp_path)))
    answer = policy.infer(body(min_version=3))
    assert answer["policy_version"] == 3
    assert answer["actions"].shape == (HORIZON, 2)
    with pytest.raises(NotReady, match="version 4"):
        policy.infer(body(min_version=4))


def test_a_run_that_trained_the_expert_alone_is_evaluated_as_it_was(tmp_path):
    """From the words of a training to those of an evaluation that name nothing but the run."""
    trained = load_config(["learner=true", "+policy.train=expert", "seed=4"])
    spec = TaskSpec.from_dict(OmegaConf.to_container(trained.task.spec))
    policy = build_policy(trained, spec)
    published = {"version": 9, "step": 90, "base": base_sha256(policy), "policy": "t", "now": 0.0, "keep": 1}
    publish(tmp_path / "params", trainable(policy), **published)
    OmegaConf.save(trained, tmp_path / "config.yaml")
    words = ["actor=true", "rollout.policy=local", "ip=null", f"checkpoint_path={tmp_path}"]
    images = {camera: np.zeros((h, w, 3), np.uint8) for camera, (h, w) in spec.cameras.items()}
    question = {"observation": {"images": images, "state": np.zeros(len(spec.state_names), np.float32)}}
    answer = LocalPolicy.from_checkpoint(load_config(words)).infer(question)
    assert answer["policy_version"] == 9
    with pytest.raises(ConfigError, match=r"policy\.train is full, .* set policy\.train=expert"):
        load_config([*words, "policy=pi0_tiny"])


def test_the_same_seed_gives_the_same_chunk_whatever_was_asked_before(engine):
    query = query_from_body(body(), SPEC)
    first = engine.act([query])
    engine.act([Query(query.images, query.state, query.prompt, None)])
    torch.manual_seed(99)
    np.testing.assert_array_equal(first, engine.act([query]))


class PublishesAtOnce:
    """A link whose learner has parameters: calls back as the client's listener thread does."""

    def __init__(self, folder):
        self.folder = folder

    def recv_network_callback(self, callback, *, raw=False):
        assert raw
        self.callback = callback
        self.tell(2)

    def tell(self, version):
        put(self.folder, version, shift=0.1 * version)
        blob = (self.folder / f"v{version:06d}.safetensors").read_bytes()
        self.callback(ParametersBlob(version, blob, hashlib.sha256(blob).hexdigest()))


def test_a_local_policy_follows_the_parameters_that_its_link_brings(tmp_path):
    link = PublishesAtOnce(tmp_path)
    policy = build(tiny_config(), link)
    first = policy.infer(body())
    link.tell(5)
    second = policy.infer(body(min_version=5))
    assert (first["policy_version"], second["policy_version"]) == (2, 5)
    assert not np.allclose(first["actions"], second["actions"])


def test_a_local_policy_without_learner_needs_a_checkpoint():
    with pytest.raises(ValueError, match="checkpoint_path"):
        build(tiny_config(ip=None), None)


def test_guided_and_plain_questions_share_a_batch(engine):
    """A question with a running chunk agrees with it in physical units; its neighbours are what they are alone."""
    running = np.float32([[0.015, -0.5], [0.01, 0.5], [-0.015, 0.9]])
    plain = query_from_body(body(1), SPEC)
    guided = query_from_body(body(2, prefix_actions=running, inference_delay=2, samples=3), SPEC)
    first, chunks, last = engine.act([plain, guided, plain])
    alone = engine.act([plain])[0]
    np.testing.assert_allclose(first, alone, atol=1e-6)
    np.testing.assert_allclose(last, alone, atol=1e-6)
    assert chunks.shape == (3, HORIZON, 2)
    assert np.abs(chunks[:, :2, 0] - running[:2, 0]).max() < 0.1 * 0.02
    assert np.abs(chunks[:, :2, 1] - running[:2, 1]).max() < 0.1
    unguided = engine.act([query_from_body(body(2, samples=3), SPEC)])[0]
    assert np.abs(unguided[:, :2, 1] - running[:2, 1]).mean() > 0.3


def test_a_pinned_version_is_served_though_newer_ones_come_and_nothing_takes_its_place(tmp_path, caplog):
    for version in (1, 2):
        put(tmp_path, version, shift=0.1 * version)
    pin = None
    engine = PolicyEngine(tiny_config(), tmp_path, pinned=lambda: pin)
    assert (engine.refresh(), engine.version) == (True, 2)
    pin = 1
    assert (engine.refresh(), engine.version) == (True, 1)
    put(tmp_path, 3, shift=0.3)
    assert (engine.refresh(), engine.version, engine.will_serve(3)) == (False, 1, True)
    damage(tmp_path / "v000002.safetensors")
    pin = 2
    assert (engine.refresh(), engine.version) == (False, 1)
    assert "version 2 is pinned and cannot be served" in engine.trouble
    again = PolicyEngine(tiny_config(), tmp_path, pinned=lambda: pin)
    assert (again.refresh(), again.version) == (False, -1)  # a person did not want version 3
    pin = None
    assert (engine.refresh(), engine.version, engine.trouble) == (True, 3, None)
