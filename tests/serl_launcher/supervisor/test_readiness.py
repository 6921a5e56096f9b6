"""The roles that a small run does not start say that they are ready, and beat: openpi's, GR00T's and the reward server.

The real processes, started as the supervisor starts them. tests/integration/test_whole_run.py asks the others.
"""

import os
import signal
import socket
import time

import pytest
from omegaconf import OmegaConf

from flowserl_cli.compose import load_config
from serl_config.process import stopped_groups
from serl_launcher.rewards.model import RewardCard, RewardClassifier, save
from serl_launcher.supervisor.children import Child
from serl_launcher.supervisor.roles import roles_for
from serl_launcher.supervisor.run_folder import prepare

PATIENCE_S = 120.0


def free_port() -> int:
    """A port whose neighbour above, for broadcasts, was free as well."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first, socket.socket() as second:
            port = first.getsockname()[1]
            if second.connect_ex(("127.0.0.1", port + 1)) != 0:
                return port


def beats(child: Child, more: int, deadline: float) -> tuple[int, int]:
    """Wait for further beats; how many there were before and after."""
    child.look(1.0, ())
    first = child._pulse.last.count
    while child._pulse.last.count < first + more:
        assert time.monotonic() < deadline, child.tail()
        time.sleep(0.05)
        assert child.look(0.05, ()) is None
    return first, child._pulse.last.count


@pytest.mark.slow
def test_the_servers_of_other_clients_and_the_reward_server_say_that_they_are_ready(tmp_path, free_ports):
    words = [f"runs_dir={tmp_path}", f"port={free_ports[0]}", f"broadcast_port={free_ports[1]}", "learner=true"]
    words += ["serving.openpi_port=0", "serving.groot_port=0"]
    words += ["reward=classifier", f"reward.model={tmp_path / 'reward'}"]
    cfg = load_config([*words, f"reward.port={free_port()}"])
    card = RewardCard("outcome", 2, tuple(cfg.task.spec.cameras)[:1], 16, False, OmegaConf.to_container(cfg.task.spec))
    save(tmp_path / "reward", RewardClassifier(card), card, {})
    folder = prepare(cfg)
    specs = {spec.name: spec for spec in roles_for(cfg, folder.paths, folder.stages)}
    children = [Child(specs["openpi"]), Child(specs["reward"]), Child(specs["groot"])]
    with folder.lock:
        try:
            for child in children:
                child.start()
                assert not child.ready
            deadline = time.monotonic() + PATIENCE_S
            while not all(child.ready for child in children):
                assert not any(child.poll() for child in children), [child.tail() for child in children]
                assert time.monotonic() < deadline, [child.tail() for child in children]
                time.sleep(0.05)
            counts = [beats(child, 3, deadline) for child in children]  # without any client
            assert all(first < last for first, last in counts)
            os.kill(children[1].pid, signal.SIGSTOP)
            while children[1].pid not in stopped_groups():
                time.sleep(0.02)
            assert children[1].look(1.0, stopped_groups()).stopped
            children[1].kill(dump=False)
            while not (death := children[1].poll()):
                time.sleep(0.02)
            assert (death.cause, death.ready) == ("signal SIGKILL", True)
        finally:
            for child in children:
                child.stop(hurry=lambda: True)
