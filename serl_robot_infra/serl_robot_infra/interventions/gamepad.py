"""A gamepad as an operator's device: `operator=gamepad`. Built by `wiring` from config/operator/gamepad.yaml."""

from collections.abc import Mapping

from serl_robot_infra.envs.base import Environment
from serl_robot_infra.interventions.evdev_device import EvdevDevice, ecodes
from serl_robot_infra.interventions.hand import HandOperator, HandSettings, check_commands, usable_axes


class GamepadOperator(HandOperator):
    """Drives while its takeover button is held: a dead man's switch.

    axes: action name -> axis of the kernel (ABS_Y, -ABS_Y). buttons: command -> button of the kernel, null for none.
    deadband, name: `EvdevDevice`. The others: `hand.HandSettings`. ValueError names the key that cannot be meant.
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
        wanted = {action: [axes[action]] for action in names}
        device = EvdevDevice(
            "gamepad", _is_gamepad, wanted, check_commands(buttons, "operator.buttons"), deadband, name, holds=True
        )
        super().__init__(device, env.spec, names, checked)


def _is_gamepad(device) -> bool:
    codes, has = ecodes(), device.capabilities(absinfo=False)
    return codes.BTN_GAMEPAD in has.get(codes.EV_KEY, ()) and codes.ABS_X in has.get(codes.EV_ABS, ())
