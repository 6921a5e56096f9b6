"""A 3Dconnexion SpaceMouse as an operator's device: `operator=spacemouse`. Built by `wiring` from
config/operator/spacemouse.yaml.

The kernel reports its six axes as relative or as absolute ones, by model; both are read. evdev rather than hidapi: it
is the gamepad's library, too, and needs neither a C library beside it nor a table of byte layouts by model.
"""

from collections.abc import Mapping

from serl_robot_infra.envs.base import Environment
from serl_robot_infra.interventions.evdev_device import EvdevDevice
from serl_robot_infra.interventions.hand import HandOperator, HandSettings, check_commands, usable_axes

_AXES = ("X", "Y", "Z", "RX", "RY", "RZ")
_3DCONNEXION, _LOGITECH = 0x256F, 0x046D  # USB vendors; Logitech's of before 2013 are called Space...


class SpaceMouseOperator(HandOperator):
    """Drives while its cap is touched, and `release_s` longer.

    axes: action name -> X, Y, Z, RX, RY or RZ, with a minus where it is the other way round. buttons: command -> button
    of the kernel, null for none. deadband, name: `EvdevDevice`. The others: `hand.HandSettings`.
    """

    def __init__(
        self,
        env: Environment,
        axes: Mapping[str, str],
        buttons: Mapping[str, str | None],
        deadband: float,
        name: str | None = None,
        **settings,
    ):
        names, checked = usable_axes(axes, env.spec), HandSettings(**settings)
        wanted = {action: _kernel_names(action, axes[action]) for action in names}
        device = EvdevDevice(
            "SpaceMouse", _is_spacemouse, wanted, check_commands(buttons, "operator.buttons"), deadband, name,
            holds=False,
        )  # fmt: skip
        super().__init__(device, env.spec, names, checked)


def _kernel_names(action: str, axis: str) -> list[str]:
    sign, name = ("-", axis[1:]) if str(axis).startswith("-") else ("", axis)
    if name not in _AXES:
        raise ValueError(f"operator.axes.{action}: expected {', '.join(_AXES)}, or -X and the like, got {axis!r}")
    return [f"{sign}REL_{name}", f"{sign}ABS_{name}"]


def _is_spacemouse(device) -> bool:
    vendor = device.info.vendor
    return vendor == _3DCONNEXION or (vendor == _LOGITECH and "Space" in device.name)
