"""One Dobot arm: its connections, the thread that reads its feedback, alarms, enabling, servo commands, stop.

    control loop ─▶ check ─▶ servo ─▶ motion port (V3: 30003; V4: the dashboard's)
    feedback thread ◀── port 30004, 8 ms ──▶ `feedback`: the newest packet, or TimeoutError when it is too old
    guard's thread ─▶ stop ─▶ dashboard, 29999

Called by part.py and env.py. Every method raises OSError when the arm does not answer, refuses or cannot move; `mend`
opens it anew.
"""

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from serl_robot_infra.envs.dobot import protocol
from serl_robot_infra.envs.dobot.channel import CONNECT_S, TURN_S, BusyError, Channel, stop_arm
from serl_robot_infra.envs.dobot.protocol import AlarmError, Feedback, RefusedError

log = logging.getLogger(__name__)

FIRST_PACKET_S = 1.0
CLEAR_S = 1.0
ENABLE_S = 20.0  # brakes, then servos
_POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class ArmSettings:
    """task.env.arms.<name> but for the gripper. ValueError names a key that is no good."""

    host: str
    model: str | None = None  # nova2 | nova5: compared with what the controller says; None: any arm
    tool: Sequence[float] = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)  # tip from the flange: m and rad
    dashboard_port: int = 29999
    motion_port: int = 30003  # of V3 firmware
    feedback_port: int = 30004

    def __post_init__(self) -> None:
        if not isinstance(self.host, str) or not self.host:
            raise ValueError(f"host: expected the controller's address, got {self.host!r}")
        if self.model is not None and self.model not in protocol.JOINT_LIMITS:
            raise ValueError(f"model: expected {' or '.join(protocol.JOINT_LIMITS)} or null, got {self.model!r}")
        if len(self.tool) != 6 or not np.isfinite(np.asarray(self.tool, float)).all():
            raise ValueError(f"tool: expected six numbers (m and rad, from the flange), got {list(self.tool)}")


