"""The policy server behind a real gateway: batches, deadlines, order, failures, hot swap under load."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from serving_samples import body, connected, put, running, wait_for
from tiny import HORIZON, tiny_config

from serl_launcher.run.paths import RunPaths
from serl_launcher.serving.server import PolicyServer
from serl_transport.contract.errors import DeadlineMissed, Internal, NotReady, SchemaMismatch


class Gate:
    """Stands in front of `engine.act`: holds batches back while closed and remembers what was in them."""

    def __init__(self, engine):
        self.act, self.batches = engine.act, []
        self.open = threading.Event()
        self.open.set()
        self.inside = threading.Event()
        self.fail = lambda query: False
        engine.act = self

    def __call__(self, queries):
        self.inside.set()
        assert self.open.wait(20)
        self.inside.clear()
        self.batches.append([int(query.seed) for query in queries])
        if any(self.fail(query) for query in queries):
            raise RuntimeError("secret detail")
        return self.act(queries)


class Asker(threading.Thread):
    """One actor's question on its own connection; `answer` is the reply or the error."""

    def __init__(self, client, question):
        super().__init__(daemon=True)
        self.client, self.question, self.answer = client, question, None
        self.start()

    def run(self):
        try:
            self.answer = self.client.infer(self.question, timeout_ms=20_000)
        except Exception as error:
            self.answer = error

    def result(self):
        self.join(20)
        return self.answer


@pytest.fixture
def lab(tmp_path):
    with running(tmp_path) as (gateway, server), connected(gateway, "a") as a, connected(gateway, "b") as b:
        gate = Gate(server._engine)
        yield server, gate, a, b


def occupy(gate, client):
    """Close the gate with one question inside; the asker of it."""
    gate.open.clear()
    first = Asker(client, body(seed=0) | {"seed": 0})
    assert gate.inside.wait(10)
    return first


def test_what_comes_while_a_batch_runs_is_answered_together(lab):
    _, gate, a, b = lab
    first = occupy(gate, a)
    others = [Asker(b, body(seed=k) | {"seed": k}) for k in (1, 2, 3)]
    time.sleep(0.3)
    gate.open.set()
    assert first.result()["actions"].shape == (HORIZON, 2)
    answers = [other.result() for other in others]
    assert all(answer["policy_version"] == 0 for answer in answers)
    assert gate.batches[0] == [0]
    assert sorted(gate.batches[1]) == [1, 2, 3]
    alone = a.infer(body(seed=2) | {"seed": 2})
    np.testing.assert_allclose(answers[1]["actions"], alone["actions"], atol=1e-6)


def test_a_question_past_its_deadline_is_refused_and_not_executed(lab):
    _, gate, a, b = lab
    first = occupy(gate, a)
    late = Asker(b, body() | {"seed": 7, "deadline_ms": 50})
    patient = Asker(b, body() | {"seed": 8, "deadline_ms": 20_000})
    time.sleep(0.3)
    gate.open.set()
    assert "actions" in first.result()
    error = late.result()
    assert isinstance(error, DeadlineMissed), error
    assert "not executed" in error.message
    assert "actions" in patient.result()
    assert 7 not in [seed for batch in gate.batches for seed in batch]


def test_actors_go_before_evaluation(tmp_path):
    with running(tmp_path, serving__max_batch=1) as (gateway, server), connected(gateway) as a:
        gate = Gate(server._engine)
        first = occupy(gate, a)
        evaluation = Asker(a, body() | {"seed": 1, "mode": "eval"})
        time.sleep(0.1)
        online = Asker(a, body() | {"seed": 2, "mode": "online"})
        time.sleep(0.2)
        gate.open.set()
        for asker in (first, evaluation, online):
            assert "actions" in asker.result()
        assert gate.batches == [[0], [2], [1]]


def test_a_failure_costs_its_cause_a_typed_error_and_nobody_else(lab):
    _, gate, a, b = lab
    gate.fail = lambda query: query.seed == 13
    first = occupy(gate, a)
    culprit = Asker(b, body() | {"seed": 13})
    neighbour = Asker(b, body() | {"seed": 5})
    time.sleep(0.3)
    gate.open.set()
    assert "actions" in first.result()
    assert "actions" in neighbour.result()
    error = culprit.result()
    assert isinstance(error, Internal)
    assert "secret detail" not in error.message
    assert "actions" in a.infer(body())  # it lives


