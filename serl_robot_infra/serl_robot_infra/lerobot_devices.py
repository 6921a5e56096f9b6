"""LeRobot's robots and teleoperators by their registered names: the one file of the robot's side that imports lerobot.

    {type: so101_follower, port: …} ─▶ LeRobot's config dataclass ─▶ its device, connected and calibrated
                                                                     └ mend: what does not answer is opened anew

Called by envs/lerobot_robot.py and interventions/lerobot_teleop.py. lerobot, and torch with it, is imported when a
device is made, never before. No device asks a question: an actor runs where nobody answers.
"""

import contextlib
import dataclasses
import importlib
import logging
import pkgutil
import termios
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from inspect import signature
from typing import Any

from omegaconf import OmegaConf

from serl_config.nearest import nearest

log = logging.getLogger(__name__)

FAULTS = (OSError, RuntimeError, termios.error)
"""What buses and cameras raise when a part does not answer; the last by a serial port that is gone."""

_CONNECTS = 3  # a setting that is lost on the way is written again from the start

INSTALL = "bash tools/bootstrap.sh lerobot"


def make_robot(node: Mapping[str, Any]) -> Any:
    """The robot of task.env.robot, not connected.

    ValueError names an unknown type or key, ImportError what is not installed.
    """
    with _installed():
        from lerobot import robots
    return _make(node, "task.env.robot", robots, robots.RobotConfig, robots.make_robot_from_config)


def make_teleoperator(node: Mapping[str, Any]) -> Any:
    """The teleoperator of task.operator.teleop, not connected; raises as `make_robot`."""
    with _installed():
        from lerobot import teleoperators as teleops
    make = teleops.make_teleoperator_from_config
    return _make(node, "task.operator.teleop", teleops, teleops.TeleoperatorConfig, make)


def connect(device: Any, node: Mapping[str, Any], flag: str, drives: bool) -> None:
    """Open it. The goal of each servo is where it stands before its torque comes on, so nothing jumps.

    Args:
        node: its yaml; flag: `robot` or `teleop`, for the command that calibrates it.
        drives: whether its servos are to have torque.

    Raises ValueError with LeRobot's own command when it is not calibrated, ConnectionError when it does not answer.
    """
    for left in reversed(range(_CONNECTS)):
        try:
            _open(device, node, flag, drives)
            break
        except FAULTS as fault:
            _let_go(device)
            if not left:
                raise ConnectionError(f"{flag} {node['type']}: {one_line(fault)}") from fault
            log.warning("%s %s: trying again: %s", flag, node["type"], one_line(fault))
    if not device.is_connected:
        raise ConnectionError(f"{flag} {node['type']}: it did not come up; its words are above")


def _open(device: Any, node: Mapping[str, Any], flag: str, drives: bool) -> None:
    for owner, bus in buses(device):
        bus.connect(handshake=False)  # its own connect asks every servo who it is
        try:
            _check_calibration(owner, node, flag)
            if drives:
                stay(bus)
        finally:
            bus.disconnect(disable_torque=False)
    unattended = {"calibrate": False} if "calibrate" in signature(device.connect).parameters else {}
    device.connect(**unattended)
    if not list(buses(device)):
        _check_calibration(device, node, flag)


def _let_go(device: Any) -> None:
    """Of a device that is half open; its servos keep their torque."""
    for _, bus in buses(device):
        _close_port(bus)
    for camera in cameras(device).values():
        with contextlib.suppress(*FAULTS):
            camera.disconnect()


def mend(device: Any, drives: bool) -> None:
    """Open each silent bus anew, without taking the torque from servos that have it. Raises one of FAULTS."""
    for owner, bus in buses(device):
        if not _answers(bus):
            _reopen(owner, bus, drives)


def mend_whole(device: Any, node: Mapping[str, Any], flag: str, drives: bool) -> None:
    """A device without buses of ours: when it does not answer, by its own disconnect, which may take its torque.

    Raises one of FAULTS.
    """
    if list(buses(device)):
        return
    try:
        (device.get_observation if drives else device.get_action)()
    except FAULTS:
        with contextlib.suppress(*FAULTS):
            device.disconnect()
        connect(device, node, flag, drives)
        log.warning("%s: opened anew", node["type"])


def mend_cameras(device: Any, sees: Callable[[Any], bool]) -> None:
    """Open anew those that give no pictures. Raises one of FAULTS."""
    for name, camera in cameras(device).items():
        if not sees(camera):
            with contextlib.suppress(*FAULTS):
                camera.disconnect()
            camera.connect()
            camera.async_read(timeout_ms=1000)
            log.warning("camera %s: opened anew", name)