class Arm:
    """Args: name: for people; v4: the firmware; tool_index: 1 to 9, the place in the controller that `tool` is put in;
    speed_factor: per cent, of every motion but ServoJ and ServoP; max_age_s: older feedback is a lost arm.
    """

    def __init__(self, name: str, settings: ArmSettings, v4: bool, speed_factor: int, max_age_s: float):
        self.name, self.settings, self._v4 = name, settings, v4
        self._speed_factor, self._max_age_s = speed_factor, max_age_s
        self._dashboard = Channel(settings.host, settings.dashboard_port)
        self._motion = self._dashboard if v4 else Channel(settings.host, settings.motion_port)
        self._reader: _Reader | None = None

    def open(self) -> None:
        """Connect; the arm does not move and is not enabled."""
        self.close()
        self._dashboard.open()
        if not self._v4:
            self._motion.open()
        self._reader = _Reader(self.settings.host, self.settings.feedback_port)
        deadline = time.monotonic() + FIRST_PACKET_S
        while self._reader.newest is None and self._reader.fault is None and time.monotonic() < deadline:
            time.sleep(0.004)
        self.feedback()
        self._dashboard.ask("RobotMode()")  # an occupied port and a controller that is not in TCP mode say so here

    def mend(self) -> None:
        """Open it anew unless it answers and its feedback is fresh."""
        try:
            self.feedback()
            self._motion.hear()
            self._dashboard.ask("RobotMode()")
        except OSError as fault:
            log.warning("%s arm: opened anew (%s)", self.name, fault)
            self.open()

    def feedback(self) -> Feedback:
        """The newest packet. TimeoutError: it is too old; ConnectionError: why none comes any more."""
        reader = self._reader
        newest = None if reader is None else reader.newest
        if reader is None or (newest is None and reader.fault is None):
            raise TimeoutError(f"{self._feedback_at()}: no feedback")
        if reader.fault is not None:
            raise ConnectionError(f"{self._feedback_at()}: {reader.fault}")
        assert newest is not None
        if (age := time.monotonic() - newest.at) > self._max_age_s:
            raise TimeoutError(f"{self._feedback_at()}: the newest feedback is {age * 1e3:.0f} ms old")
        return newest

    def check(self) -> Feedback:
        """The newest packet of an arm that can move; AlarmError says why it cannot."""
        seen = self.feedback()
        if seen.alarmed:
            raise AlarmError(f"the controller has {self._alarms()}")
        if seen.mode not in protocol.ABLE or not seen.enabled:
            raise AlarmError(f"it is {protocol.MODES.get(seen.mode, f'in mode {seen.mode}')}, not enabled")
        return seen

    def prepare(self, cancelled: Callable[[], bool]) -> None:
        """Tell and clear an alarm, enable, set speed and tool. Gives up at once when cancelled.

        AlarmError: the alarm stays, or the arm is in a state that a person must end.
        """
        seen = self.feedback()
        if seen.alarmed:
            log.warning("%s arm: %s; clearing it", self.name, self._alarms())
            self._dashboard.ask("ClearError()")
            self._wait(lambda now: not now.alarmed, cancelled, CLEAR_S)
            if self.feedback().alarmed and not cancelled():
                raise AlarmError(f"cannot be cleared: {self._alarms()}; end its cause (is the e-stop still pressed?)")
        seen = self.feedback()
        if not (seen.enabled and seen.mode in protocol.ABLE) and not cancelled():
            if seen.mode not in (2, 4, *protocol.ABLE):
                raise AlarmError(f"it is {protocol.MODES.get(seen.mode, f'in mode {seen.mode}')}: end that first")
            log.warning("%s arm: enabling", self.name)
            self._dashboard.ask("EnableRobot()", ENABLE_S)
            self._wait(lambda now: now.enabled and now.mode in protocol.ABLE, cancelled, ENABLE_S)
        if not cancelled():
            self.check()
            self._dashboard.ask(f"SpeedFactor({self._speed_factor})")

    def use_tool(self, index: int) -> None:
        """Put `settings.tool` in that place of the controller and use it. ValueError: its feedback says otherwise."""
        wanted = np.asarray(self.settings.tool, float)
        self._dashboard.ask(protocol.set_tool(index, wanted))
        self._dashboard.ask(f"Tool({index})")

        def taken(now: Feedback) -> bool:
            return now.tool_index == index and bool(np.abs(now.tool - wanted).max() < 1e-3)

        self._wait(taken, lambda: False, 1.0)
        seen = self.feedback()
        if not taken(seen):
            raise ValueError(
                f"task.env.arms.{self.name}.tool: expected {wanted.tolist()} as tool {index}, the controller uses "
                f"{np.round(seen.tool, 4).tolist()} as tool {seen.tool_index}"
            )

    def servo(self, command: str) -> None:
        """Send a ServoJ or ServoP."""
        if self._v4:
            self._motion.ask(command)
        else:
            self._motion.tell(command)

    def turn(self) -> contextlib.AbstractContextManager[None]:
        """Nobody else moves the arm meanwhile."""
        return self._motion.turn()

    def stop(self) -> None:
        """A controlled stop; a connection that was lost is opened for it."""
        try:
            stop_arm(self._dashboard, self._v4)
        except (RefusedError, BusyError):
            raise
        except OSError:
            self._dashboard.open(TURN_S)
            stop_arm(self._dashboard, self._v4)

    def close(self) -> None:
        """Let go of the connections; the arm stays as it is."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        self._motion.close()
        self._dashboard.close()

    def _wait(self, there: Callable[[Feedback], bool], cancelled: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not there(self.feedback()) and not cancelled() and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def _alarms(self) -> str:
        try:
            return protocol.parse_alarms(self._dashboard.ask("GetErrorID()"))
        except OSError as fault:
            return f"an alarm; asking which: {fault}"

    def _feedback_at(self) -> str:
        return f"{self.settings.host}:{self.settings.feedback_port}"


class _Reader:
    """The feedback thread: keeps the newest packet. `fault` says why it ended."""

    def __init__(self, host: str, port: int):
        self.newest: Feedback | None = None
        self.fault: str | None = None
        try:
            self._socket = socket.create_connection((host, port), CONNECT_S)
        except OSError as fault:
            raise ConnectionError(f"{host}:{port}: {fault}") from fault
        self._socket.settimeout(None)
        self._thread = threading.Thread(target=self._run, name="dobot-feedback", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        with contextlib.suppress(OSError):  # the other side was first
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(1.0)
        self._socket.close()

    def _run(self) -> None:
        unread = b""
        try:
            while some := self._socket.recv(65536):
                unread += some
                whole = len(unread) // protocol.PACKET_BYTES * protocol.PACKET_BYTES
                if whole:  # older ones than the last of them are of no use
                    self.newest = protocol.parse_packet(unread[whole - protocol.PACKET_BYTES : whole])
                    unread = unread[whole:]
            self.fault = "the controller closed the connection"
        except OSError as fault:
            self.fault = str(fault)
