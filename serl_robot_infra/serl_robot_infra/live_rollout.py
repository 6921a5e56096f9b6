"""What people at the learner change of a running actor's `rollout.*`: comes with a ticket, holds from its episode on.

    ticket {rollout: {rate_hz: {value, by}}} ─▶ take ─▶ put into force between two episodes ─▶ screen, heartbeat

Few keys: those whose change leaves what is learned as it was and the robot as safe. Called by `actor`, built by
`wiring`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from serl_robot_infra.guard import RobotGuard
from serl_robot_infra.observers.base import Observer
from serl_robot_infra.pacing import Pace
from serl_transport.contract.bounds import INT32, check_number, check_whole, shown

Put = Callable[[Any], Any]  # a value, or None: as the actor was started; returns what holds then. ValueError: it cannot


class Recording(Protocol):
    """What records videos (`observers.video`, which nobody imports who records none)."""

    every: Mapping[str, int]  # mode -> each k-th of its episodes


@dataclass(slots=True)
class LiveRollout:
    """keys: of `rollout`, and how a value of each comes into force."""

    keys: Mapping[str, Put]
    observer: Observer  # is told in words
    set_status: Callable[..., None]  # of the link: what heartbeats say
    _now: dict[str, Any] = field(default_factory=dict, init=False)  # key -> what was asked last
    _told: dict[str, str] = field(default_factory=dict, init=False)  # key -> what came of it

    def take(self, wanted: Mapping[str, Any]) -> None:
        """Put what is another one than before into force, and say so; what cannot be is said and changes nothing."""
        changed = [key for key in {**self._now, **wanted} if self._now.get(key) != wanted.get(key)]
        for key in changed:
            self._change(key, wanted.get(key))
        self._now = dict(wanted)
        if changed:
            self.set_status(rollout=", ".join(self._told.values()) or None)

    def _change(self, key: str, entry: Any) -> None:
        before = self._told.pop(key, f"{key} as started")
        try:
            value, by = (None, None) if entry is None else (entry["value"], entry["by"])
            if key not in self.keys:
                raise ValueError(f"expected one of {', '.join(self.keys)}")
            holds = self.keys[key](value)
        except (ValueError, TypeError, KeyError) as problem:
            self._told[key] = f"{before}, as {shown(entry)} is refused: {problem}"
            self.observer.message(f"the learner sets rollout.{shown(key)}, which is refused here: {problem}")
            return
        if entry is not None:
            self._told[key] = f"{key}={holds:g} ({by})"
        said = f"by {by}" if entry is not None else "as this actor was started"
        self.observer.message(f"rollout.{key}={holds:g} from this episode on, {said}")


def rate(control_hz: float, paces: Sequence[tuple[Pace, float]], guard: RobotGuard) -> Put:
    """Of the control loop, up to the task's rate. paces: each with its rate at the start, Hz."""

    def put(value: float | None) -> float:
        if value is not None:
            check_number("rate_hz", value, 1e-3, control_hz)
            if guard.stop_s is not None and 1.0 / value > guard.stop_s / 2:
                raise ValueError(
                    f"{value:g} Hz is a tick in {1 / value:g} s, and the watchdog stops the robot after "
                    f"{guard.stop_s:g} s without one (rollout.watchdog.stop_ms)"
                )
        rates = [own if value is None else value for _, own in paces]
        for (pace, _), hz in zip(paces, rates, strict=True):
            pace.set_rate(hz)
        guard.set_rate(rates[0])
        return rates[0]

    return put


def video_every(videos: Sequence[Recording]) -> Put:
    """Each k-th demonstration and online episode; 0: none. videos: the one recorder, or nobody."""
    own = dict(videos[0].every) if videos else {}

    def put(value: int | None) -> int:
        if value is not None:
            check_whole("video_every", value, 0, INT32)
        if not videos:
            raise ValueError("this actor was started without videos (rollout.video_every=0, or no camera)")
        videos[0].every = own if value is None else own | {"demo": value, "online": value}
        return videos[0].every["online"]

    return put
