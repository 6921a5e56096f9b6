"""Which key, button and stick of a page means what: config/operator/browser.yaml as a table. Used by operator=browser.

Keys are named as the terminal's (keyboard.py). A gamepad is named as browsers number one of the standard layout:
sticks LX, LY, RX, RY, the cross HX, HY, buttons south, east, west, north, LB, RB, LT, RT, select, start, LS, RS.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from serl_config.nearest import nearest
from serl_robot_infra.interventions.hand import MEANINGS, rescaled
from serl_robot_infra.keyboard import NAMES, character_of

STICKS = ("LX", "LY", "RX", "RY", "HX", "HY")
BUTTONS = ("south", "east", "west", "north", "LB", "RB", "LT", "RT", "select", "start", "LS", "RS")
RESERVED = ("esc", "tab")  # the page's own: let go, go to the next element


class PageKeys:
    """The table, checked. ValueError names the key of the yaml that cannot be meant.

    axes: action -> [key that increases it, key that decreases it]. keys: command -> key. pad_axes: action -> stick,
    with a minus where deflecting it decreases the action. pad_buttons: command -> button; the one of takeover is a dead
    man's switch: sticks move only while it is held. deadband: share of a stick's way that counts as none.
    """

    def __init__(
        self,
        axes: Mapping[str, Sequence[str]],
        keys: Mapping[str, object],
        pad_axes: Mapping[str, str],
        pad_buttons: Mapping[str, object],
        deadband: float,
    ) -> None:
        if isinstance(deadband, bool) or not isinstance(deadband, int | float) or not 0 <= deadband < 1:
            raise ValueError(f"operator.deadband: expected a number, 0 or more and below 1, got {deadband!r}")
        self._deadband = deadband
        self._axes = {name: _pair(pair, f"operator.axes.{name}") for name, pair in axes.items()}
        typed = {command: _key(key, f"operator.keys.{command}") for command, key in keys.items()}
        self._sticks = {name: _stick(axis, f"operator.pad_axes.{name}") for name, axis in pad_axes.items()}
        for command, button in pad_buttons.items():
            if button not in BUTTONS:
                raise ValueError(
                    f"operator.pad_buttons.{command}: expected one of {', '.join(BUTTONS)}, "
                    f"got {button!r}{nearest(str(button), BUTTONS)}"
                )
        for key, times in Counter([*typed.values(), *(key for pair in self._axes.values() for key in pair)]).items():
            if times > 1:
                raise ValueError(f"operator.keys, operator.axes: expected different keys, got {key!r} {times} times")
        self._buttons = {str(button): command for command, button in pad_buttons.items()}
        self.commands = {key: command for command, key in typed.items()} | self._buttons
        self._takeover = next((button for button, command in self._buttons.items() if command == "takeover"), None)
        self.commands.pop(self._takeover, None)  # held, not pressed

    def motion(self, held: frozenset[str], axes: Mapping[str, float]) -> dict[str, float]:
        """Deflection per action name in [-1, 1]."""
        moved = {name: float(up in held) - float(down in held) for name, (up, down) in self._axes.items()}
        for name, (axis, sign) in self._sticks.items():
            by_stick = rescaled(sign * axes.get(axis, 0.0), self._deadband) if self.takes_over(held) else 0.0
            moved[name] = max(-1.0, min(1.0, moved.get(name, 0.0) + by_stick))
        return moved

    def takes_over(self, held: frozenset[str]) -> bool:
        """Is the gamepad's dead man's switch held?"""
        return self._takeover in held

    def describe(self) -> list[str]:
        """A line for each key, button and stick."""
        typed = {command: key for key, command in self.commands.items() if key not in self._buttons}
        lines = [f"{up} / {down}: {name} + / -" for name, (up, down) in self._axes.items()]
        lines += [f"{key}: {MEANINGS[command]}" for command, key in typed.items()]
        lines += [f"pad {'-' if sign < 0 else ''}{axis}: {name}" for name, (axis, sign) in self._sticks.items()]
        held = " (drives while it is held)"
        return lines + [
            f"pad {button}: {MEANINGS[command]}{held if button == self._takeover else ''}"
            for button, command in self._buttons.items()
        ]


def _pair(pair: object, where: str) -> tuple[str, str]:
    if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
        raise ValueError(f"{where}: expected [key that increases it, key that decreases it], got {pair!r}")
    up, down = (_key(key, f"{where}.{place}") for place, key in enumerate(pair))
    return up, down


def _key(key: object, where: str) -> str:
    """As the page names it: space and the like, or a character in lower case."""
    name = str(key)
    character_of(name, where)
    if name in RESERVED:
        raise ValueError(f"{where}: {name} is the page's own (it lets go, or goes to the next element); name another")
    return name if name in NAMES else name.lower()


def _stick(axis: object, where: str) -> tuple[str, float]:
    text = str(axis)
    name, sign = (text[1:], -1.0) if text.startswith("-") else (text, 1.0)
    if name not in STICKS:
        raise ValueError(f"{where}: expected one of {', '.join(STICKS)}, or one with a minus, got {axis!r}")
    return name, sign
