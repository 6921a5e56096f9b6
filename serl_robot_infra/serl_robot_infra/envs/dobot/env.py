"""Dobot arms as an environment: one or more arms with grippers, cameras, joint or end-effector control.

    step:  action float32[ad] ─▶ limits of the driver ─▶ ServoJ or ServoP to each arm ─▶ what was sent (executed)
           feedback, grippers, cameras ─▶ observation
    guard thread: hold, stop ─▶ each arm, whatever another one says
    watchdog process: stopper ─▶ a dashboard connection of its own (stopper.py)

Called by the actor loop like any environment; `config/task/dobot_pnp.yaml` is the X-Trainer. Joints are radians,
positions metres, grippers 0 (closed) to 1 (open). A part that does not answer, an alarm, or a camera without new
pictures raises PartLostError: the episode is cut, the arms hold, `reset` clears the alarm or opens the part anew.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from serl_config.nearest import nearest
from serl_robot_infra.envs.base import PartLostError, StepResult
from serl_robot_infra.envs.cameras import Cameras
from serl_robot_infra.envs.dobot.channel import each
from serl_robot_infra.envs.dobot.part import Control, Part
from serl_robot_infra.envs.dobot.protocol import SHORTEST_S, Feedback
from serl_robot_infra.envs.dobot.targets import Lead
from serl_transport.contract.schema import Observation
from serl_transport.contract.specs import TaskSpec

log = logging.getLogger(__name__)

_HOME_NEAR, _HOME_S = 0.02, 2.0  # rad, and seconds after the drive: an arm that is not there by then is blocked


class DobotEnv:
    """Answers `envs.base.Environment` and `guard.Stoppable`.

    Args:
        spec: `${task.spec}`. Actions of an arm: `<arm>_joint1` to `6` (targets, rad), or with control=tool `<arm>_dx`,
            `dy`, `dz` (m a tick), `drx`, `dry`, `drz` (rotation vector, rad a tick) along the base's axes, and
            `<arm>_gripper`. States: any of `<arm>_joint1` to `6`, `<arm>_x`, `y`, `z`, `<arm>_gripper`.
        arms: name -> the keys of `ArmSettings`, and gripper: those of `GripperSettings` or null.
        cameras: name -> the keys of `CameraSettings`.
        control: joints | tool; firmware: v3 | v4.
        home: waypoints, each arm -> six joints in rad; the last one is where an episode begins. home_speed: rad/s.
        home_gripper: of each gripper.
        joint_speed: rad/s, what ServoJ asks of a joint at most, also where a late tick is caught up.
        lead: the keys of `Lead`; tool_box: arm -> axis -> [low, high] m, where control=tool may command the tip.
        speed_factor: per cent, of every motion but the servo commands.
        feedback_max_age_ms, camera_max_age_ms, camera_frozen_s: when an arm or a camera counts as lost.

    Raises ValueError for a key that does not fit or an arm that is not what the yaml says, OSError for a part that does
    not answer, ImportError without OpenCV.
    """

    def __init__(
        self,
        spec: Mapping[str, Any],
        arms: Mapping[str, Mapping[str, Any]],
        cameras: Mapping[str, Mapping[str, Any]],
        home: Sequence[Mapping[str, Sequence[float]]],
        control: str = "joints",
        firmware: str = "v3",
        home_speed: float = 0.3,
        home_gripper: float = 1.0,
        lead: Mapping[str, float] | None = None,
        joint_speed: float = 1.0,
        tool_box: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
        speed_factor: int = 20,
        feedback_max_age_ms: float = 100.0,
        camera_max_age_ms: float = 250.0,
        camera_frozen_s: float | None = 2.0,
    ):
        self.spec = TaskSpec.from_dict(_plain(spec))
        self._low, self._high = np.float32(self.spec.action_low), np.float32(self.spec.action_high)
        shared = Control(
            tool=_one_of("control", control, ("joints", "tool")) == "tool",
            v4=_one_of("firmware", firmware, ("v3", "v4")) == "v4",
            seconds=1.0 / self.spec.control_hz, speed_factor=_per_cent(speed_factor),
            joint_speed=_positive("joint_speed", joint_speed),
            max_age_s=_positive("feedback_max_age_ms", feedback_max_age_ms) / 1e3, lead=_lead(lead),
        )  # fmt: skip
        if shared.seconds < SHORTEST_S:
            raise ValueError(f"task.spec.control_hz: expected at most {1 / SHORTEST_S:g}, got {self.spec.control_hz:g}")
        self._parts = _parts(_plain(arms), _plain(tool_box) or {}, self.spec, shared)
        self._home = _waypoints(_plain(home), self._parts)
        self._home_step = _positive("home_speed", home_speed) * shared.seconds
        self._home_gripper = _share("home_gripper", home_gripper)
        self._period, self._lead = shared.seconds, shared.lead.joints
        self._stopped = False  # actions are ignored until reset
        self.stopper = {
            "_target_": "serl_robot_infra.envs.dobot.stopper.DobotStopper",
            "arms": {part.name: part.dashboard for part in self._parts},
            "v4": shared.v4,
        }
        camera_age_ms = _positive("camera_max_age_ms", camera_max_age_ms)
        frozen_s = None if camera_frozen_s is None else _positive("camera_frozen_s", camera_frozen_s)
        self._cameras = Cameras(_plain(cameras), self.spec.cameras, camera_age_ms, frozen_s)
        try:
            for part in self._parts:
                self._open(part)
        except BaseException:
            self.close()
            raise

    def reset(self, seed: int, *, actuator_noise: float = 0.0) -> Observation:
        """Mend what was lost, clear alarms, drive home at `home_speed`, observe. PartLostError: it still cannot."""
        if actuator_noise:
            raise ValueError(f"rollout.demo_noise: a real robot is not disturbed, expected 0, got {actuator_noise:g}")
        self._stopped = False
        for part in self._parts:
            with self._faults(f"{part.name} arm"):
                part.mend(self._is_stopped)
        self._cameras.mend()
        self._go_home()
        for part in self._parts:
            part.forget()
        if self._stopped:
            raise PartLostError("a stop ended the reset")
        return self.observe()

    def limits(self) -> dict[str, tuple[float, float]]:
        """What the arms' models reach, rad, for tools/check_robot.py; the protocol does not tell a controller's own."""
        return {name: range_ for part in self._parts for name, range_ in part.limits().items()}

    def step(self, action: np.ndarray) -> StepResult:
        """Send float32[ad] and observe; `executed` is what was sent after the driver's own limits."""
        self.spec.check_action(action)
        executed = self._send(np.clip(action, self._low, self._high))
        return StepResult(self.observe(), 0.0, False, False, False, executed=executed)

    def observe(self) -> Observation:
        """What is seen now."""
        sensed: dict[str, float] = {}
        for part in self._parts:
            with self._faults(f"{part.name} arm"):
                sensed |= part.sensed(part.arm.feedback())
        state = np.array([sensed[name] for name in self.spec.state_names], np.float32)
        return Observation(self._cameras.images(), state)

    def hold(self) -> None:
        """Each arm keeps the joints of the first call. OSError names the arms that did not take it."""
        each({part.name: partial(part.hold, self._is_stopped) for part in self._parts})

    def stop(self) -> None:
        """A controlled stop of each arm by its controller; grippers keep what they hold. OSError: tried again."""
        self._stopped = True  # at once, also while a step sends
        each({part.name: part.arm.stop for part in self._parts})

    def close(self) -> None:
        """Let go of everything; the arms stay enabled where they are."""
        for part in self._parts:
            part.close()
        self._cameras.close()

    def _open(self, part: Part) -> None:
        try:
            part.open(self._is_stopped)
        except OSError as fault:
            raise ConnectionError(f"{part.name} arm: {fault}") from fault

    def _send(self, action: np.ndarray) -> np.ndarray:
        seen = {part.name: self._able(part) for part in self._parts}  # one that is lost: nothing is sent to any
        executed = action.astype(np.float32)
        for part in self._parts:
            command, made = part.plan(action, seen[part.name])
            with self._faults(f"{part.name} arm"):
                sent = part.send(command, self._is_stopped)
                if sent:
                    part.grip(part.grip_of(action))
            part.record(executed, made if sent else None, seen[part.name])
        return executed

    def _able(self, part: Part) -> Feedback:
        with self._faults(f"{part.name} arm"):
            return part.arm.check()

    def _go_home(self) -> None:
        """In a straight line through the joints from waypoint to waypoint, all arms together; a stop ends it."""
        start = {part.name: self._able(part).joints for part in self._parts}
        for goal in self._home:
            far = max(float(np.abs(goal[name] - start[name]).max()) for name in start)
            steps = int(np.ceil(far / self._home_step))
            for step in range(1, steps + 1):
                self._drive({name: start[name] + (goal[name] - start[name]) * step / steps for name in start})
            start = goal
        self._settle(start)

    def _settle(self, home: Mapping[str, np.ndarray]) -> None:
        """Until every joint is there, and the grippers for as long; a gripper that is held open or shut is told."""
        deadline = time.monotonic() + _HOME_S
        while not self._stopped:
            self._drive(home)
            late = self._away(home, _HOME_NEAR)
            with self._faults("grippers"):
                grips = [part.name for part in self._parts if not part.grips(self._home_gripper)]
            if late is None and not grips:
                return
            if time.monotonic() > deadline:
                if late is not None:
                    raise PartLostError(f"{late} is not at home {_HOME_S:g} s after the drive: is the arm blocked?")
                log.warning("the %s gripper is not at home_gripper: an episode begins all the same", grips[0])
                return

    def _drive(self, joints: Mapping[str, np.ndarray]) -> None:
        """One period of the drive. PartLostError: an arm does not follow."""
        if self._stopped:
            return
        next_ = time.monotonic() + self._period
        for part in self._parts:
            with self._faults(f"{part.name} arm"):
                part.arm.check()
                part.drive(joints[part.name], self._is_stopped)
                part.grip(self._home_gripper)
        if (late := self._away(joints, self._lead)) is not None:
            raise PartLostError(f"{late} does not follow the drive home: is the arm blocked?")
        time.sleep(max(0.0, next_ - time.monotonic()))

    def _away(self, joints: Mapping[str, np.ndarray], most: float) -> str | None:
        """The first joint that is further than so many rad from there."""
        for part in self._parts:
            off = np.abs(self._able(part).joints - joints[part.name])
            if off.max() > most:
                return f"{part.name}_joint{int(off.argmax()) + 1}"
        return None

    def _is_stopped(self) -> bool:
        return self._stopped

    @contextmanager
    def _faults(self, what: str) -> Iterator[None]:
        """A part that does not answer, refuses or has an alarm is a PartLostError."""
        try:
            yield
        except OSError as fault:
            raise PartLostError(f"{what}: {fault}") from fault


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def _parts(arms: Mapping[str, Any], boxes: Mapping[str, Any], spec: TaskSpec, control: Control) -> list[Part]:
    """ValueError for names that the arms and the spec do not share."""
    if not arms:
        raise ValueError("task.env.arms: expected at least one arm")
    if unknown := [name for name in boxes if name not in arms]:
        raise ValueError(f"task.env.tool_box.{unknown[0]}: no such arm{nearest(unknown[0], arms)}")
    parts = [Part(name, node, boxes.get(name) or {}, spec, control) for name, node in arms.items()]
    actions = [action for part in parts for action in part.actions]
    states = [state for part in parts for state in part.states]
    for key, names, known in (("action_names", spec.action_names, actions), ("state_names", spec.state_names, states)):
        for name in names:
            if name not in known:
                raise ValueError(f"task.spec.{key}: the arms have no {name!r}{nearest(name, known, show=40)}")
    if missing := [action for action in actions if action not in spec.action_names]:
        raise ValueError(f"task.spec.action_names: {missing[0]!r} is missing")
    for part in parts:
        part.bind()
    return parts