def buses(device: Any) -> Iterator[tuple[Any, Any]]:
    """(arm, its serial bus of servos) for each arm of the device."""
    for arm in _arms(device):
        bus = getattr(arm, "bus", None)
        if hasattr(bus, "port_handler"):
            yield arm, bus


def cameras(device: Any) -> dict[str, Any]:
    """LeRobot's camera objects by their names in an arm."""
    return {
        f"{where}{name}": camera
        for where, arm in _named_arms(device)
        for name, camera in (getattr(arm, "cameras", None) or {}).items()
    }


def uses_degrees(device: Any) -> bool | None:
    """Whether its joints are in degrees (or in −100..100), as its servos are set up; None where it has no servos."""
    units = {motor.norm_mode.value for _, bus in buses(device) for motor in bus.motors.values()}
    return "degrees" in units if units else None


def joint_ranges(device: Any) -> dict[str, tuple[float, float]]:
    """`<joint>.pos` -> (lowest, highest) that the calibration of its servo allows, in the device's units."""
    ranges = {}
    for where, arm in _named_arms(device):
        bus = getattr(arm, "bus", None)
        for name, limit in (bus.calibration if hasattr(bus, "port_handler") else {}).items():
            motor = bus.motors[name]
            half = (limit.range_max - limit.range_min) * 180.0 / (bus.model_resolution_table[motor.model] - 1)
            units = {"degrees": (-half, half), "range_m100_100": (-100.0, 100.0), "range_0_100": (0.0, 100.0)}
            ranges[f"{where}{name}.pos"] = units[motor.norm_mode.value]
    return ranges


def feature_names(features: Mapping[str, Any]) -> list[str]:
    """The names of an action: a device lists them as keys, or beside a dtype and a shape."""
    names = features.get("names") if "dtype" in features else features
    names = names.get("motors", names) if isinstance(names, Mapping) else names
    return list(names or ())


def events_of(device: Any) -> dict[str, bool] | None:
    """What its buttons said since they were asked last, by LeRobot's names; None: it has none."""
    ask = getattr(device, "get_teleop_events", None)
    return None if ask is None else {event.value: bool(said) for event, said in ask().items()}


def plain(node: Any) -> Any:
    """Dicts and lists of a config node; None stays None."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def one_line(fault: BaseException) -> str:
    """LeRobot's messages run over several lines."""
    return f"{type(fault).__name__}: {' '.join(str(fault).split())}"


@contextlib.contextmanager
def _installed() -> Iterator[None]:
    logging.getLogger().addFilter(_not_every_tick)
    try:
        yield
    except ImportError as error:
        raise ImportError(f"a LeRobot device needs lerobot ({error}): {INSTALL}") from None


def _not_every_tick(record: logging.LogRecord) -> bool:
    """LeRobot writes many lines for each action that it clips, straight to the root logger; ours is one an episode."""
    return record.funcName != "ensure_safe_goal_position"


def _make(node: Mapping[str, Any], where: str, package: Any, base: Any, make: Any) -> Any:
    if not isinstance(node, Mapping) or not isinstance(node.get("type"), str):
        raise ValueError(f"{where}: expected {{type: <a name LeRobot knows>, ...}}, got {node!r}")
    failed = _register(package) if node["type"] not in base.get_known_choices() else []
    known = _choice(base, node, where, "; could not be imported: " + "; ".join(failed) if failed else "")
    _check_keys(known, {key: value for key, value in node.items() if key != "type"}, where)
    import draccus

    try:
        config = draccus.decode(base, dict(node))
    except (draccus.utils.DecodingError, draccus.ParsingError, ValueError, TypeError) as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from None
    try:
        return make(config)
    except ImportError as error:
        raise ImportError(f"{where}.type={node['type']}: {one_line(error)}") from None


def _register(package: Any) -> list[str]:
    """Import LeRobot's own devices of this kind and third-party ones, which registers their names; what failed."""
    failed = []
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        if module.ispkg:
            try:
                importlib.import_module(module.name)
            except Exception as error:  # a driver may raise anything while it is imported; it is named when asked for
                failed.append(f"{module.name} ({one_line(error)})")
    from lerobot.utils.import_utils import register_third_party_plugins

    register_third_party_plugins()
    return failed


