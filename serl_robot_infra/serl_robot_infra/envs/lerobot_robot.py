"""Any LeRobot robot as an environment, by yaml: `task.env.robot` is LeRobot's own config, `type` its registered name.

    step:  action float32[ad] ─▶ send_action ─▶ what the driver really sent (StepResult.executed)
                                 get_observation ─▶ images by camera names, state by names
    guard thread: hold, stop ─▶ the same bus, one at a time

Called by the actor loop like any environment. Names and units are LeRobot's. A part that does not answer, or a camera
without new pictures, raises PartLostError: the episode is cut, the robot holds, and `reset` opens the part anew.
"""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from serl_config.nearest import nearest
from serl_robot_infra import lerobot_devices as devices
from serl_robot_infra.envs.base import PartLostError, StepResult
from serl_robot_infra.envs.camera import FrozenCheck
from serl_robot_infra.envs.images import fitted, shape_refusal
from serl_transport.contract.schema import Observation
from serl_transport.contract.specs import TaskSpec

_BUS_WAIT_S = 0.2
"""A hold or stop waits so long for the bus, then fails and is tried again: the guard's thread is never kept."""

_POSITIONS = (".pos", ".q")


class LeRobotEnv:
    """Answers `envs.base.Environment` and `guard.Stoppable`.

    Args:
        spec: `${task.spec}`; its names are LeRobot's. A camera's images are scaled down to the spec's size.
        robot: LeRobot's config: `type`, ports, `id` of the calibration, cameras.
        home: action name -> where each episode begins; None: where the robot is. home_speed: units per second.
        still: the value at rest of each action that is no position of a joint, such as a base's speed.
        camera_max_age_ms: an older image is a lost camera. camera_frozen_s: so is one that does not change for so long.
        release_on_stop: take the torque away after a stop; the arm falls.

    Raises ValueError for a name or key that does not fit and for a missing calibration, OSError for a device that does
    not answer, ImportError for a driver that is not installed.
    """

    def __init__(
        self,
        spec: Mapping[str, Any],
        robot: Mapping[str, Any],
        home: Mapping[str, float] | None = None,
        home_speed: float = 20.0,
        still: Mapping[str, float] | None = None,
        camera_max_age_ms: float = 250.0,
        camera_frozen_s: float | None = 2.0,
        release_on_stop: bool = False,
    ):
        self.spec = TaskSpec.from_dict(devices.plain(spec))
        self._node = devices.plain(robot)
        self._robot = devices.make_robot(self._node)
        self._names = self.spec.action_names
        self._still = dict(devices.plain(still) or {})
        self._home, self._home_speed = dict(devices.plain(home) or {}), float(home_speed)
        self._max_age_ms, self._release = int(camera_max_age_ms), release_on_stop
        _check_names(self.spec, self._robot, self._still, self._home, self._home_speed)
        self._frozen = {camera: FrozenCheck(camera_frozen_s) for camera in self.spec.cameras}
        self._lock = threading.RLock()  # one thread at a time on a bus
        self._stopped = False  # actions are ignored until reset
        self._held: dict[str, float] | None = None  # the pose that is kept
        self._sensed: Mapping[str, Any] = {}  # the last observation
        self._lost = self._froze = self._released = self._closed = self._told = False
        devices.connect(self._robot, self._node, "robot", drives=True)

    @property
    def uses_degrees(self) -> bool | None:
        """Whether the joints are in degrees or in −100..100; None where the driver does not say."""
        return devices.uses_degrees(self._robot)

    def reset(self, seed: int, *, actuator_noise: float = 0.0) -> Observation:
        """Open anew what was lost, drive home at `home_speed`, observe. PartLostError: it still does not answer."""
        if actuator_noise:
            raise ValueError(f"rollout.demo_noise: a real robot is not disturbed, expected 0, got {actuator_noise:g}")
        self._stopped, self._held, self._told = False, None, False
        with self._part("reset"):
            if self._lost:
                devices.mend(self._robot, drives=True)
            if self._released:
                self._torque(on=True)
        if self._lost:
            with self._faults("reset"):  # seconds, in which the guard has the bus
                devices.mend_cameras(self._robot, self._sees)
            with self._part("reset"):
                devices.mend_whole(self._robot, self._node, "robot", drives=True)
            self._lost = self._froze = False
        for check in self._frozen.values():
            check.forget()
        self._go_home()
        return self._observe("reset")

    def observe(self) -> Observation:
        """What is seen and sensed now; nothing moves. PartLostError as `step`."""
        return self._observe("observe")

    def limits(self) -> dict[str, tuple[float, float]]:
        """The range of each joint by its calibration, in the task's units; empty where the driver has no servos."""
        return devices.joint_ranges(self._robot)

    @property
    def falls_on_stop(self) -> bool:
        """Whether a stop takes its torque away."""
        return self._release

    def step(self, action: np.ndarray) -> StepResult:
        """Send float32[ad] and observe; `executed` is what the driver sent after its own clipping."""
        with self._part("step"):
            executed = self._send(action)
        return StepResult(self._observe("step"), 0.0, False, False, False, executed=executed)

    def hold(self) -> None:
        """Keep the pose of the first call: one that is read anew each time would sink with the arm."""
        with self._bus():
            self._hold(self._held or self._pose())

    def stop(self) -> None:
        """Stand where it is, then torque as `release_on_stop` says; a bus that was lost is opened for it."""
        self._stopped = True  # at once, also while a step keeps the bus
        with self._bus():
            try:
                self._hold(self._pose())
            except devices.FAULTS:
                devices.mend(self._robot, drives=True)
                self._hold(self._pose())
            if self._release:
                self._torque(on=False)

    def close(self) -> None:
        """Disconnect; torque as LeRobot's config says."""
        if self._closed:
            return
        self._closed = True
        with self._lock:
            try:
                self._robot.disconnect()
            except devices.FAULTS as fault:
                devices.log.warning("%s: not closed properly: %s", self._node["type"], devices.one_line(fault))

    @contextmanager
    def _part(self, what: str) -> Iterator[None]:
        """The control loop's turn on the bus."""
        with self._faults(what), self._lock:
            yield

    @contextmanager
    def _faults(self, what: str) -> Iterator[None]:
        """A part that does not answer is a PartLostError."""
        try:
            yield
        except devices.FAULTS as fault:
            self._lost = True
            raise PartLostError(f"{self._node['type']}.{what}: {devices.one_line(fault)}") from fault

    @contextmanager
    def _bus(self) -> Iterator[None]:
        """The guard's turn."""
        if not self._lock.acquire(timeout=_BUS_WAIT_S):
            raise TimeoutError(f"{self._node['type']}: its bus is busy for {_BUS_WAIT_S:g} s")
        try:
            yield
        finally:
            self._lock.release()

    def _send(self, action: np.ndarray) -> np.ndarray:
        """What was sent, float32[ad]: after a stop the pose that is kept."""
        wish = dict(zip(self._names, map(float, action), strict=True))
        if self._stopped:
            sent = self._held or self._at_rest()
        else:
            self._held = None
            sent = self._robot.send_action(wish)
            self._tell_bent(wish, sent)
        return np.array([sent.get(name, wish[name]) for name in self._names], np.float32)

    def _hold(self, pose: dict[str, float]) -> None:
        self._robot.send_action(pose)
        self._held = pose

    def _pose(self) -> dict[str, float]:
        """Where the robot is, as an action that keeps it there; a lost camera does not hide it."""
        try:
            self._sensed = self._robot.get_observation()
        except devices.FAULTS:
            if not self._sensed:
                raise
        return self._at_rest()

    def _at_rest(self) -> dict[str, float]:
        """The action that keeps the robot where it was sensed last."""
        return {name: float(self._still[name] if name in self._still else self._sensed[name]) for name in self._names}

    def _tell_bent(self, wish: Mapping[str, float], sent: Mapping[str, float]) -> None:
        """Once an episode: the driver has limits of its own."""
        bent = [name for name in self._names if abs(sent.get(name, wish[name]) - wish[name]) > 1e-3]
        if bent and not self._told:
            self._told = True
            devices.log.warning(
                "the driver bends actions (%s: asked %.1f, sent %.1f); what it sent is recorded",
                bent[0], wish[bent[0]], sent[bent[0]],
            )  # fmt: skip

    def _go_home(self) -> None:
        """In a straight line through the joints; a stop ends it."""
        if not self._home:
            return
        period = 1.0 / self.spec.control_hz
        with self._part("reset"):
            pose = self._pose()
        while not self._stopped and any(abs(self._home[name] - pose[name]) > 1e-6 for name in self._home):
            for name, goal in self._home.items():
                move = self._home_speed * period
                pose[name] += min(max(goal - pose[name], -move), move)
            with self._part("reset"):
                if not self._stopped:
                    self._robot.send_action(pose)
            time.sleep(period)

    def _observe(self, what: str) -> Observation:
        with self._part(what):
            seen = self._sensed = self._robot.get_observation()
            for camera in devices.cameras(self._robot).values():
                camera.read_latest(max_age_ms=self._max_age_ms)
            for camera, check in self._frozen.items():
                self._froze = self._froze or check.is_frozen(seen[camera])
                if self._froze:
                    raise TimeoutError(f"camera {camera}: the same picture for {check.limit_s:g} s")
        images = {camera: fitted(seen[camera], size, camera) for camera, size in self.spec.cameras.items()}
        return Observation(images, np.array([seen[name] for name in self.spec.state_names], np.float32))

    def _sees(self, camera: Any) -> bool:
        try:
            camera.read_latest(max_age_ms=self._max_age_ms)
        except devices.FAULTS:
            return False
        return not self._froze  # which one it was by LeRobot's names is not known: all are opened anew

    def _torque(self, on: bool) -> None:
        for _, bus in devices.buses(self._robot):
            if on:
                devices.stay(bus)
                bus.enable_torque(num_retry=2)
            else:
                bus.disable_torque(num_retry=2)
        self._released = not on


