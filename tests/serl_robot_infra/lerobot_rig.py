"""A LeRobot device on fake servos and cameras, made by its registered type as a user's yaml names it."""

import json
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

from fake_camera import FakeCapture
from servo_chain import ServoChain

from serl_robot_infra import lerobot_devices

DYNAMIXEL = "dynamixel_sdk.port_handler.PortHandler"
CAMERA = {"type": "opencv", "width": 64, "height": 48, "fps": 60, "warmup_s": 0}


def cameras(*names: str) -> dict:
    """Camera nodes; plugged in."""
    FakeCapture.devices, FakeCapture.frozen = set(range(len(names))), set()
    return {name: {**CAMERA, "index_or_path": index} for index, name in enumerate(names)}


def _patient(port, packet_length):
    port.packet_start_time, port.packet_timeout = port.getCurrentTime(), 3000.0


class Rig:
    """Context manager: `node` is the device's yaml, `chains` its lines of servos."""

    def __init__(self, folder: Path, make, node: dict, arms: int = 1):
        self._folder, self._make, self._stack, self.chains = folder, make, ExitStack(), []
        self.node = {"id": "lab", "calibration_dir": str(folder), **node}
        if arms == 2:
            for side in ("left", "right"):
                self.node[f"{side}_arm_config"] = {"port": str(folder / side), **node.get(f"{side}_arm_config", {})}
        else:
            self.node["port"] = str(folder / "arm")

    def __enter__(self) -> "Rig":
        # A loaded machine answers late; what is unplugged or corrupted is noticed without waiting.
        for name in ("lerobot.motors.feetech.feetech.patch_setPacketTimeout", f"{DYNAMIXEL}.setPacketTimeout"):
            self._stack.enter_context(mock.patch(name, _patient))
        for arm, bus in lerobot_devices.buses(self._make(self.node)):
            self.chains.append(self._stack.enter_context(ServoChain(bus, Path(bus.port))))
            self._calibrate(arm, bus)
        assert self.chains
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()

    def plug(self) -> None:
        for chain in self.chains:
            chain.plug()

    def unplug(self) -> None:
        for chain in self.chains:
            chain.unplug()

    def _calibrate(self, arm, bus) -> None:
        """As lerobot-calibrate leaves it: the file and the servos agree."""
        ranges = {name: bus.model_resolution_table[motor.model] - 1 for name, motor in bus.motors.items()}
        content = {
            name: {"id": motor.id, "drive_mode": 0, "homing_offset": 0, "range_min": 0, "range_max": ranges[name]}
            for name, motor in bus.motors.items()
        }
        if self.node["type"] == "omx_leader":  # its trigger is mounted the other way round
            content["gripper"] |= {"drive_mode": 1, "homing_offset": 100}
            trigger = self.chains[-1].servos[bus.motors["gripper"].id]
            trigger.set("Drive_Mode", 1)
            trigger.set("Homing_Offset", 100)
        arm.calibration_fpath.write_text(json.dumps(content))
