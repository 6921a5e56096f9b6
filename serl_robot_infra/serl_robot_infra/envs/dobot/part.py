"""One arm with its gripper as a part of an action and of a state: names, limits, commands. Called by env.py.

action float32[ad] ─▶ this arm's six numbers and its gripper's ─▶ command ─▶ what was really sent
feedback, gripper  ─▶ this arm's states by name
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from serl_robot_infra.envs.dobot import protocol
from serl_robot_infra.envs.dobot.arm import Arm, ArmSettings
from serl_robot_infra.envs.dobot.gripper import Gripper, GripperSettings
from serl_robot_infra.envs.dobot.protocol import Feedback
from serl_robot_infra.envs.dobot.targets import Box, Lead, ToolTarget, bounded_joints
from serl_transport.contract.specs import TaskSpec

JOINTS = tuple(f"joint{number}" for number in range(1, 7))
MOVES = ("dx", "dy", "dz", "drx", "dry", "drz")
GRIP_NEAR = 0.05
_SLACK = 0.02  # rad
TOOL_INDEX = 1  # the place in the controller that the yaml's tool is put in


@dataclass(frozen=True, slots=True)
class Control:
    """What all arms share."""

    tool: bool  # end-effector displacements by ServoP; else joint targets by ServoJ
    v4: bool  # the firmware
    seconds: float  # of a control period
    joint_speed: float  # rad/s that no ServoJ asks for more than
    speed_factor: int
    max_age_s: float  # of feedback
    lead: Lead


class Part:
    """Made of `task.env.arms.<name>`; nothing is opened yet. ValueError names a key that is no good."""

    def __init__(self, name: str, node: Mapping[str, Any], box: Mapping[str, Any], spec: TaskSpec, control: Control):
        self.name, self._control = name, control
        node = dict(node)
        gripper = node.pop("gripper", None)
        where = f"task.env.arms.{name}"
        try:
            self.settings = ArmSettings(**node)
            self._gripper = None if gripper is None else Gripper(GripperSettings(**gripper))
        except (TypeError, ValueError) as mistake:
            raise ValueError(f"{where}: {mistake}") from None
        try:
            self._target = ToolTarget(control.lead, Box(box))
        except ValueError as mistake:
            raise ValueError(f"task.env.tool_box.{name}.{mistake}") from None
        self.arm = Arm(name, self.settings, control.v4, control.speed_factor, control.max_age_s)
        self.actions = [f"{name}_{move}" for move in (MOVES if control.tool else JOINTS)]
        self.states = [f"{name}_{key}" for key in (*JOINTS, "x", "y", "z")]
        if gripper is not None:
            self.actions.append(f"{name}_gripper")
            self.states.append(f"{name}_gripper")
        self._rows: list[int] = []
        self._spec = spec
        self._held: np.ndarray | None = None  # float64[6], the joints that are kept

    @property
    def dashboard(self) -> dict[str, Any]:
        """Where the watchdog process finds it."""
        return {"host": self.settings.host, "dashboard_port": self.settings.dashboard_port}

    def bind(self) -> None:
        """Find the actions in the spec, whose names were checked, and check their limits against the model's."""
        names = list(self._spec.action_names)
        self._rows = [names.index(action) for action in self.actions]
        for name, (lowest, highest) in self.limits().items():
            low, high = self._spec.action_low[names.index(name)], self._spec.action_high[names.index(name)]
            if low < lowest or high > highest:
                raise ValueError(
                    f"task.spec.action_low and action_high: {name}: a {self.settings.model} reaches "
                    f"{lowest:g} to {highest:g} rad, got {low:g} to {high:g}"
                )

    def limits(self) -> dict[str, tuple[float, float]]:
        """Joint target -> what its model reaches, rad; empty for end-effector control and an unknown model."""
        if self._control.tool or self.settings.model is None:
            return {}
        most = protocol.JOINT_LIMITS[self.settings.model]
        return {name: (-reach, reach) for name, reach in zip(self.actions, most, strict=False)}

    def outside(self, joints: np.ndarray) -> str | None:
        """Which joint target the task's limits would not allow, float64[6] rad; None: they do, or it has no such."""
        if self._control.tool:
            return None
        for row, at in zip(self._rows[:6], joints, strict=True):
            low, high = self._spec.action_low[row], self._spec.action_high[row]
            if not low - _SLACK <= at <= high + _SLACK:
                limits = f"task.spec.action_low and action_high ({low:g} to {high:g})"
                return f"{self._spec.action_names[row]} is at {at:.3f} rad, outside of {limits}"
        return None

    def open(self, cancelled: Callable[[], bool]) -> None:
        """Connect, compare with the yaml, enable. ValueError for what a person must mend, OSError else."""
        self.arm.open()
        self._compare(self.arm.feedback())
        self._make_ready(cancelled)
        if self._gripper is not None:
            self._gripper.open()

    def mend(self, cancelled: Callable[[], bool]) -> None:
        """Open anew what does not answer; tell and clear an alarm; enable."""
        self.forget()
        self.arm.mend()
        self._make_ready(cancelled)
        if self._gripper is not None:
            self._gripper.mend()

    def forget(self) -> None:
        """The arm was told something else than this part's last target."""
        self._held = None
        self._target.forget()

    def plan(self, action: np.ndarray, seen: Feedback) -> tuple[str, np.ndarray]:
        """(command, what becomes of this arm's six numbers)."""
        wish, control = action[self._rows[:6]].astype(np.float64), self._control
        if control.tool:
            pose, made = self._target.move(wish, seen.pose)
            return protocol.servo_tool(pose, control.seconds, control.v4), made
        joints = bounded_joints(wish, seen.joints, control.lead)
        return self._servo(joints, seen), joints

    def send(self, command: str, stopped: Callable[[], bool]) -> bool:
        """Whether it was sent: not after a stop."""
        with self.arm.turn():
            if stopped():
                return False
            self._held = None
            self.arm.servo(command)
            return True

    def record(self, executed: np.ndarray, made: np.ndarray | None, seen: Feedback) -> None:
        """Put what was sent into float32[ad]; None: nothing was, it stands."""
        if made is None:
            made = np.zeros(6) if self._control.tool else seen.joints
        executed[self._rows[:6]] = made

    def grip(self, goal: float) -> None:
        """Command the gripper, 0 closed to 1 open."""
        if self._gripper is not None:
            self._gripper.move(goal)

    def grip_of(self, action: np.ndarray) -> float:
        """The gripper's number of float32[ad]; an arm without one: 0."""
        return 0.0 if self._gripper is None else float(action[self._rows[6]])

    def grips(self, goal: float) -> bool:
        """Is the gripper there?"""
        return self._gripper is None or abs(self._gripper.position() - goal) < GRIP_NEAR

    def hold(self, stopped: Callable[[], bool]) -> None:
        """Keep the joints of the first call. Where the controller plans them now, so that nothing turns back."""
        if self._held is None:
            seen = self.arm.feedback()
            near = np.abs(seen.planned - seen.joints).max() <= self._control.lead.joints
            self._held = seen.planned if near else seen.joints
            self._target.forget()
        held = self._held
        self.drive(held, stopped)
        self._held = held

    def drive(self, joints: np.ndarray, stopped: Callable[[], bool]) -> None:
        """ServoJ to float64[6], rad."""
        self.send(self._servo(joints, self.arm.feedback()), stopped)

    def _servo(self, joints: np.ndarray, seen: Feedback) -> str:
        """A late tick that is caught up, or a joint that lags, is given more time rather than more speed."""
        far = float(np.abs(joints - seen.joints).max())
        if np.abs(seen.planned - seen.joints).max() <= self._control.lead.joints:
            far = float(np.abs(joints - seen.planned).max())
        return protocol.servo_joints(
            joints, max(self._control.seconds, far / self._control.joint_speed), self._control.v4
        )

    def sensed(self, seen: Feedback) -> dict[str, float]:
        """State name -> value."""
        values = [*seen.joints, *seen.pose[:3]]
        if self._gripper is not None:
            values.append(self._gripper.position())
        return dict(zip(self.states, map(float, values), strict=True))

    def close(self) -> None:
        """Let go; the arm and the gripper stay as they are."""
        self.arm.close()
        if self._gripper is not None:
            self._gripper.close()

    def _make_ready(self, cancelled: Callable[[], bool]) -> None:
        self.arm.prepare(cancelled)
        if not cancelled():
            self.arm.use_tool(TOOL_INDEX)

    def _compare(self, seen: Feedback) -> None:
        model = protocol.MODELS.get(seen.model, f"of type {seen.model}")
        if self.settings.model not in (None, model):
            raise ValueError(
                f"task.env.arms.{self.name}.model: expected {self.settings.model}, the controller at "
                f"{self.settings.host} says it is {model}"
            )
        if (outside := self.outside(seen.joints)) is not None:
            raise ValueError(f"{outside}: move the arm near its home pose by hand or in DobotStudio Pro")
