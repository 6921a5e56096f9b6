"""An input device without a kernel's: evdev's own InputDevice on a pipe that carries the kernel's event structs.

What is evdev's here: reading, parsing and BlockingIOError. What the kernel answers by ioctl (capabilities, ranges, held
buttons) is given by the test.
"""

import errno
import os
import struct
import time
from types import SimpleNamespace

from evdev import AbsInfo, InputDevice, ecodes

_EVENT = struct.Struct("llHHi")  # struct input_event of a 64-bit Linux


class FakeDevice(InputDevice):
    """axes: name -> (least, most), REL_* -> None. buttons: names."""

    def __init__(self, name, axes, buttons, vendor=0x045E):
        self.fd, self._writer = os.pipe2(os.O_NONBLOCK)
        self.path, self.name, self.info = f"/dev/input/{name}", name, SimpleNamespace(vendor=vendor)
        self._axes = {ecodes.ecodes[axis]: span for axis, span in axes.items() if span}
        self._relative = [ecodes.ecodes[axis] for axis, span in axes.items() if not span]
        self._buttons = [ecodes.ecodes[button] for button in buttons]
        self._at, self._down, self._pulled = {}, set(), False

    def capabilities(self, verbose=False, absinfo=True):
        assert not absinfo
        return {ecodes.EV_ABS: list(self._axes), ecodes.EV_REL: self._relative, ecodes.EV_KEY: self._buttons}

    def absinfo(self, axis_num):
        least, most = self._axes[axis_num]
        return AbsInfo(self._at.get(axis_num, (least + most) // 2), least, most, 0, 0, 0)

    def active_keys(self, verbose=False):
        return sorted(self._down)

    def read(self):
        if self._pulled:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        yield from super().read()

    def close(self):
        if self.fd >= 0:
            os.close(self.fd)
            os.close(self._writer)
            self.fd = -1

    def move(self, axis, value, quietly=False):
        """A report of the device; `quietly`: the kernel kept no event of it."""
        kind, code = (ecodes.EV_ABS if axis.startswith("ABS") else ecodes.EV_REL), ecodes.ecodes[axis]
        self._at[code] = value
        if not quietly:
            self._write(kind, code, value)

    def press(self, button, down=True, quietly=False):
        code = ecodes.ecodes[button]
        (self._down.add if down else self._down.discard)(code)
        if not quietly:
            self._write(ecodes.EV_KEY, code, int(down))

    def drop(self):
        """The kernel's buffer ran over."""
        self._write(ecodes.EV_SYN, ecodes.SYN_DROPPED, 0)

    def pull(self):
        """The cable."""
        self._pulled = True

    def _write(self, kind, code, value):
        now = time.time()
        stamp = (int(now), int(now % 1 * 1e6))
        os.write(self._writer, _EVENT.pack(*stamp, kind, code, value))
        os.write(self._writer, _EVENT.pack(*stamp, ecodes.EV_SYN, ecodes.SYN_REPORT, 0))


def gamepad(name="Wireless Controller", without=()):
    """What an Xbox pad is to the kernel."""
    stick, hat = (-32768, 32767), (-1, 1)
    axes = {"ABS_X": stick, "ABS_Y": stick, "ABS_RX": stick, "ABS_RY": stick, "ABS_HAT0X": hat, "ABS_HAT0Y": hat}
    buttons = [
        "BTN_SOUTH", "BTN_EAST", "BTN_NORTH", "BTN_WEST", "BTN_TL", "BTN_TR", "BTN_SELECT", "BTN_START",
    ]  # fmt: skip
    return FakeDevice(name, axes, [button for button in buttons if button not in without])


def spacemouse(kind):
    """A SpaceMouse that reports relative or absolute axes: `REL` or `ABS`."""
    span = (-350, 350) if kind == "ABS" else None
    axes = {f"{kind}_{axis}": span for axis in ("X", "Y", "Z", "RX", "RY", "RZ")}
    return FakeDevice("3Dconnexion SpaceMouse Compact", axes, ["BTN_0", "BTN_1"], vendor=0x256F)