def _check_names(
    spec: TaskSpec, robot: Any, still: Mapping[str, float], home: Mapping[str, float], home_speed: float
) -> None:
    """ValueError for a name that the robot does not have, or an action that cannot be kept at rest."""
    seen = robot.observation_features
    sizes = {name: shape for name, shape in seen.items() if isinstance(shape, tuple) and len(shape) == 3}
    actions = devices.feature_names(robot.action_features)
    states = [name for name in seen if name not in sizes]
    for key, names, known in (
        ("task.spec.cameras", spec.cameras, sizes),
        ("task.spec.state_names", spec.state_names, states),
        ("task.spec.action_names", spec.action_names, actions),
        ("task.env.still", still, actions),
        ("task.env.home", home, actions),
    ):
        for name in names:
            if name not in known:
                raise ValueError(f"{key}: {robot.name} has no {name!r}{nearest(name, list(known), show=40)}")
    if missing := [name for name in actions if name not in spec.action_names]:
        raise ValueError(f"task.spec.action_names: {robot.name} expects {missing[0]!r} as well")
    for name in spec.action_names:
        if name not in still and not (name in states and name.endswith(_POSITIONS)):
            raise ValueError(f"task.env.still: {name!r} is no position of a joint; name its value at rest, such as 0.0")
    for camera, size in spec.cameras.items():
        if refusal := shape_refusal(camera, sizes[camera], size):
            raise ValueError(refusal)
    if not home_speed > 0:
        raise ValueError(f"task.env.home_speed: expected a number above 0, got {home_speed}")
