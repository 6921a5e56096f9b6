"""One leader arm of the X-Trainer: a thread that reads its servos and buttons, and locks or frees it.

Made by dobot_leader.py. A line that is lost is opened anew by the thread; until then `missing` says why.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from serl_robot_infra.dynamixel import Servos
from serl_robot_infra.serial_line import SerialLine

log = logging.getLogger(__name__)

LONG_S = 0.8
_PERIOD_S, _AGAIN_S = 0.01, 0.5
_UNHEARD = 10
_ASK_BUTTONS = b"\xaa\x55\xaa"


@dataclass(frozen=True, slots=True)
class LeaderSettings:
    """task.operator.arms.<name>: of dobot_settings.ini. ValueError names a key that is no good."""

    port: str
    ids: Sequence[int]  # of joints 1 to 6
    second_id: int  # the other servo of the second joint
    gripper_id: int
    offsets: Sequence[float]  # rad, what each servo reads when its joint is at 0
    signs: Sequence[int]  # 1 or -1
    gripper_closed: float  # degrees of its servo
    gripper_open: float

    def __post_init__(self) -> None:
        for name in ("ids", "offsets", "signs"):
            if not isinstance(getattr(self, name), Sequence) or len(getattr(self, name)) != 6:
                raise ValueError(f"{name}: expected six values, got {getattr(self, name)!r}")
        if not set(self.signs) <= {1, -1}:
            raise ValueError(f"signs: expected 1 or -1 of each, got {list(self.signs)}")
        every = [*self.ids, self.second_id, self.gripper_id]
        if len(set(every)) != 8 or not all(type(number) is int and 0 <= number <= 252 for number in every):
            raise ValueError(f"ids, second_id, gripper_id: expected eight different numbers from 0 to 252, got {every}")
        if not np.isfinite(np.asarray(self.offsets, float)).all() or self.gripper_closed == self.gripper_open:
            raise ValueError("offsets: expected six numbers in rad; gripper_closed and gripper_open must differ")


class LeaderArm:
    """Locked where it stands until `free` is set.

    on_press: called in its thread with a, b, a_long or b_long for each press that ended.
    """

    def __init__(self, settings: LeaderSettings, on_press: Callable[[str], None]):
        self._settings, self._on_press, self.port = settings, on_press, settings.port
        self.free = False  # wanted; any thread
        self._is_free: bool | None = None
        self._newest: tuple[float, np.ndarray, float] | None = None  # when, float64[6] rad, gripper 0 to 1
        self._fault = "not open yet"
        self._since: dict[str, float | None] = {"a": None, "b": None}  # when it was pressed
        self._unheard = 0  # answers of the buttons in a row
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="dobot-leader", daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def missing(self, max_age_s: float) -> str | None:
        """Why it cannot be used now."""
        newest = self._newest
        if newest is not None and time.monotonic() - newest[0] <= max_age_s:
            return None
        return self._fault or f"{self._settings.port}: no answer for {max_age_s * 1e3:g} ms"

    def sensed(self) -> tuple[np.ndarray, float]:
        """(float64[6] rad, gripper 0 closed to 1 open), the newest."""
        assert self._newest is not None
        return self._newest[1], self._newest[2]

    def close(self) -> None:
        """Locks it, then ends the thread."""
        self._ending = True
        if self._thread.ident is not None:
            self._thread.join(2.0)

    def _run(self) -> None:
        while not self._ending:
            try:
                self._read_on()
            except OSError as fault:
                if self._newest is not None and not self._fault:
                    log.warning("leader: %s", fault)
                self._fault = str(fault)
                time.sleep(_AGAIN_S)

    def _read_on(self) -> None:
        """Until it is to end; OSError: the line is lost."""
        settings = self._settings
        line = SerialLine(settings.port)
        try:
            servos = Servos(line, [*settings.ids, settings.second_id, settings.gripper_id])
            self._is_free, self._unheard = None, 0
            self._since = dict.fromkeys(self._since)
            while not self._ending:
                self._hold_or_free(servos, self.free)
                self._newest = (time.monotonic(), *self._posture(servos.positions()))
                self._hear(line)
                self._fault = ""
                time.sleep(_PERIOD_S)
            self._hold_or_free(servos, False)
        finally:
            line.close()

    def _hold_or_free(self, servos: Servos, free: bool) -> None:
        if free != self._is_free:
            (servos.release if free else servos.lock)()
            self._is_free = free

    def _posture(self, read: dict[int, float]) -> tuple[np.ndarray, float]:
        settings = self._settings
        raw = np.array([read[number] for number in settings.ids])
        closed, open_ = np.radians([settings.gripper_closed, settings.gripper_open])
        grip = (read[settings.gripper_id] - closed) / (open_ - closed)
        return (raw - np.asarray(settings.offsets)) * np.asarray(settings.signs), float(np.clip(grip, 0.0, 1.0))

    def _hear(self, line: SerialLine) -> None:
        """The buttons. A disturbed or missing answer is asked for again in a moment, a few times."""
        line.write(_ASK_BUTTONS)
        try:
            said, complement = line.read(2, 0.05)
        except TimeoutError:
            said = complement = 0
        if said ^ complement != 0xFF:
            self._unheard += 1
            if self._unheard > _UNHEARD:
                raise TimeoutError(f"{self._settings.port}: the board with the buttons does not answer")
            return
        self._unheard = 0
        for button, nibble in (("a", said >> 4), ("b", said & 0xF)):
            since, now = self._since[button], time.monotonic()
            if nibble == 0 and since is None:
                self._since[button] = now
            elif nibble != 0 and since is not None:
                self._since[button] = None
                self._on_press(f"{button}_long" if now - since >= LONG_S else button)
