"""A serial port of a few servos, by the kernel's own interface: no package is needed.

Called by envs/dobot/gripper.py and interventions/dobot_leader_arm.py. Bytes flow out and in; what they mean is the
caller's. One thread at a time. Every fault is an OSError that names the port.
"""

import fcntl
import os
import select
import termios
import time
import tty


class SerialLine:
    """Raw, eight bits, no parity, for this process alone. ConnectionError: no such port, or another process has it."""

    def __init__(self, port: str, baud: int = 1_000_000):
        self.port = port
        try:
            rate = getattr(termios, f"B{baud}")
        except AttributeError:
            raise ValueError(f"{port}: the kernel has no baud rate {baud}") from None
        try:
            self._fd = os.open(port, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as fault:
            raise ConnectionError(f"{port}: {fault.strerror}") from fault
        try:
            fcntl.ioctl(self._fd, termios.TIOCEXCL)
            tty.setraw(self._fd)
            settings = termios.tcgetattr(self._fd)
            settings[2] |= termios.CREAD | termios.CLOCAL
            settings[4] = settings[5] = rate
            termios.tcsetattr(self._fd, termios.TCSANOW, settings)
            termios.tcflush(self._fd, termios.TCIOFLUSH)
        except (OSError, termios.error) as fault:
            os.close(self._fd)
            raise ConnectionError(f"{port}: {fault}") from fault

    def write(self, data: bytes) -> None:
        """Send; what came unasked before is dropped."""
        self._drop()
        try:
            sent = os.write(self._fd, data)
        except OSError as fault:
            raise ConnectionError(f"{self.port}: {fault.strerror}") from fault
        if sent != len(data):
            raise ConnectionError(f"{self.port}: {sent} of {len(data)} bytes could be sent")

    def read(self, size: int, seconds: float) -> bytes:
        """`size` bytes. TimeoutError: fewer came in time."""
        data, deadline = b"", time.monotonic() + seconds
        while len(data) < size:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._fd], [], [], left)[0]:
                raise TimeoutError(f"{self.port}: no answer ({len(data)} of {size} bytes in {seconds * 1e3:.0f} ms)")
            try:
                some = os.read(self._fd, size - len(data))
            except BlockingIOError:
                continue
            except OSError as fault:
                raise ConnectionError(f"{self.port}: {fault.strerror}") from fault
            if not some:
                raise ConnectionError(f"{self.port}: it is gone")
            data += some
        return data

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _drop(self) -> None:
        try:
            termios.tcflush(self._fd, termios.TCIFLUSH)
        except termios.error as fault:
            raise ConnectionError(f"{self.port}: {fault}") from fault