def test_a_device_that_is_broken_ends_the_process_instead_of_failing_every_question(tmp_path, monkeypatch):
    """An illegal access on a card stays with its process; here the device only says that it is a card."""

    def broken(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    paths = RunPaths(tmp_path)
    put(paths.params, 0)
    server = PolicyServer(tiny_config(), paths)
    server._engine.act = broken
    server._engine.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        server._answer([SimpleNamespace(query=None)])
    server._link.close()


def test_more_than_the_queue_takes_is_told_to_ask_again(tmp_path):
    with running(tmp_path, serving__max_queue=2) as (gateway, server), connected(gateway) as a:
        gate = Gate(server._engine)
        first = occupy(gate, a)
        askers = [Asker(a, body() | {"seed": k}) for k in range(1, 6)]
        time.sleep(0.4)
        gate.open.set()
        assert "actions" in first.result()
        results = [asker.result() for asker in askers]
        busy = [result for result in results if isinstance(result, NotReady)]
        assert len(busy) == 3
        assert "busy" in busy[0].message
        assert sum("actions" in result for result in results if isinstance(result, dict)) == 2


def test_samples_come_from_one_prefix(lab):
    server, _, a, _ = lab
    encoded = []
    encode = server._engine.policy.encode

    def counting(observation, **options):
        encoded.append(len(observation))
        return encode(observation, **options)

    server._engine.policy.encode = counting
    answer = a.infer(body(samples=5))
    assert answer["actions"].shape == (5, HORIZON, 2)
    assert encoded == [1]
    np.testing.assert_allclose(answer["actions"][0], a.infer(body())["actions"], atol=1e-6)
    assert len({actions.tobytes() for actions in answer["actions"]}) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 0}, "samples: expected a whole number from 1 to 64, got 0"),
        ({"samples": 10**9}, "samples: expected a whole number from 1 to 64"),
        ({"deadline_ms": -1}, "deadline_ms: expected a number above 0, got -1"),
        ({"mode": "evil"}, "mode: expected one of"),
        ({"prefix_actions": np.zeros((2, 3), np.float32)}, r"prefix_actions: expected float32\[k, 2\], got float32"),
        ({"prefix_actions": np.full((2, 2), np.nan, np.float32)}, "prefix_actions: expected finite"),
        ({"inference_delay": 3, "prefix_actions": np.zeros((2, 2), np.float32)}, "inference_delay: .* 0 to 2, got 3"),
        ({"seed": -1}, "seed: expected a whole number from 0 to 9223372036854775807, got -1"),
        ({"min_version": "x"}, "min_version: expected a whole number from -1 to 2147483647, got 'x'"),
    ],
)
def test_a_malformed_question_is_named(lab, change, message):
    _, _, a, _ = lab
    with pytest.raises(SchemaMismatch, match=message):
        a.infer(body() | change)
    assert "actions" in a.infer(body())


def test_a_version_that_is_on_its_way_is_waited_for_and_one_that_is_not_is_refused(tmp_path):
    with running(tmp_path) as (gateway, server), connected(gateway) as a:
        with pytest.raises(NotReady, match="version 1 was asked for, 0 is served"):
            a.infer(body(min_version=1))
        put(tmp_path / "params", 1, shift=0.1)
        assert a.infer(body(min_version=1))["policy_version"] == 1
        put(tmp_path / "params", 2, damage=True)
        wait_for(lambda: server._engine._refused == 2)
        with pytest.raises(NotReady, match="version 2 was asked for, 1 is served"):
            a.infer(body(min_version=2))


def test_hot_swap_under_load_without_an_error_and_versions_never_go_back(tmp_path):
    with running(tmp_path) as (gateway, server):
        stop, seen, errors = threading.Event(), {}, []

        def act(name):
            versions = seen.setdefault(name, [])
            with connected(gateway, name) as client:
                while not stop.is_set():
                    try:
                        versions.append(client.infer(body())["policy_version"])
                    except Exception as error:
                        errors.append(error)

        actors = [threading.Thread(target=act, args=(f"actor-{k}",)) for k in range(3)]
        for actor in actors:
            actor.start()
        for version in range(1, 6):
            wait_for(lambda n=version: server._engine.version >= n - 1 and all(seen.values()))
            put(tmp_path / "params", version, shift=0.01 * version)
        wait_for(lambda: all(versions and versions[-1] == 5 for versions in seen.values()))
        stop.set()
        for actor in actors:
            actor.join(10)
        assert not errors
        for versions in seen.values():
            assert versions == sorted(versions)
        status = wait_for(lambda: gateway.forwarder.to_status().get("version") == 5 and gateway.forwarder.to_status())
        assert status["failed"] == 0
        assert status["swaps"] >= 1
