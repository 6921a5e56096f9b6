"""What an actor is told of servers that cannot be reached, and of addresses that are none."""

import time

import pytest
from scripted_learner import RobotPick

from serl_robot_infra.observers.rerun_log import read_address
from serl_robot_infra.openpi_policy import OpenpiPolicy, OpenpiSettings
from serl_robot_infra.rewards.classifier import connect
from serl_transport.contract.errors import NotReady


@pytest.fixture(scope="module")
def spec():
    env = RobotPick()
    yield env.spec
    env.close()


@pytest.mark.parametrize(
    ("host", "told"),
    [
        ("nowhere.invalid", "the name 'nowhere.invalid' does not resolve"),
        ("ws://nowhere.invalid", "the name 'nowhere.invalid' does not resolve"),
        ("::1", r"no policy server at ws://\[::1\]:1 \("),
    ],
)
def test_an_openpi_server_that_cannot_be_reached_is_told_at_once_with_the_keys(spec, host, told, caplog):
    began = time.monotonic()
    policy = OpenpiPolicy(OpenpiSettings.of({"host": host, "port": 1}, spec), spec, run="r", guided=False)
    assert "it is waited for where an action is wanted" in caplog.text
    with pytest.raises(NotReady, match=rf"{told}.*\(rollout.openpi.host, rollout.openpi.port\)"):
        policy.infer({})
    assert time.monotonic() - began < 8


def test_a_host_with_a_port_in_it_is_refused(spec):
    with pytest.raises(ValueError, match=r"rollout.openpi.host: expected a name or an address.*rollout.openpi.port"):
        OpenpiSettings.of({"host": "h:8000"}, spec)


def test_a_reward_server_that_cannot_be_reached_is_told_with_the_reason(spec):
    class EnoughError(Exception):
        pass

    def hear(line):
        if "resolve" in line:
            raise EnoughError(line)

    with pytest.raises(EnoughError, match=r"\(reward.ip, reward.port\).*: the name 'nowhere.invalid' does not resolve"):
        connect("nowhere.invalid", 5590, "a", spec.to_dict(), on_wait=hear)


def test_addresses_of_a_viewer():
    assert read_address("[fd00::7]:9876") == ("fd00::7", 9876)
    assert read_address("robot:9876") == ("robot", 9876)
    with pytest.raises(ValueError, match=r"rollout.rerun_address=a:b:1: expected host:port, such as"):
        read_address("a:b:1")
