"""A leader arm of the X-Trainer at a pseudo-terminal: eight Dynamixel servos and the board with its two buttons."""

import math
import types
from pathlib import Path

from servo_chain import ServoChain

X_SERIES = {
    "Model_Number": (0, 2), "Max_Position_Limit": (48, 4), "Min_Position_Limit": (52, 4), "Torque_Enable": (64, 1),
    "Goal_Position": (116, 4), "Present_Position": (132, 4),
}  # fmt: skip
ASK = b"\xaa\x55\xaa"


class DynamixelTables:
    """What `ServoChain` asks of a LeRobot bus."""

    model_ctrl_table, model_number_table = {"x": X_SERIES}, {"x": 1200}
    model_resolution_table = {"x": 4096}

    def __init__(self, numbers):
        self.motors = {f"servo{n}": types.SimpleNamespace(id=n, model="x") for n in numbers}


class FakeLeader(ServoChain):
    """settings: its keys of task.operator.arms."""

    def __init__(self, settings, port: Path):
        super().__init__(DynamixelTables([*settings.ids, settings.second_id, settings.gripper_id]), port)
        self._settings, self.pressed = settings, set()
        dynamixel = self._answer
        self._answer = lambda unread, handle: self._with_buttons(unread, handle, dynamixel)

    def put(self, joints, grip: float) -> None:
        """A hand puts it there: six rad, gripper 0 closed to 1 open."""
        settings = self._settings
        for number, joint, offset, sign in zip(settings.ids, joints, settings.offsets, settings.signs, strict=True):
            self._put(number, joint * sign + offset)
        closed, open_ = math.radians(settings.gripper_closed), math.radians(settings.gripper_open)
        self._put(settings.gripper_id, closed + grip * (open_ - closed))

    @property
    def locked(self) -> set:
        """Whether its servos have torque: {0}, {1}, or both."""
        return {servo.get("Torque_Enable") for servo in self.servos.values()}

    def _put(self, number: int, angle: float) -> None:
        units = round(angle / (2 * math.pi) * 4096) & 0xFFFFFFFF
        for register in ("Present_Position", "Goal_Position"):
            self.servos[number].set(register, units)

    def _with_buttons(self, unread: bytes, handle, dynamixel):
        if unread.startswith(ASK):
            said = sum(0 if button in self.pressed else 1 << shift for button, shift in (("a", 4), ("b", 0)))
            return bytes([said, said ^ 0xFF]), unread[3:]
        return dynamixel(unread, handle) if not ASK.startswith(unread[:3]) else (b"", unread)
