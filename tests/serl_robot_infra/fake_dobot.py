"""A Dobot controller on real TCP sockets: dashboard, motion and feedback ports, a servo that moves, alarms, drop-outs.

Replies, error codes, modes and the 1440 bytes are those of Dobot's manuals (TCP/IP Remote Control Interface Guide) and
clients; the arm is a Nova 2 with the lengths of the X-Trainer's own forward kinematics. One instance is one arm.
"""

import contextlib
import re
import select
import socket
import struct
import threading
import time

import numpy as np

TICK_S = 0.008
LIMITS = np.array([360.0, 180.0, 160.0, 360.0, 360.0, 360.0])  # degrees
FASTEST = 135.0  # degrees per second, each joint
LAG_S = 0.02  # of the measured joints behind the planned ones
HOME = {"left": [-90, 0, -90, 0, 90, 90], "right": [90, 0, 90, 0, -90, -90]}
LINKS = [  # theta offset, d, a, alpha
    (0.0, 223.4, 0.0, np.pi / 2), (-np.pi / 2, 0.0, -280.0, 0.0), (0.0, 0.0, -225.0, 0.0),
    (-np.pi / 2, 117.5, 0.0, np.pi / 2), (0.0, 120.0, 0.0, -np.pi / 2), (0.0, 88.0, 0.0, 0.0),
]  # fmt: skip
OCCUPIED = b"Connection refused, IP:Port has been occupied\t"


def forward(joints: np.ndarray, tool: np.ndarray) -> np.ndarray:
    """float64[6] degrees -> float64[4, 4], mm, of the tool in the base."""
    pose = np.eye(4)
    for (offset, d, a, alpha), angle in zip(LINKS, np.radians(joints), strict=True):
        (st, ct), (sa, ca) = (np.sin(angle + offset), np.cos(angle + offset)), (np.sin(alpha), np.cos(alpha))
        pose = pose @ [[ct, -st * ca, st * sa, a * ct], [st, ct * ca, -ct * sa, a * st], [0, sa, ca, d], [0, 0, 0, 1]]
    pose[:3, 3] += pose[:3, :3] @ tool[:3]
    return pose


def as_six(pose: np.ndarray) -> np.ndarray:
    """x, y, z, Rx, Ry, Rz: mm and degrees."""
    r = pose[:3, :3]
    angles = [
        np.arctan2(r[2, 1], r[2, 2]),
        np.arctan2(-r[2, 0], np.hypot(r[0, 0], r[1, 0])),
        np.arctan2(r[1, 0], r[0, 0]),
    ]
    return np.concatenate([pose[:3, 3], np.degrees(angles)])


def as_matrix(six: np.ndarray) -> np.ndarray:
    """The other way round."""
    (sx, sy, sz), (cx, cy, cz) = np.sin(np.radians(six[3:])), np.cos(np.radians(six[3:]))
    turn_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    turn_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    turn_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = turn_z @ turn_y @ turn_x, six[:3]
    return pose


def inverse(goal: np.ndarray, joints: np.ndarray, tool: np.ndarray) -> np.ndarray | None:
    """Joints near `joints`, degrees; None: there are none. Damped least squares."""
    at = joints.copy()
    for _ in range(12):
        error = _error(goal, forward(at, tool))
        if np.abs(error).max() < 1e-4:
            return at
        step = 0.01
        columns = [
            (_error(goal, forward(at + step * np.eye(6)[j], tool)) - error) / -step for j in range(6)
        ]  # fmt: skip
        jacobian = np.stack(columns, 1)
        at = at + jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + 1e-6 * np.eye(6), error)
    return at if np.abs(_error(goal, forward(at, tool))).max() < 1e-2 else None


def _error(goal: np.ndarray, at: np.ndarray) -> np.ndarray:
    """mm / 100 and radians."""
    r = goal[:3, :3] @ at[:3, :3].T
    turn = np.array([r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1]]) / 2
    return np.concatenate([(goal[:3, 3] - at[:3, 3]) / 100.0, turn])


