"""The yaml's limits against the robot: what it senses now, and what it says of itself. Called by `robot.check`.

A class may say its own limits, `limits() -> {action name: (low, high)}` in the task's units (`envs/base.py`).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from serl_robot_infra.check.report import Report
from serl_robot_infra.envs.base import Environment
from serl_robot_infra.guard import Stoppable
from serl_robot_infra.safety import describe
from serl_transport.contract.specs import TaskSpec

_LONGEST = 160  # characters of a line
_ROUNDING = 1e-3  # of a range


def check_limits(report: Report, env: Environment, safety: Mapping[str, Any] | None, state: np.ndarray | None) -> None:
    """state: float32[s] as sensed now; None: it was not seen."""
    _check_chain(report, describe(safety, env.spec.targets), isinstance(env, Stoppable))
    if state is not None:
        _check_state(report, env.spec, state)
        _check_pose(report, env.spec, state)
    limits = getattr(env, "limits", None)
    if limits is None:
        report.skip(
            "robot's limits", f"{type(env).__name__} has no limits(): action_low and action_high are not compared"
        )
    else:
        _check_reported(report, env.spec, limits())


def _check_chain(report: Report, said: str, robot: bool) -> None:
    if not robot and said.startswith("no safety limits"):
        report.ok("safety limits", "none beside action_low and action_high; a simulation")
    elif said.startswith("no safety limits"):
        report.warn("safety limits", said, "task.safety in its yaml: docs/safety.md, Limits")
    elif "nothing bounds" in said:
        report.fail("safety limits", said, "task.safety.max_speed of these names: docs/safety.md, Limits")
    else:
        shown = said.removeprefix("safety limits: ")
        report.ok("safety limits", shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]} … (the actor prints all)")


def _check_state(report: Report, spec: TaskSpec, state: np.ndarray) -> None:
    outside = [
        f"{name} is {value:g}, outside {low:g} to {high:g}"
        for name, value, low, high in zip(spec.state_names, state, spec.state_low, spec.state_high, strict=True)
        if not low - _slack(low, high) <= value <= high + _slack(low, high)
    ]
    if outside:
        report.warn("state", "; ".join(outside), "widen task.spec.state_low and state_high (unit? sign?) on both hosts")
    else:
        report.ok("state", f"{spec.state_dim} values inside state_low and state_high")


def _check_pose(report: Report, spec: TaskSpec, state: np.ndarray) -> None:
    """A target that may not be where the joint is drives it at the first action."""
    for place, sensed in spec.target_dims.items():
        action, at = spec.action_names[place], float(state[sensed])
        low, high = spec.action_low[place], spec.action_high[place]
        if not low - _slack(low, high) <= at <= high + _slack(low, high):
            report.warn("pose", f"{action} stands at {at:g}, outside its action limits {low:g} to {high:g}",
                        "the first action drives it inside: move it there by hand, or widen the limits")  # fmt: skip


def _check_reported(report: Report, spec: TaskSpec, limits: Mapping[str, tuple[float, float]]) -> None:
    silent = [name for name in spec.action_names if name not in limits]
    if len(silent) == spec.action_dim:
        report.skip(
            "robot's limits", "the robot tells none of its actions: action_low and action_high are not compared"
        )
        return
    wrong = []
    for name, low, high in zip(spec.action_names, spec.action_low, spec.action_high, strict=True):
        least, most = limits.get(name, (-np.inf, np.inf))
        if low < least - _slack(low, high):
            wrong.append(
                (f"{name}: action_low {low:g} is below the robot's {least:g}", f"action_low of {name}: {least:g}")
            )
        if high > most + _slack(low, high):
            wrong.append(
                (f"{name}: action_high {high:g} is above the robot's {most:g}", f"action_high of {name}: {most:g}")
            )
    for said, fix in wrong:
        report.fail("robot's limits", said, f"task.spec, on both hosts: {fix}, or calibrate the robot anew")
    if not wrong:
        rest = f"; not told, so not compared: {', '.join(silent)}" if silent else ""
        told = spec.action_dim - len(silent)
        report.ok(
            "robot's limits", f"action_low and action_high are inside what the robot says of {told} actions{rest}"
        )


def _slack(low: float, high: float) -> float:
    return _ROUNDING * (high - low) if np.isfinite(high - low) else 0.0
