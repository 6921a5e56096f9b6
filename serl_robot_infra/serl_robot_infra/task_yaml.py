"""What config/task/<name>.yaml may say. Called by the actor and by flowserl_cli/compose.py before anything is opened.

Plain containers of the `task` section flow in; a ValueError names the key, what was expected and what came. An unknown
key is refused: a misspelt `safety` would otherwise switch the limits off.
"""

from collections.abc import Mapping
from typing import Any

from serl_config.nearest import nearest
from serl_robot_infra.safety import SafetyChain
from serl_transport.contract.bounds import check_name
from serl_transport.contract.specs import TaskSpec, required_keys

KEYS = ("name", "spec", "env", "operator", "reward", "safety", "rate_hz", "noop_dims")
NEEDED = {
    "spec": "the cameras, state, actions and prompt",
    "env": "the environment's class, {_target_: serl_robot_infra.envs.<yours>, ...}",
}


def check_keys(task: Any, file: str) -> None:
    """Which keys there are, before their values are known."""
    if not isinstance(task, Mapping):
        raise ValueError(f"task ({file}): expected a mapping of keys, got {task!r}")
    for key in task:
        if key not in KEYS:
            raise ValueError(
                f"task.{key} ({file} or the command line): unknown key{nearest(str(key), KEYS)}; keys of your robot go "
                "into task.env"
            )
    for key, what in NEEDED.items():
        if task.get(key) is None:
            raise ValueError(f"{file}: missing key {key!r}: {what}")
    if isinstance(task["spec"], Mapping):
        for key in required_keys():
            if key not in task["spec"]:
                raise ValueError(f"{file}: missing key 'spec.{key}'")


def check_names(run: Any, unique_identifier: Any) -> None:
    """The names that become folders, and part of every line about a run or an actor."""
    check_name("run", run)
    check_name("unique_identifier", unique_identifier)


def check_task(task: Any, file: str) -> None:
    """Keys and values; every interpolation is resolved."""
    check_keys(task, file)
    try:
        for key in ("env", "operator", "reward"):
            _check_target(key, task.get(key))
        spec = TaskSpec.from_dict(task["spec"])
        SafetyChain.of(spec, task.get("safety"))
        _check_rate(task.get("rate_hz"))
        _check_dims(task.get("noop_dims"), spec)
    except ValueError as mistake:
        raise ValueError(f"{file}: {mistake}") from None


def _check_target(key: str, node: Any) -> None:
    if node is None:
        return
    if not isinstance(node, Mapping) or not isinstance(node.get("_target_"), str):
        raise ValueError(f"task.{key}: expected {{_target_: <module>.<class>, ...}}, got {node!r}")


def _check_rate(rate: Any) -> None:
    if rate is not None and (isinstance(rate, bool) or not isinstance(rate, int | float) or not rate >= 0):
        raise ValueError(f"task.rate_hz: expected a number, 0 or more, or null (spec.control_hz), got {rate!r}")


def _check_dims(dims: Any, spec: TaskSpec) -> None:
    if dims is None:
        return
    if not isinstance(dims, list) or not dims or not all(type(d) is int and 0 <= d < spec.action_dim for d in dims):
        raise ValueError(
            f"task.noop_dims: expected a list of numbers from 0 to {spec.action_dim - 1} (places in action_names), or "
            f"null (all), got {dims!r}"
        )
