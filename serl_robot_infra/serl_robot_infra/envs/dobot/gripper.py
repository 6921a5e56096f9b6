"""The X-Trainer's gripper: one Feetech SMS/STS servo on a serial line of its own, 0 closed to 1 open.

Called by env.py from the control loop's thread. Protocol 0 of Feetech: FF FF id length instruction … checksum;
registers, torque limit and range as in the X-Trainer's client (dobot_gripper.py). It calls itself model 10760, which no
driver of LeRobot takes. After a stop it keeps its target with the limited torque: what it holds is not dropped.
"""

import logging
from dataclasses import dataclass

from serl_robot_infra.serial_line import SerialLine

log = logging.getLogger(__name__)

PING, READ, WRITE = 1, 2, 3
TORQUE_ENABLE, GOAL, TORQUE_LIMIT, POSITION = 40, 41, 48, 56
_ANSWER_S = 0.05
_TRIES = 3  # a corrupted packet
_RANGES = {"id": (0, 253), "closed": (0, 4095), "open": (0, 4095), "torque_limit": (1, 1000), "speed": (1, 4096)}
_FAULTS = ("voltage", "angle sensor", "overheated", "overcurrent", "angle limit", "overload")


@dataclass(frozen=True, slots=True)
class GripperSettings:
    """task.env.arms.<name>.gripper. ValueError names a key that is no good."""

    port: str
    id: int
    closed: int = 2048  # servo units, 4096 a turn; of each gripper, `pos` of dobot_settings.ini
    open: int = 3052
    torque_limit: int = 300  # thousandths of its stall torque
    speed: int = 3000  # servo units per second

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"gripper.{name}: expected a whole number from {low} to {high}, got {value!r}")
        if self.closed == self.open:
            raise ValueError(f"gripper.open: must differ from gripper.closed, got {self.open} for both")


class Gripper:
    """Opened by `open`; OSError when it does not answer."""

    def __init__(self, settings: GripperSettings):
        self._settings = settings
        self._line: SerialLine | None = None
        self._goal: float | None = None
        self._said = 0

    def open(self) -> None:
        """Connect, limit the torque, and have it where it stands."""
        self.close()
        self._line = SerialLine(self._settings.port)
        self._ask(PING)
        self._write(TORQUE_LIMIT, self._settings.torque_limit.to_bytes(2, "little"))
        self.move(self.position())
        self._write(TORQUE_ENABLE, b"\x01")

    def mend(self) -> None:
        """Open it anew unless it answers and kept its settings."""
        try:
            kept = self._number(TORQUE_LIMIT) == self._settings.torque_limit
            why = "it has lost its supply, and its torque limit with it"
        except OSError as fault:
            kept, why = False, str(fault)
        if not kept:
            log.warning("gripper %d: set up anew: %s", self._settings.id, why)
            self.open()

    def position(self) -> float:
        """Measured, 0 closed to 1 open; a little beyond by its own error."""
        return (self._number(POSITION) - self._settings.closed) / (self._settings.open - self._settings.closed)

    def _number(self, address: int) -> int:
        return int.from_bytes(self._ask(READ, bytes([address, 2])), "little", signed=True)

    def move(self, goal: float) -> None:
        """Towards 0 (closed) to 1 (open), clipped; the same goal is not sent twice."""
        goal = min(max(goal, 0.0), 1.0)
        if self._goal is not None and abs(goal - self._goal) < 1e-3:
            return
        units = round(self._settings.closed + goal * (self._settings.open - self._settings.closed))
        acceleration, time_ms = 0, 0
        self._write(
            GOAL,
            bytes([acceleration]) + b"".join(n.to_bytes(2, "little") for n in (units, time_ms, self._settings.speed)),
        )
        self._goal = goal

    def close(self) -> None:
        """Idempotent; the servo keeps its torque."""
        line, self._line, self._goal = self._line, None, None
        if line is not None:
            line.close()

    def _write(self, address: int, data: bytes) -> None:
        self._ask(WRITE, bytes([address]) + data)

    def _ask(self, instruction: int, parameters: bytes = b"") -> bytes:
        """The answer's data."""
        if self._line is None:
            raise ConnectionError(f"{self._settings.port}: not open")
        body = bytes([self._settings.id, len(parameters) + 2, instruction]) + parameters
        for left in reversed(range(_TRIES)):
            self._line.write(b"\xff\xff" + body + _checksum(body))
            try:
                return self._answer(2 if instruction == READ else 0)
            except (TimeoutError, ValueError) as fault:
                if not left:
                    raise TimeoutError(f"gripper {self._settings.id}: {fault}") from fault
        raise AssertionError

    def _answer(self, size: int) -> bytes:
        assert self._line is not None
        packet = self._line.read(6 + size, _ANSWER_S)
        body = packet[2:-1]
        if packet[:2] != b"\xff\xff" or body[0] != self._settings.id or packet[-1:] != _checksum(body):
            raise ValueError(f"{self._settings.port}: a corrupted answer {packet.hex(' ')}")
        if body[2] != self._said:
            self._said = body[2]
            names = [name for bit, name in enumerate(_FAULTS) if self._said >> bit & 1]
            log.warning("gripper %d says: %s", self._settings.id, ", ".join(names) or "well again")
        return body[3:]


def _checksum(body: bytes) -> bytes:
    return bytes([~sum(body) & 0xFF])