def _choice(base: Any, node: Mapping[str, Any], where: str, more: str = "") -> Any:
    """The dataclass that `type` names."""
    choices = base.get_known_choices()
    if node.get("type") not in choices:
        hint = nearest(str(node.get("type")), sorted(choices), show=len(choices))
        raise ValueError(f"{where}.type: LeRobot has no {node.get('type')!r}{hint}{more}")
    return choices[node["type"]]


def _check_keys(config: type, node: Mapping[str, Any], where: str) -> None:
    """ValueError with the nearest name for a key that the dataclass, or one inside it, has not."""
    hints = typing.get_type_hints(config)
    names = [field.name for field in dataclasses.fields(config) if field.init]
    for key, value in node.items():
        if key not in names:
            raise ValueError(f"{where}.{key}: {config.__name__} has no such key{nearest(str(key), names, show=40)}")
        _check_inside(hints[key], value, f"{where}.{key}")
    if "use_degrees" in names and "use_degrees" not in node:
        raise ValueError(
            f"{where}.use_degrees: say true (joints in degrees) or false (−100..100); the limits of task.spec are in "
            "that unit"
        )


def _check_inside(hint: Any, value: Any, where: str) -> None:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        hint = next((part for part in typing.get_args(hint) if part is not types.NoneType), hint)
    if not isinstance(value, Mapping):
        return
    if dataclasses.is_dataclass(hint):
        _check_keys(typing.cast(type, hint), value, where)
    elif typing.get_origin(hint) is dict and hasattr(typing.get_args(hint)[1], "get_known_choices"):
        base = typing.get_args(hint)[1]
        _register_cameras()
        for name, node in value.items():
            if not isinstance(node, Mapping):
                raise ValueError(f"{where}.{name}: expected {{type: opencv, ...}}, got {node!r}")
            fields = {key: field for key, field in node.items() if key != "type"}
            _check_keys(_choice(base, node, f"{where}.{name}"), fields, f"{where}.{name}")


def _register_cameras() -> None:
    from lerobot import cameras

    for module in pkgutil.iter_modules(cameras.__path__, "lerobot.cameras."):
        if module.ispkg:
            with contextlib.suppress(ImportError):  # its SDK is not installed: its name stays unknown
                importlib.import_module(module.name)


def _named_arms(device: Any) -> list[tuple[str, Any]]:
    """A device of two arms holds two devices; another is its own only arm."""
    arms = [(f"{side}_", getattr(device, f"{side}_arm", None)) for side in ("left", "right")]
    found = [(where, arm) for where, arm in arms if hasattr(arm, "is_connected")]
    return found or [("", device)]


def _arms(device: Any) -> list[Any]:
    return [arm for _, arm in _named_arms(device)]


def _check_calibration(device: Any, node: Mapping[str, Any], flag: str) -> None:
    if device.is_calibrated is not False:  # some devices have nothing to calibrate and answer None, or a method
        return
    path = getattr(device, "calibration_fpath", None)
    why = f"differs from what its servos hold ({path})" if getattr(device, "calibration", None) else f"is not at {path}"
    words = " ".join([f"--{flag}.{key}={value}" for key, value in _leaves(node)])
    raise ValueError(f"{flag} {node['type']}: its calibration {why}; make it with  lerobot-calibrate {words}")


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            if key != "cameras":
                yield from _leaves(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value


def stay(bus: Any) -> None:
    """The goal of each servo is where it stands; in the servo's own units, so no calibration is needed."""
    for motor, position in _read(bus, "Present_Position").items():
        bus.write("Goal_Position", motor, position, normalize=False, num_retry=2)


def _read(bus: Any, register: str) -> dict[str, int]:
    """One servo after the other, which buses of mixed servos and of the oldest protocol can as well."""
    return {motor: bus.read(register, motor, normalize=False, num_retry=2) for motor in bus.motors}


def _answers(bus: Any) -> bool:
    try:
        _read(bus, "Present_Position")
    except FAULTS:
        return False
    return True


def _close_port(bus: Any) -> None:
    port = bus.port_handler
    if port.is_open:
        with contextlib.suppress(*FAULTS):
            port.closePort()
    port.is_open = port.is_using = False  # a write that failed leaves it in use for ever


def _reopen(arm: Any, bus: Any, drives: bool) -> None:
    _close_port(bus)
    bus.connect(handshake=False)
    if drives:
        stay(bus)
        if not all(_read(bus, "Torque_Enable").values()):  # the servos lost their supply, and settings with it
            arm.configure()
            bus.enable_torque(num_retry=2)
    else:
        arm.configure()  # a leader's torque is off, or that of a trigger
    log.warning("%s: the bus at %s is opened anew", arm, bus.port)
