"""Does the operator's device answer? A person presses each key and button when asked; without one this is skipped.

Called by `robot.check`. The device is made as the actor makes it and its actions are read and dropped: nothing is sent.
"""

import time
from collections.abc import Callable
from typing import TextIO

import numpy as np
from hydra.errors import InstantiationException
from omegaconf import DictConfig

from serl_config.mistakes import mistake_message
from serl_robot_infra.check.report import Report
from serl_robot_infra.envs.base import Environment, PartLostError
from serl_robot_infra.estop import EmergencyStop
from serl_robot_infra.interventions.base import NOTHING_SAID, Intervention, OperatorGoneError, Words
from serl_robot_infra.interventions.none import NoIntervention
from serl_robot_infra.operators import build_operator
from serl_robot_infra.wiring import listen_for_estop
from serl_transport.contract.schema import Observation

PATIENCE_S = 8.0  # for each key
_POLL_S = 0.02


def check_operator(
    report: Report, cfg: DictConfig, env: Environment, seen: Observation | None, attended: bool, stream: TextIO
) -> None:
    """One finding for the device and, with a person there, one for each thing that it can say."""
    try:
        operator = build_operator(cfg, env)
    except (InstantiationException, ValueError, OSError, ImportError) as problem:
        said = mistake_message(problem) if isinstance(problem, InstantiationException) else str(problem)
        report.fail("operator", said, "its cable, its device in operator or task.operator")
        return
    try:
        still = np.zeros(env.spec.action_dim, np.float32)
        drives = None if seen is None else lambda: _drives(operator, seen, still)
        _check_device(report, operator, drives, attended, stream)
    finally:
        operator.close()


def check_estop_key(report: Report, cfg: DictConfig, estop: EmergencyStop, attended: bool, stream: TextIO) -> None:
    """rollout.estop_key at this terminal."""
    key = cfg.rollout.get("estop_key")
    if key is None or not attended:
        report.skip("e-stop's key", "rollout.estop_key is null" if key is None else "nobody is there to press it")
        return
    listen_for_estop(cfg, estop, stream)
    print(f"           press {key} (the e-stop; nothing moves)", file=stream, flush=True)
    if _until(lambda: estop.reason() is not None):
        report.ok("e-stop's key", f"{key} was heard")
    else:
        report.fail("e-stop's key", f"{key} was not heard for {PATIENCE_S:g} s",
                    "this terminal's own keys; rollout.estop_key; until then the hardware e-stop")  # fmt: skip


def _check_device(
    report: Report, operator: Intervention, drives: Callable[[], bool] | None, attended: bool, stream: TextIO
) -> None:
    name = type(operator).__name__
    if isinstance(operator, NoIntervention):
        report.skip("operator", "nobody helps: operator and task.operator are null, or this mode takes no help")
    elif (missing := operator.missing()) is not None:
        report.fail("operator", f"{name}: {missing}", "plug it in; who may read it (docs/robot.md, The operator)")
    elif not operator.is_person:
        report.ok("operator", f"{name}: a script, it has no keys")
    elif not attended:
        report.ok("operator", f"{name} is there")
        report.skip("keys", "nobody is there to press them: run it at a terminal without --unattended")
    else:
        report.ok("operator", f"{name} is there")
        for line in operator.describe():
            print(f"           {line}", file=stream)
        _press_each(report, operator, drives, stream)


def _press_each(report: Report, operator: Intervention, drives: Callable[[], bool] | None, stream: TextIO) -> None:
    for word in operator.vocabulary:
        print(f"           press {word}", file=stream, flush=True)
        heard = _until(lambda word=word: getattr(_words(operator), word))
        _tell(report, word, heard)
    if drives is not None:
        print("           take over and move it", file=stream, flush=True)
        operator.reset(np.random.default_rng(0), from_start=False)
        _tell(report, "take over", _until(drives))


def _tell(report: Report, what: str, heard: bool) -> None:
    if heard:
        report.ok(f"key {what}", "heard")
    else:
        report.fail(f"key {what}", f"not heard for {PATIENCE_S:g} s", "the map of its keys in operator; its battery")


def _words(operator: Intervention) -> Words:
    return operator.words() if operator.missing() is None else NOTHING_SAID


def _drives(operator: Intervention, seen: Observation, still: np.ndarray) -> bool:
    try:
        return operator.act(seen, lambda: still, 0)[1]
    except (OperatorGoneError, PartLostError):
        return False


def _until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True