def _waypoints(home: Any, parts: Sequence[Part]) -> list[dict[str, np.ndarray]]:
    arms = [part.name for part in parts]
    if not isinstance(home, Sequence) or not home:
        raise ValueError(f"task.env.home: expected a list of waypoints {{{', '.join(arms)}: six joints}}, got {home!r}")
    for number, waypoint in enumerate(home):
        if not isinstance(waypoint, Mapping) or set(waypoint) != set(arms):
            raise ValueError(f"task.env.home[{number}]: expected joints of {', '.join(arms)}, got {waypoint!r}")
        for arm, joints in waypoint.items():
            if not isinstance(joints, Sequence) or len(joints) != 6 or not np.isfinite(np.asarray(joints, float)).all():
                raise ValueError(f"task.env.home[{number}].{arm}: expected six joints in rad, got {joints!r}")
    waypoints = [{arm: np.asarray(joints, float) for arm, joints in waypoint.items()} for waypoint in home]
    for part in parts:
        if (outside := part.outside(waypoints[-1][part.name])) is not None:
            raise ValueError(f"task.env.home[{len(home) - 1}].{part.name}: {outside}")
    return waypoints


def _lead(node: Any) -> Lead:
    try:
        return Lead(**(_plain(node) or {}))
    except (TypeError, ValueError) as mistake:
        raise ValueError(f"task.env.lead: {mistake}") from None


def _one_of(key: str, value: Any, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ValueError(f"task.env.{key}: expected {' or '.join(choices)}, got {value!r}")
    return value


def _per_cent(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= 100:
        raise ValueError(f"task.env.speed_factor: expected a whole number from 1 to 100, got {value!r}")
    return value


def _share(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"task.env.{key}: expected a number from 0 to 1, got {value!r}")
    return float(value)


def _positive(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < np.inf:
        raise ValueError(f"task.env.{key}: expected a number above 0, got {value!r}")
    return float(value)
