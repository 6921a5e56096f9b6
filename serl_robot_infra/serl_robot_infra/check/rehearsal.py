"""What the safety chain makes of actions that nobody has sent yet: of a recorded episode, or of the policy's now.

    replay:   recorded states and actions ─▶ safety chain ─▶ the same? bent? refused?       (--move: sent as well)
    dry run:  env's observation ─▶ policy ─▶ its chunk ─▶ safety chain ─▶ the difference, and nothing is sent

Called by `robot.check`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import numpy as np

from openpi_client.base_policy import BasePolicy
from serl_robot_infra.check.looking import Look
from serl_robot_infra.check.recorded import Recorded
from serl_robot_infra.check.report import Report
from serl_robot_infra.envs.base import Environment
from serl_robot_infra.guard import RobotGuard
from serl_robot_infra.pacing import Pace
from serl_robot_infra.policy_client import infer_body
from serl_robot_infra.safety import SafetyChain, UnsafeTickError
from serl_transport.contract.errors import NotReady, WireError
from serl_transport.contract.specs import TaskSpec

_SHOWN = 8  # lines of single ticks
_SAME = 1e-5  # of an action's range


@dataclass(frozen=True, slots=True)
class Passed:
    """One action at the chain."""

    tick: int
    asked: np.ndarray  # float32[ad]
    sent: np.ndarray | None  # float32[ad]; None: refused
    refusal: str = ""


def through_chain(chain: SafetyChain, states: Sequence[np.ndarray], actions: Sequence[np.ndarray]) -> list[Passed]:
    """Each action at its state, float32[s] and float32[ad], as if all before it had been sent as they came out."""
    passed = []
    for tick, (state, action) in enumerate(zip(states, actions, strict=True)):
        try:
            passed.append(Passed(tick, action, chain.filter(action, state, "recorded")))
        except UnsafeTickError as refusal:
            passed.append(Passed(tick, action, None, str(refusal)))
    return passed


def report_passed(report: Report, check: str, passed: Sequence[Passed], spec: TaskSpec, stream: TextIO) -> None:
    """One finding, the first bent ticks, and for each action how often and how far."""
    span = np.float32(spec.action_high) - np.float32(spec.action_low)
    bent = [(p, np.abs(p.sent - p.asked) > _SAME * span) for p in passed if p.sent is not None]
    bent = [(p, where) for p, where in bent if where.any()]
    refused = [p for p in passed if p.sent is None]
    for p, where in bent[:_SHOWN]:
        parts = ", ".join(f"{spec.action_names[k]} {p.asked[k]:g} -> {p.sent[k]:g}" for k in np.flatnonzero(where))
        print(f"           tick {p.tick}: {parts}", file=stream, flush=True)
    for p in refused[:_SHOWN]:
        print(f"           tick {p.tick}: {p.refusal}", file=stream, flush=True)
    report.figures |= {f"{check}, ticks": len(passed), f"{check}, bent": len(bent), f"{check}, refused": len(refused)}
    if refused:
        report.fail(check, f"{len(refused)} of {len(passed)} actions refused: {refused[0].refusal}",
                    "the episode would end there: the data or the policy, not the limits")  # fmt: skip
    elif bent:
        report.warn(check, f"{len(bent)} of {len(passed)} actions bent: {_by_name(bent, spec)}",
                    "wider limits in task.safety if these are right; else slower demonstrations")  # fmt: skip
    else:
        report.ok(check, f"all {len(passed)} actions pass as they are")


def _by_name(bent: Sequence[tuple[Passed, np.ndarray]], spec: TaskSpec) -> str:
    parts = []
    for k, name in enumerate(spec.action_names):
        changes = [abs(float(p.sent[k] - p.asked[k])) for p, where in bent if where[k] and p.sent is not None]
        if changes:
            parts.append(f"{name} in {len(changes)} by up to {max(changes):g}")
    return "; ".join(parts)


def dry_run(
    report: Report, env: Environment, safety: Mapping[str, Any] | None, look: Look, policy: BasePolicy,
    horizon: int, questions: int, stream: TextIO,
) -> None:  # fmt: skip
    """Ask the policy so often with what is seen, each time as if the robot stood; its first `horizon` actions."""
    passed: list[Passed] = []
    for _ in range(questions):
        seen = look()
        try:
            chunk = policy.infer(infer_body(seen, env.spec.prompt, 0, None, "eval"))["actions"][:horizon]
        except NotReady as problem:
            report.warn("dry run", f"not done: {problem}", "again, once the learner serves a policy")
            return
        except WireError as problem:
            report.fail(
                "dry run", f"the policy gives no action: {problem}", "its learner's stage; logs/policy.log there"
            )
            return
        chain = SafetyChain.of(env.spec, safety)
        states = [seen.state] * len(chunk)
        passed += [
            Passed(len(passed) + p.tick, p.asked, p.sent, p.refusal) for p in through_chain(chain, states, chunk)
        ]
    report_passed(report, "dry run", passed, env.spec, stream)


def move_along(
    report: Report, env: Environment, safety: Mapping[str, Any] | None, guard: RobotGuard, episode: Recorded,
    rate_hz: float, stream: TextIO,
) -> None:  # fmt: skip
    """Reset, then send the recorded actions through the chain and the guard, at the control rate. The robot moves."""
    chain, passed, pace = SafetyChain.of(env.spec, safety), [], Pace(rate_hz)
    if (reason := guard.begin()) is not None:
        report.skip("replay, moved", f"nothing may move: {reason}")
        return
    try:
        seen = env.reset(0)
        pace.start()
        for tick, action in enumerate(episode.actions):
            pace.wait()
            sent = chain.filter(action, seen.state, "recorded")
            if (reason := guard.feed()) is not None:
                report.fail("replay, moved", f"ended at tick {tick}: {reason}", "what the words before say")
                return
            result = env.step(sent)
            sent = sent if result.executed is None else chain.executed(result.executed)
            passed.append(Passed(tick, action, sent))
            seen = result.observation
            if result.terminated or result.truncated:
                break
    except UnsafeTickError as refusal:
        report.fail("replay, moved", f"ended at tick {len(passed)}: {refusal}", "the recorded episode")
        return
    finally:
        guard.rest(stop=True)
    report_passed(report, "replay, moved", passed, env.spec, stream)
