"""Real-time chunking through every process boundary's code: actor loop, gateway, policy server, tiny PI0."""

import csv
import io
import json
import socket
import threading
import time

import pytest
from omegaconf import OmegaConf

from flowserl_cli.compose import load_config
from serl_launcher.agents.build import build_policy
from serl_launcher.gateway.app import Gateway
from serl_launcher.gateway.settings import GatewaySettings
from serl_launcher.policies.base import trainable
from serl_launcher.run.parameters import base_sha256, publish
from serl_launcher.run.paths import RunPaths
from serl_launcher.serving.server import PolicyServer
from serl_robot_infra.main import main
from serl_transport.contract.specs import TaskSpec


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def cfg(tmp_path):
    words = ["run=t", f"runs_dir={tmp_path}", "schedule=eval", "rollout.mode=eval", "rollout.episodes=2"]
    words += [f"port={free_port()}", f"broadcast_port={free_port()}", "rollout.realtime=rtc", "rollout.rate_hz=20"]
    words += ["task.spec.max_ticks=30", "task.env.max_ticks=30"]
    words += ["serving.device=cpu", "rollout.video_every=0", "replay.capacity_frames=400"]
    return load_config(words)


def test_an_actor_with_rtc_is_driven_by_the_policy_server(cfg, tmp_path):
    paths = RunPaths(tmp_path / "t")
    paths.params.mkdir(parents=True)
    policy = build_policy(cfg, TaskSpec.from_dict(OmegaConf.to_container(cfg.task.spec)))
    tensors = {name: p.detach() for name, p in trainable(policy).items()}
    publish(
        paths.params, tensors, version=1, step=0, base=base_sha256(policy), policy="t", now=time.time(), keep=2
    )  # fmt: skip
    gateway = Gateway(GatewaySettings.of(OmegaConf.to_container(cfg, resolve=True)), paths)
    server = PolicyServer(cfg, paths)
    guided, act = [], server._engine.act
    server._engine.act = lambda queries: guided.extend(q.prefix_actions is not None for q in queries) or act(queries)
    threads = [threading.Thread(target=part.run) for part in (gateway, server)]
    for thread in threads:
        thread.start()
    try:
        stream = io.StringIO()
        assert main(cfg, stream) == 0, stream.getvalue()
    finally:
        server.stop()
        gateway.stop()
        for thread in threads:
            thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    rows = [json.loads(line) for line in paths.episodes.read_text().splitlines()]
    assert [row["n_ticks"] for row in rows] == [30, 30], rows
    assert "no action for" not in stream.getvalue()
    assert "evaluation adhoc_eval: 0/2 = 0.00 [0.00, 0.66]" in stream.getvalue()
    with (paths.root / "evaluation.csv").open(newline="") as file:
        trials = list(csv.DictReader(file))
    assert [(trial["trial"], trial["ticks"], trial["policy_version"]) for trial in trials] == [
        ("1", "30", "1"), ("2", "30", "1"),
    ]  # fmt: skip
    for trial, row in zip(trials, rows, strict=True):  # the actor's clock, and the journal's ticks
        assert (paths.root / trial["video"]).is_file()
        assert trial["episode_id"] == row["episode_id"]
        assert row["seconds"] == pytest.approx(float(trial["seconds"]), rel=0.2)
        assert float(trial["seconds"]) > 25 / 20  # in real time; a tick that came late is caught up
    assert sum(guided) > 2 * guided.count(False)  # the first chunk of an episode alone has nothing to agree with
