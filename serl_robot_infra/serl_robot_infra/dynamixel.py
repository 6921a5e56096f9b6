"""Dynamixel's protocol 2.0 on one serial line: positions and torque of several servos at once.

Called by interventions/dobot_leader_arm.py. FF FF FD 00 id length instruction … CRC-16; registers of the X series.
Facts from ROBOTIS' e-manual (Protocol 2.0; XL330, XC330). Every fault is an OSError that names the port.
"""

import math
from collections.abc import Mapping, Sequence

from serl_robot_infra.serial_line import SerialLine

HEADER = b"\xff\xff\xfd\0"
SYNC_READ, SYNC_WRITE, STATUS, BROADCAST = 0x82, 0x83, 0x55, 0xFE
TORQUE_ENABLE, GOAL_POSITION, PRESENT_POSITION = (64, 1), (116, 4), (132, 4)
RAD_PER_UNIT = 2 * math.pi / 4096
_ANSWER_S = 0.05
_TRIES = 3  # a corrupted packet


class Servos:
    """Those of one line, by their ids."""

    def __init__(self, line: SerialLine, ids: Sequence[int]):
        self._line, self._ids = line, list(ids)

    def positions(self) -> dict[int, float]:
        """id -> rad, measured, since the servo's zero; may be more than a turn."""
        return {servo: value * RAD_PER_UNIT for servo, value in self._read(PRESENT_POSITION).items()}

    def lock(self) -> None:
        """Torque on, with the goal where each servo stands: nothing jumps."""
        self._write(GOAL_POSITION, self._read(PRESENT_POSITION))
        self._torque(1)

    def release(self) -> None:
        """Torque off: a hand can move it."""
        self._torque(0)

    def _torque(self, on: int) -> None:
        for left in reversed(range(_TRIES)):  # a sync write is not answered: ask
            self._write(TORQUE_ENABLE, dict.fromkeys(self._ids, on))
            if set(self._read(TORQUE_ENABLE).values()) == {on}:
                return
            if not left:
                raise ConnectionError(f"{self._line.port}: servos do not take torque {'on' if on else 'off'}")

    def _read(self, register: tuple[int, int]) -> dict[int, int]:
        address, size = register
        parameters = address.to_bytes(2, "little") + size.to_bytes(2, "little") + bytes(self._ids)
        for left in reversed(range(_TRIES)):
            self._line.write(_packet(BROADCAST, SYNC_READ, parameters))
            try:
                return {servo: self._status(servo, size) for servo in self._ids}
            except (TimeoutError, ValueError) as fault:
                if not left:
                    raise TimeoutError(str(fault)) from fault
        raise AssertionError

    def _write(self, register: tuple[int, int], values: Mapping[int, int]) -> None:
        address, size = register
        data = b"".join(
            bytes([servo]) + value.to_bytes(size, "little", signed=size > 1) for servo, value in values.items()
        )
        self._line.write(
            _packet(BROADCAST, SYNC_WRITE, address.to_bytes(2, "little") + size.to_bytes(2, "little") + data)
        )

    def _status(self, servo: int, size: int) -> int:
        packet = self._line.read(11 + size, _ANSWER_S)
        if packet[:5] != HEADER + bytes([servo]) or packet[7] != STATUS or packet[-2:] != _crc(packet[:-2]):
            raise ValueError(f"{self._line.port}: a corrupted answer of servo {servo}: {packet.hex(' ')}")
        return int.from_bytes(packet[9 : 9 + size], "little", signed=size > 1)


def _packet(servo: int, instruction: int, parameters: bytes) -> bytes:
    body = HEADER + bytes([servo]) + (len(parameters) + 3).to_bytes(2, "little") + bytes([instruction]) + parameters
    return body + _crc(body)


def _crc(data: bytes) -> bytes:
    """CRC-16 with the polynomial 0x8005 from 0, the low byte first."""
    crc = 0
    for byte in data:
        crc ^= byte << 8
        for _ in range(8):
            crc = (crc << 1) ^ 0x8005 if crc & 0x8000 else crc << 1
        crc &= 0xFFFF
    return crc.to_bytes(2, "little")
