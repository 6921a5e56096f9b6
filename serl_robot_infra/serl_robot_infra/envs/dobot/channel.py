"""One text connection to a Dobot controller: a command, and its answer. Used by arm.py and stopper.py.

Two threads may share it, one at a time: the control loop and the guard, which must not be kept waiting.
"""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Mapping

from serl_robot_infra.envs.dobot.protocol import RefusedError, parse_reply

CONNECT_S = 1.0
ANSWER_S = 0.5  # a dashboard answers within milliseconds
TURN_S = 0.2
"""A thread waits so long for the other's command, then fails and is tried again."""


class BusyError(TimeoutError):
    """Another thread waits for an answer on this connection, which is well."""


class Channel:
    """Opened by `open`. Every method raises OSError; one that failed half-way needs `open` again.

    After an answer that did not come in time the connection is closed: the late one would be taken for the next's.
    """

    def __init__(self, host: str, port: int):
        self.address = (host, port)
        self.at = f"{host}:{port}"
        self._lock = threading.RLock()
        self._socket: socket.socket | None = None

    def open(self, seconds: float = CONNECT_S) -> None:
        """Connect anew. ConnectionError says where."""
        with self.turn():
            self.close()
            try:
                self._socket = socket.create_connection(self.address, seconds)
            except OSError as fault:
                raise ConnectionError(f"{self.at}: {fault}") from fault
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Nobody else sends meanwhile."""
        if not self._lock.acquire(timeout=TURN_S):
            raise BusyError(f"{self.at}: another command has not been answered for {TURN_S:g} s")
        try:
            yield
        finally:
            self._lock.release()

    def ask(self, command: str, seconds: float = ANSWER_S) -> str:
        """What stands in the braces of the answer. RefusedError: the controller refused it."""
        with self.turn():
            self._send(command)
            text = b""
            while b";" not in text:
                if text and not (text.lstrip()[:1].isdigit() or text.lstrip()[:1] == b"-"):
                    break  # plain words without an end: port occupied, not in TCP mode
                text += self._read(seconds, command)
        return parse_reply(text.decode("ascii", "replace"))

    def tell(self, command: str) -> None:
        """Send what is not answered (motion of V3 firmware). RefusedError for a refusal of what was sent before."""
        with self.turn():
            self._send(command)
            self.hear()

    def hear(self) -> None:
        """Look at what came unasked, without waiting. RefusedError for a refusal, ConnectionError when it is closed."""
        with self.turn():
            for text in self._read_now().split(";"):
                if text.lstrip().startswith("-"):
                    parse_reply(text + ";")

    def close(self) -> None:
        """Idempotent."""
        gone, self._socket = self._socket, None
        if gone is not None:
            gone.close()

    def _send(self, command: str) -> None:
        if self._socket is None:
            raise ConnectionError(f"{self.at}: not connected")
        self._socket.settimeout(ANSWER_S)
        try:
            self._socket.sendall(f"{command}\n".encode("ascii"))
        except OSError as fault:
            self.close()
            raise ConnectionError(f"{self.at}: {fault}") from fault

    def _read(self, seconds: float, command: str) -> bytes:
        assert self._socket is not None
        self._socket.settimeout(seconds)
        try:
            some = self._socket.recv(4096)
        except OSError as fault:
            self.close()
            raise TimeoutError(f"{self.at}: no answer to {command} ({fault})") from fault
        if not some:
            self.close()
            raise ConnectionError(f"{self.at}: the controller closed the connection")
        return some

    def _read_now(self) -> str:
        if self._socket is None:
            raise ConnectionError(f"{self.at}: not connected")
        self._socket.settimeout(0.0)
        try:
            some = self._socket.recv(65536)
        except BlockingIOError:
            return ""
        except OSError as fault:
            self.close()
            raise ConnectionError(f"{self.at}: {fault}") from fault
        if not some:
            self.close()
            raise ConnectionError(f"{self.at}: the controller closed the connection")
        return some.decode("ascii", "replace")


def stop_arm(channel: Channel, v4: bool) -> None:
    """A controlled stop by the firmware's own command. OSError: not known to stand.

    A controller that refuses it because the arm has an alarm, is disabled or has no power stands by that.
    """
    try:
        channel.ask("Stop()" if v4 else "ResetRobot()")
    except RefusedError:
        if int(channel.ask("RobotMode()")) not in (3, 4, 9):
            raise


def each(arms: Mapping[str, Callable[[], None]]) -> None:
    """Do it with every arm at once: one that does not answer keeps no other waiting. ConnectionError names those."""
    faults: dict[str, OSError] = {}

    def do(name: str) -> None:
        try:
            arms[name]()
        except OSError as fault:
            faults[name] = fault

    threads = [threading.Thread(target=do, args=(name,), name=f"{name}-arm") for name in arms]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise ConnectionError("; ".join(f"{name} arm: {fault}" for name, fault in faults.items()))