class FakeDobot:
    """Context manager. joints: degrees, where it stands. v4: the firmware, whose dashboard takes one client."""

    def __init__(self, joints, v4: bool = False, ports: tuple[int, int, int] = (0, 0, 0), model: int = 101):
        self.v4, self.model = v4, model
        self.planned = self.joints = np.array(joints, float)
        self.tool, self.tool_index = np.zeros(6), 0
        self.enabled, self.dragged, self.tcp_mode, self.estop = False, False, True, False
        self.alarms: list[int] = []
        self.silent = False  # the cable is out: nothing is answered, nothing is sent
        self.blocked = False  # something keeps the arm: it does not follow
        self.slow_s = 0.0  # before each answer
        self.commands: list[tuple[float, str]] = []  # (monotonic seconds, what came), but for questions
        self.goals: list[np.ndarray] = []  # joints, degrees, that the motors were told
        self.poses: list[np.ndarray] = []  # of ServoP
        self.fastest = np.zeros(6)  # degrees per second, planned
        self._goal, self._speed = self.planned.copy(), np.zeros(6)
        self._ports, self._listeners, self._clients = ports, [], {}
        self._lock = threading.RLock()

    def __enter__(self) -> "FakeDobot":
        self._running = True
        self.plug()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._serve, self._live)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._running = False
        for thread in self._threads:
            thread.join(5)
        self.unplug()

    @property
    def node(self) -> dict:
        """Its keys of task.env.arms."""
        dashboard, motion, feedback = self._ports
        return {"host": "127.0.0.1", "dashboard_port": dashboard, "motion_port": motion, "feedback_port": feedback}

    def plug(self) -> None:
        """Power is on: it listens; disabled, without tool."""
        with self._lock:
            self.enabled, self.tool_index, self.silent = False, 0, False
            self._listeners = [socket.create_server(("127.0.0.1", port)) for port in self._ports]
            self._ports = tuple(listener.getsockname()[1] for listener in self._listeners)

    def unplug(self) -> None:
        """Power is off: every connection ends."""
        with self._lock:
            for one in [*self._listeners, *self._clients]:
                one.close()
            self._listeners, self._clients = [], {}

    def alarm(self, number: int) -> None:
        """The arm stops with an alarm, as after a collision (117), and is disabled."""
        with self._lock:
            self.alarms = sorted({*self.alarms, number})
            self.enabled = False
            self._goal = self.planned.copy()

    def said(self, command: str) -> list[float]:
        """When that command came."""
        return [at for at, text in self.commands if text.startswith(command)]

    @property
    def mode(self) -> int:
        if self.alarms:
            return 9
        if not self.enabled:
            return 4
        return 6 if self.dragged else 7 if np.abs(self._goal - self.planned).max() > 1e-6 else 5

    def _live(self) -> None:
        """Move and tell, every 8 ms."""
        next_, before = time.monotonic(), time.monotonic()
        while self._running:
            now = time.monotonic()
            with self._lock:
                self._move(now - before)
                packet = self._packet()
                listeners = {client for client, kind in self._clients.items() if kind == 2 and not self.silent}
            for client in listeners:
                with contextlib.suppress(OSError):
                    client.send(packet, socket.MSG_DONTWAIT)
            before, next_ = now, next_ + TICK_S
            time.sleep(max(0.0, next_ - time.monotonic()))

    def _move(self, seconds: float) -> None:
        if self.enabled and not self.alarms:
            step = np.clip(self._goal - self.planned, -self._speed * seconds, self._speed * seconds)
            self.planned = self.planned + step
            self.fastest = np.maximum(self.fastest, np.abs(step) / max(seconds, 1e-9))
        if not self.blocked:
            self.joints = self.joints + (self.planned - self.joints) * min(1.0, seconds / LAG_S)

    def _packet(self) -> bytes:
        packet = bytearray(1440)
        struct.pack_into("<H", packet, 0, 1440)
        struct.pack_into("<Q", packet, 24, self.mode)
        struct.pack_into("<Q", packet, 48, 0x0123456789ABCDEF)
        struct.pack_into("<6d", packet, 192, *self.planned)
        struct.pack_into("<6d", packet, 432, *self.joints)
        struct.pack_into("<6d", packet, 624, *as_six(forward(self.joints, self.tool)))
        packet[1013], packet[1026], packet[1029], packet[1031] = (
            self.tool_index, self.enabled, bool(self.alarms), self.model,
        )  # fmt: skip
        struct.pack_into("<6d", packet, 1248, *self.tool)
        return bytes(packet)

    def _serve(self) -> None:
        while self._running:
            with self._lock:
                sockets = [one for one in (*self._listeners, *self._clients) if one.fileno() >= 0]
            for ready in select.select(sockets, [], [], 0.02)[0]:
                with contextlib.suppress(OSError, ValueError):
                    self._accept(ready) if ready in self._listeners else self._hear(ready)

    def _accept(self, listener: socket.socket) -> None:
        client, _ = listener.accept()
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        kind = self._listeners.index(listener)
        with self._lock:
            self._clients[client] = kind if not (kind == 0 and self.v4 and 0 in self._clients.values()) else 3

    def _hear(self, client: socket.socket) -> None:
        text = b""
        with contextlib.suppress(ConnectionError):
            text = client.recv(4096)
        if not text:
            with self._lock:
                self._clients.pop(client, None)
            client.close()
            return
        if self.silent or self._clients.get(client) == 2:
            return
        for command in re.findall(r"[^()\s]+\([^()]*\)", text.decode()):
            self._answer(client, command)

    def _answer(self, client: socket.socket, command: str) -> None:
        kind = self._clients[client]
        if self.slow_s:
            time.sleep(self.slow_s)
        if kind == 3:
            client.send(OCCUPIED)
            return
        if not self.tcp_mode:
            client.send(b"Control Mode Is Not Tcp\t")
            return
        with self._lock:
            code, values = self._do(command, kind)
        silent = kind == 1 and command.startswith("Servo")  # V3 does not answer motion
        if not silent:
            client.send(f"{code},{{{values}}},{command};".encode())

    def _do(self, command: str, kind: int) -> tuple[int, str]:
        name, _, rest = command.rstrip(")").partition("(")
        numbers = [float(number) for number in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", re.sub(r"[a-z_]+=", "", rest))]
        if name == "RobotMode":
            return 0, str(self.mode)
        if name == "GetErrorID":
            return 0, f"[[{','.join(map(str, self.alarms))}],[],[],[],[],[],[]]"
        self.commands.append((time.monotonic(), command))
        motion = name in ("ServoJ", "ServoP")
        if motion != (kind == 1) and not (motion and self.v4):
            return -10000, ""
        if name == "ClearError":
            self.alarms = [116] if self.estop else []
            return 0, ""
        if self.v4 and self.alarms:
            return (-3 if self.estop else -2), ""
        return getattr(self, f"_do_{name}", lambda numbers: (-10000, ""))(numbers)

    def _do_EnableRobot(self, numbers):  # noqa: N802
        if self.alarms:
            return -1, ""
        self.enabled = True
        self._goal = self.planned.copy()
        return 0, ""

    def _do_SpeedFactor(self, numbers):  # noqa: N802
        return (0, "") if 1 <= numbers[0] <= 100 else (-40001, "")

    def _do_SetTool(self, numbers):  # noqa: N802
        if len(numbers) != 7:
            return -20000, ""
        self._tools = {int(numbers[0]): np.array(numbers[1:])}
        return 0, ""

    def _do_Tool(self, numbers):  # noqa: N802
        self.tool_index, self.tool = int(numbers[0]), self._tools[int(numbers[0])]
        return 0, ""

    def _do_ResetRobot(self, numbers):  # noqa: N802
        self._goal = self.planned.copy()
        return (-10000, "") if self.v4 else (0, "")

    def _do_Stop(self, numbers):  # noqa: N802
        self._goal = self.planned.copy()
        return (0, "") if self.v4 else (-10000, "")

    def _do_ServoJ(self, numbers):  # noqa: N802
        if len(numbers) != 7 or not 0.02 <= numbers[6] <= 3600:
            return -40001, ""
        return self._follow(np.array(numbers[:6]), numbers[6])

    def _do_ServoP(self, numbers):  # noqa: N802
        if len(numbers) != (7 if self.v4 else 6):
            return -20000, ""
        self.poses.append(np.array(numbers[:6]))
        goal = inverse(as_matrix(self.poses[-1]), self._goal, self.tool)
        if goal is None:
            self.alarm(17)
            return -1, ""
        return self._follow(goal, numbers[6] if self.v4 else 0.05)

    def _follow(self, goal: np.ndarray, seconds: float):
        if not self.enabled or self.alarms:
            return -1, ""
        self.goals.append(goal)
        if (np.abs(goal) > LIMITS).any():
            self.alarm(18)
            return -1, ""
        self._goal = goal
        self._speed = np.minimum(np.abs(goal - self.planned) / seconds, FASTEST)
        return 0, "1"
