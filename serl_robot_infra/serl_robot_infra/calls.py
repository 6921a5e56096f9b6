"""Calls into code that is not ours: the driver's, the operator's, the reward's. Made by the actor loop.

    with calls(env, "step"):  env.step(action) ─▶ what it raises, in words ─▶ the episode is cut, or the actor ends
                                  └ since when ─▶ observers/call_watch.py: said while it does not come back

What may be raised, and what follows: the table in docs/robot.md. The loop's thread calls, another one asks `current`.
"""

import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from serl_robot_infra.envs.base import PartLostError
from serl_robot_infra.interventions.base import OperatorGoneError
from serl_transport.contract.errors import WireError

_PASS = (PartLostError, OperatorGoneError, WireError)  # in the user's words already, or cut the episode


class PartFailedError(Exception):
    """Code of the robot, its operator or its reward failed, or a disk in mid-run; the message says where."""


class Calls:
    """The call in hand, and what its failure means."""

    def __init__(self) -> None:
        self._stack: list[tuple[str, float]] = []  # (Class.method, time.monotonic() of its begin); "": our own code
        self._ours: BaseException | None = None  # raised by our code that a part has called back
        self._came_back: set[str] = set()  # `Class.method` that has worked once
        self._lock = threading.Lock()
        self._given_up = False  # this process ends: whatever still comes back waits for that

    @property
    def current(self) -> tuple[str, float] | None:
        """(`Class.method`, seconds since it began) of the call in hand; None: our own code runs. From any thread."""
        name, since = next(reversed(list(self._stack)), ("", 0.0))
        return (name, time.monotonic() - since) if name else None

    def give_up(self, name: str) -> bool:
        """This process ends while `name` hangs: its thread goes no further. False: it has come back."""
        with self._lock:
            self._given_up = bool(self._stack) and self._stack[-1][0] == name
            return self._given_up

    @contextmanager
    def __call__(self, part: object, method: str) -> Iterator[None]:
        """Around `part.method(...)`. Raises PartFailedError for what is not for the user or for a cut already.

        A ValueError is for the user, a mistake in the yaml, until the call has worked once.
        """
        name = f"{type(part).__name__}.{method}"
        try:
            with self._noted(name):
                yield
        except _PASS:
            raise
        except Exception as fault:
            if fault is self._ours or (isinstance(fault, ValueError) and name not in self._came_back):
                raise
            at = traceback.extract_tb(fault.__traceback__)[-1]
            words = " ".join(str(fault).split())
            kind = type(fault).__name__
            raise PartFailedError(f"{name} failed: {kind}: {words} ({at.filename}, line {at.lineno})") from fault
        self._came_back.add(name)

    @contextmanager
    def called_back(self) -> Iterator[None]:
        """Around our own code that a part calls: what it raises goes through, and its time is not the part's."""
        try:
            with self._noted(""):
                yield
        except Exception as fault:
            self._ours = fault
            raise

    @contextmanager
    def _noted(self, name: str) -> Iterator[None]:
        self._stack.append((name, time.monotonic()))
        try:
            yield
        finally:
            with self._lock:
                self._stack.pop()
            if self._given_up:
                threading.Event().wait()
