"""An input device of the Linux kernel as a person's device: found, read, lost and found again. Used by gamepad and
spacemouse.

    /dev/input/event* ─▶ evdev (the `devices` extra) ─▶ deflection per axis, buttons pressed and held

evdev needs no display and no daemon, and reads both kinds of device; it needs the user to be of the group that may read
/dev/input (`input` on most systems).
"""

import glob
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from serl_config.nearest import nearest
from serl_robot_infra.interventions.base import OperatorGoneError
from serl_robot_infra.interventions.hand import MEANINGS, rescaled

if TYPE_CHECKING:
    from evdev import InputDevice

_LOOK_S = 1.0  # between two looks for a device that is not there
_RELATIVE_FULL = 350.0  # what a SpaceMouse reports at full deflection
_RELATIVE_HOLD_S = 0.1  # it reports a deflected axis every 8 to 16 ms, and says nothing of one that came back to 0


class EvdevDevice:
    """Answers `hand.HandDevice`.

    Args:
        what: of which kind, for people: `gamepad`.
        is_one: whether an open device is of that kind.
        axes: action name -> the kernel's names of the axis, the first that the device has, with a minus in front where
            deflecting it decreases the action.
        buttons: command -> the kernel's name of the button.
        deadband: share of full deflection that counts as none.
        name: a part of the wanted device's name; None: any.
        holds: is the takeover button held, rather than pressed to take over and pressed to let go?

    Raises ImportError without evdev, ValueError for a name that the kernel has not got.
    """

    def __init__(
        self,
        what: str,
        is_one: Callable[["InputDevice"], bool],
        axes: Mapping[str, Sequence[str]],
        buttons: Mapping[str, str],
        deadband: float,
        name: str | None,
        holds: bool,
    ) -> None:
        if isinstance(deadband, bool) or not isinstance(deadband, int | float) or not 0 <= deadband < 1:
            raise ValueError(f"operator.deadband: expected a number, 0 or more and below 1, got {deadband!r}")
        self._what, self._is_one, self._deadband, self._name, self._holds = what, is_one, deadband, name, holds
        self._codes = ecodes()
        self.commands, self._buttons = tuple(buttons), buttons
        self._commands = {self._code(button, f"buttons.{command}"): command for command, button in buttons.items()}
        self._wanted = {action: [_signed(axis) for axis in names] for action, names in axes.items()}
        for action, choices in self._wanted.items():
            for axis, _ in choices:
                self._code(axis, f"axes.{action}")
        self._device: InputDevice | None = None
        self._looked_at, self._reason = -_LOOK_S, ""
        self._forget()

    def motion(self) -> Mapping[str, float]:
        self._poll()
        return {
            action: rescaled(sign * self._deflection(*key), self._deadband)
            for action, (key, sign) in self._axes.items()
        }

    def pressed(self) -> Sequence[str]:
        self._poll()
        commands, self._pressed = self._pressed, []
        return commands

    def holds_takeover(self) -> bool:
        return self._holds and "takeover" in self._held

    def missing(self) -> str | None:
        if self._device is None and time.monotonic() - self._looked_at >= _LOOK_S:
            self._looked_at = time.monotonic()
            self._reason = self._find()
        return None if self._device is not None else self._reason

    def describe(self) -> Sequence[str]:
        moves = [f"{' or '.join(_text(choice) for choice in choices)}: {a}" for a, choices in self._wanted.items()]
        held = " (while it is held)" if self._holds else ""
        says = [
            f"{button}: {MEANINGS[command]}{held if command == 'takeover' else ''}"
            for command, button in self._buttons.items()
        ]
        return [*moves, *says]

    def close(self) -> None:
        if self._device is not None:
            self._device.close()
            self._device = None

    def _find(self) -> str:
        """Open the first that fits; why there is none, or ""."""
        seen, unreadable = [], 0
        for path in sorted(glob.glob("/dev/input/event*")):
            try:
                device = open_device(path)
            except OSError:
                unreadable += 1
                continue
            if self._device is None and self._is_one(device) and (self._name or "") in device.name:
                self._take_device(device)
            else:
                seen.append(device.name)
                device.close()
        if self._device is not None:
            return ""
        wanted = f" called {self._name!r}" if self._name else ""
        denied = f"; {unreadable} that this user may not read (group input)" if unreadable else ""
        return f"no {self._what}{wanted} in /dev/input: found {', '.join(seen) or 'nothing'}{denied}"

    def _take_device(self, device: "InputDevice") -> None:
        """ValueError where the device lacks an axis or a button that the yaml gives a meaning: it would be dead."""
        has = {kind: set(codes) for kind, codes in device.capabilities(absinfo=False).items()}
        kinds = {"ABS": self._codes.EV_ABS, "REL": self._codes.EV_REL}
        self._forget()
        for action, choices in self._wanted.items():
            for axis, sign in choices:
                key = (kinds[axis[:3]], self._codes.ecodes[axis])
                if key[1] in has.get(key[0], ()):
                    self._axes[action] = (key, sign)
                    break
            else:
                raise ValueError(
                    f"operator.axes.{action}: {device.name!r} has no {' or '.join(axis for axis, _ in choices)}"
                )
        for command, button in self._buttons.items():
            if self._codes.ecodes[button] not in has.get(self._codes.EV_KEY, ()):
                raise ValueError(f"operator.buttons.{command}: {device.name!r} has no {button}; name another, or null")
        self._device = device
        self._resync()

    def _forget(self) -> None:
        self._axes: dict[str, tuple[tuple[int, int], float]] = {}  # action -> (kind, code) and sign
        self._values: dict[tuple[int, int], tuple[float, float]] = {}  # (kind, code) -> value, unix seconds
        self._ranges: dict[int, tuple[float, float]] = {}  # of an absolute axis: centre, half its range
        self._pressed: list[str] = []
        self._held: set[str] = set()
        self._lost_events = False

    def _poll(self) -> None:
        if self._device is None:
            raise OperatorGoneError(self.missing() or f"the {self._what} came back: the next episode has it")
        name = self._device.name
        try:
            while True:
                for event in self._device.read():
                    self._take(event)
        except BlockingIOError:
            return
        except OSError as error:
            self.close()
            self._forget()
            raise OperatorGoneError(f"the {self._what} {name!r} is gone ({error.strerror}); looking for it") from None

    def _take(self, event: Any) -> None:
        codes = self._codes
        if event.type == codes.EV_SYN and event.code == codes.SYN_DROPPED:
            self._lost_events = True  # nobody read for a while: the kernel kept no more
        elif self._lost_events:
            if event.type == codes.EV_SYN and event.code == codes.SYN_REPORT:
                self._lost_events = False
                self._resync()
        elif event.type in (codes.EV_ABS, codes.EV_REL):
            self._values[event.type, event.code] = (event.value, event.timestamp())
        elif event.type == codes.EV_KEY and (command := self._commands.get(event.code)):
            if event.value == 1 and not (command == "takeover" and self._holds):
                self._pressed.append(command)
            (self._held.discard if event.value == 0 else self._held.add)(command)

    def _resync(self) -> None:
        """Ask the kernel where axes and buttons are now."""
        assert self._device is not None
        for (kind, code), _ in self._axes.values():
            if kind == self._codes.EV_ABS:
                info = self._device.absinfo(code)
                self._ranges[code] = ((info.min + info.max) / 2, (info.max - info.min) / 2)
                self._values[kind, code] = (info.value, time.time())
        self._held = {self._commands[code] for code in self._device.active_keys() if code in self._commands}

    def _deflection(self, kind: int, code: int) -> float:
        value, at = self._values.get((kind, code), (0.0, 0.0))
        if kind == self._codes.EV_REL:
            return value / _RELATIVE_FULL if time.time() - at < _RELATIVE_HOLD_S else 0.0
        centre, half = self._ranges[code]
        return (value - centre) / half

    def _code(self, name: str, key: str) -> int:
        known = self._codes.ecodes
        kinds = ("BTN_", "KEY_") if key.startswith("buttons") else ("ABS_", "REL_")
        if not isinstance(name, str) or name not in known or not name.startswith(kinds):
            choices = [known_name for known_name in known if known_name.startswith(kinds)]
            raise ValueError(
                f"operator.{key}: expected the kernel's name of {'a button' if 'BTN_' in kinds else 'an axis'}, such "
                f"as {'BTN_TR' if 'BTN_' in kinds else 'ABS_X'}, got {name!r}{nearest(str(name), choices)}"
            )
        return known[name]


def ecodes() -> Any:
    """evdev's table of the kernel's names; ImportError with what to install."""
    try:
        from evdev import ecodes
    except ImportError:
        raise ImportError(
            "operator=gamepad and operator=spacemouse need evdev: VIRTUAL_ENV=.venv .venv/bin/uv pip install evdev "
            "(builds with a C compiler and the kernel's headers)"
        ) from None
    return ecodes


def open_device(path: str) -> "InputDevice":
    """A device of the kernel, to read only; OSError when this user may not."""
    from evdev import InputDevice

    return InputDevice(path, readonly=True)


def _signed(axis: str) -> tuple[str, float]:
    text = str(axis)
    return (text[1:], -1.0) if text.startswith("-") else (text, 1.0)


def _text(choice: tuple[str, float]) -> str:
    return f"{'-' if choice[1] < 0 else ''}{choice[0]}"
