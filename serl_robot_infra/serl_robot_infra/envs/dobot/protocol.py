"""Dobot's TCP protocol as values: what the controller sends, and what it is sent. No socket here.

    port 29999  text, a question and its answer:  GetErrorID()  ─▶  0,{[[117],[],[],[],[],[],[]]},GetErrorID();
    port 30003  text, motion (V3 firmware; V4 takes it on 29999):  ServoJ(…)
    port 30004  1440 bytes every 8 ms, little-endian: `Feedback`

Called by arm.py and stopper.py. Degrees and millimetres end here: everywhere else it is radians and metres. Facts from
Dobot's public manuals and clients: "TCP/IP Remote Control Interface Guide" V4.5.1 (github.com/Dobot-Arm,
TCP-IP-Protocol-6AXis-V4), TCP-IP-CR-Python (V3), TCP-IP-Python-V4, DOBOT_6Axis_ROS2_V3 (joint limits), and the
X-Trainer's client (dobot_control), which wants V3 firmware from 3.5.8.1 on.
"""

import re
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PACKET_BYTES = 1440
TEST_VALUE = 0x0123456789ABCDEF
SHORTEST_S, LONGEST_S = 0.02, 3600.0
"""What ServoJ takes as the time of a point."""

MODES = {
    1: "starting up", 2: "brake released", 3: "powered off", 4: "disabled", 5: "enabled", 6: "dragged by hand",
    7: "running", 8: "running a single motion", 9: "alarm", 10: "paused", 11: "collision",
}  # fmt: skip
ABLE = (5, 7, 8)  # to move
ALARMED = (9, 11)

MODELS = {101: "nova2", 103: "nova5"}
JOINT_LIMITS = dict.fromkeys(MODELS.values(), (6.28, 3.14, 2.79, 6.28, 6.28, 6.28))
"""model -> |joint| at most, rad: the vendor's URDF. The protocol has no question for the limits set in a controller."""

_ALARMS = {
    -2: "collision", 16: "near a shoulder singularity", 17: "no inverse kinematics", 18: "out of reach",
    116: "emergency stop", 117: "collision",
}  # fmt: skip
_REFUSALS = {
    -1: "failed to execute", -2: "the arm has an alarm", -3: "the emergency stop is pressed", -4: "powered off",
    -5: "a script runs or is paused", -10000: "no such command", -20000: "wrong number of parameters",
}  # fmt: skip
_SCALE = np.array([1e3] * 3 + [180.0 / np.pi] * 3)
_MODE, _TEST, _PLANNED, _JOINTS, _POSE, _TOOL_INDEX, _ENABLED, _ERROR, _MODEL, _TOOL = (
    24, 48, 192, 432, 624, 1013, 1026, 1029, 1031, 1248,
)  # fmt: skip


class RefusedError(OSError):
    """The controller refused a command; `code` is its ErrorID."""

    def __init__(self, message: str, code: int | None = None):
        super().__init__(message)
        self.code = code


class AlarmError(OSError):
    """The controller has an alarm or cannot move; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Feedback:
    """One packet of port 30004."""

    at: float  # monotonic seconds, when it was read
    mode: int  # a key of MODES
    joints: np.ndarray  # float64[6], rad, measured
    planned: np.ndarray  # float64[6], rad, where the controller wants the joints now
    pose: np.ndarray  # float64[6], m and rad (Rx, Ry, Rz), of the tool in use, in the base's frame
    tool_index: int
    tool: np.ndarray  # float64[6], m and rad: the tool in use, from the flange
    enabled: bool
    alarmed: bool
    model: int  # a key of MODELS, or another arm's


def parse_packet(packet: bytes) -> Feedback:
    """ConnectionError: these 1440 bytes are no feedback."""
    (test,) = struct.unpack_from("<Q", packet, _TEST)
    if test != TEST_VALUE:
        raise ConnectionError(f"no feedback of a Dobot: expected the test value {TEST_VALUE:#018x}, got {test:#018x}")
    mode = int.from_bytes(packet[_MODE : _MODE + 8], "little")

    def six(offset: int) -> np.ndarray:
        return np.frombuffer(packet, "<f8", 6, offset)

    return Feedback(
        time.monotonic(), mode, np.radians(six(_JOINTS)), np.radians(six(_PLANNED)), six(_POSE) / _SCALE,
        packet[_TOOL_INDEX], six(_TOOL) / _SCALE, bool(packet[_ENABLED]), mode in ALARMED or bool(packet[_ERROR]),
        packet[_MODEL],
    )  # fmt: skip


def parse_reply(text: str) -> str:
    """What stands in the braces of `ErrorID,{…},Command();`. RefusedError when the ErrorID is not 0, or no reply."""
    found = re.match(r"\s*(-?\d+),\{(.*?)\},(.*?);", text, re.DOTALL)
    if found is None:
        hint = "; set it to TCP/IP mode in DobotStudio Pro" if "not tcp" in text.lower() else ""
        raise RefusedError(f"the controller says {text.strip()[:120]!r}{hint}")
    code, values, command = int(found[1]), found[2], found[3]
    if code:
        raise RefusedError(f"{command[:120]} refused: {code} ({_refusal(code)})", code)
    return values


def parse_alarms(values: str) -> str:
    """GetErrorID's answer for people: of the controller, then of each servo."""
    lists = [[int(number) for number in re.findall(r"-?\d+", part)] for part in re.findall(r"\[([^\[\]]*)\]", values)]
    said = [f"alarm {number} ({_ALARMS.get(number, 'see alarm_controller.json')})" for number in (lists or [[]])[0]]
    said += [
        f"servo {joint}: alarm {number} (see alarm_servo.json)"
        for joint, numbers in enumerate(lists[1:], 1)
        for number in numbers
    ]
    return ", ".join(said) or "no alarm by name"


def servo_joints(joints: np.ndarray, seconds: float, v4: bool) -> str:
    """ServoJ: float64[6], rad, to be reached in so many seconds."""
    return f"ServoJ({_numbers(np.degrees(joints))},{'t=' if v4 else ''}{seconds:.3f})"


def servo_tool(pose: np.ndarray, seconds: float, v4: bool) -> str:
    """ServoP: float64[6], m and rad. Of V3 firmware it takes no time."""
    return f"ServoP({_numbers(pose * _SCALE)}{f',t={seconds:.3f}' if v4 else ''})"


def set_tool(index: int, tool: Sequence[float]) -> str:
    """SetTool: six numbers, m and rad, from the flange."""
    return f"SetTool({index},{{{_numbers(np.asarray(tool) * _SCALE)}}})"


def _numbers(values: np.ndarray) -> str:
    return ",".join(f"{value:.4f}" for value in values)


def _refusal(code: int) -> str:
    kinds = {3: "wrong type of parameter", 4: "parameter out of its range", 5: "wrong type of optional parameter"}
    return _REFUSALS.get(code) or kinds.get(-code // 10000, "see the manual's error codes")
