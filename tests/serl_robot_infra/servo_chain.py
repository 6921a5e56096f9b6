"""Servos on a serial line, at a pseudo-terminal: what LeRobot's buses and the vendors' SDKs talk to in tests.

The bytes are the real ones: Feetech's protocol 0 and Dynamixel's protocol 2.0 (ping, read, write, sync read, sync
write), with checksums. A servo with torque goes to its goal. The line can be unplugged and plugged in again, and answer
with a corrupted packet.
"""

import os
import threading
import time
import tty
from collections.abc import Callable, Mapping
from pathlib import Path

PING, READ, WRITE, SYNC_READ, SYNC_WRITE, STATUS = 1, 2, 3, 0x82, 0x83, 0x55
BROADCAST = 0xFE
Table = Mapping[str, tuple[int, int]]  # register -> (address, bytes)


class Servo:
    """One servo: 256 or more registers of a byte."""

    def __init__(self, table: Table, model_number: int, resolution: int, speed: float, order: str):
        self._table, self._speed, self.order = table, speed, order
        self._moved = time.monotonic()
        self.memory = bytearray(1024)
        self.set("Model_Number", model_number)
        for name in ("Present_Position", "Goal_Position"):
            self.set(name, resolution // 2)
        self.set("Min_Position_Limit", 0)
        self.set("Max_Position_Limit", resolution - 1)

    def set(self, name: str, value: int) -> None:
        address, size = self._table[name]
        self.memory[address : address + size] = value.to_bytes(size, self.order)

    def get(self, name: str) -> int:
        address, size = self._table[name]
        return int.from_bytes(self.memory[address : address + size], self.order)

    def move(self) -> None:
        """Go on towards the goal for the time that passed."""
        now, before = time.monotonic(), self._moved
        self._moved = now
        step = round(self._speed * (now - before))
        if self.get("Torque_Enable"):
            at, goal = self.get("Present_Position"), self.get("Goal_Position")
            self.set("Present_Position", at + min(max(goal - at, -step), step))


class ServoChain:
    """Context manager; `port` is the path to open, the same after each plugging in. bus: LeRobot's, for its servos.

    speed: of each servo with torque, in its own units per second.
    """

    def __init__(self, bus, port: Path, speed: float = 4000.0):
        self.port = port
        order = "big" if getattr(bus, "protocol_version", 0) == 1 else "little"
        self.servos = {
            motor.id: Servo(
                bus.model_ctrl_table[motor.model], bus.model_number_table[motor.model],
                bus.model_resolution_table[motor.model], speed, order,
            )
            for motor in bus.motors.values()
        }  # fmt: skip
        self._answer = _dynamixel if "Dynamixel" in type(bus).__name__ else _feetech
        self.goals: list[tuple[int, int, int]] = []  # (servo, address, value) of every sync write, in order
        self.corrupt = 0  # so many answers from now on are corrupted
        self._master = -1
        self._lock = threading.Lock()

    def __enter__(self) -> "ServoChain":
        self.plug()
        return self

    def __exit__(self, *error) -> None:
        self.unplug()

    def goals_soon(self) -> list[tuple[int, int, int]]:
        """`goals` once what was written has arrived: a sync write is not answered."""
        time.sleep(0.05)
        return self.goals

    def plug(self) -> None:
        """The cable is in; the servos kept their registers."""
        self._master, slave = os.openpty()
        tty.setraw(slave)
        self.port.unlink(missing_ok=True)
        self.port.symlink_to(os.ttyname(slave))
        self._slave = slave
        threading.Thread(target=self._serve, args=(self._master,), daemon=True).start()

    def unplug(self) -> None:
        """The cable is out: the port is gone."""
        self.port.unlink(missing_ok=True)
        master, self._master = self._master, -1
        if master >= 0:
            os.close(self._slave)
            with self._lock:
                os.close(master)

    def _serve(self, master: int) -> None:
        unread = b""
        while self._master == master:
            try:
                unread += os.read(master, 4096)
            except OSError:
                return
            with self._lock:
                answer, unread = self._answer(unread, self._handle)
                if answer and self.corrupt:
                    self.corrupt -= 1
                    answer = answer[:-1] + bytes([answer[-1] ^ 0xFF])
                if self._master == master:
                    os.write(master, answer)

    def _handle(self, who: int, instruction: int, address: int, size: int, values: Mapping[int, bytes]) -> dict:
        """servo -> its answer's bytes."""
        for servo in self.servos.values():
            servo.move()
        if instruction == PING:
            return {who: bytes(self.servos[who].memory[:2]) + b"\0"} if who in self.servos else {}
        if instruction in (READ, SYNC_READ):
            asked = [who] if instruction == READ else list(values)
            return {i: bytes(self.servos[i].memory[address : address + size]) for i in asked if i in self.servos}
        for i, data in values.items():
            self.servos[i].memory[address : address + len(data)] = data
            if instruction == SYNC_WRITE:
                self.goals.append((i, address, int.from_bytes(data, self.servos[i].order)))
        return {who: b""} if instruction == WRITE else {}


def _feetech(unread: bytes, handle: Callable) -> tuple[bytes, bytes]:
    answer = b""
    while len(unread) >= 6 and len(unread) >= unread[3] + 4:
        packet, unread = unread[: unread[3] + 4], unread[unread[3] + 4 :]
        assert packet[:2] == b"\xff\xff", packet
        assert packet[-1] == ~sum(packet[2:-1]) & 0xFF, packet
        who, instruction, rest = packet[2], packet[4], packet[5:-1]
        address, size, values = (rest[0], rest[1] if len(rest) > 1 else 0, {}) if rest else (0, 0, {})
        if instruction == WRITE:
            values = {who: rest[1:]}
        elif instruction == SYNC_READ:
            values = dict.fromkeys(rest[2:], b"")
        elif instruction == SYNC_WRITE:
            values = {rest[k]: rest[k + 1 : k + 1 + size] for k in range(2, len(rest), size + 1)}
        for servo, data in handle(who, instruction, address, size, values).items():
            data = b"" if instruction == PING else data
            body = bytes([servo, len(data) + 2, 0]) + data
            answer += b"\xff\xff" + body + bytes([~sum(body) & 0xFF])
    return answer, unread


def _dynamixel(unread: bytes, handle: Callable) -> tuple[bytes, bytes]:
    answer = b""
    while len(unread) >= 10 and len(unread) >= (total := int.from_bytes(unread[5:7], "little") + 7):
        packet, unread = unread[:total], unread[total:]
        assert packet[:4] == b"\xff\xff\xfd\0", packet
        assert packet[-2:] == _crc(packet[:-2]), packet
        who, instruction, rest = packet[4], packet[7], packet[8:-2]
        address, size = int.from_bytes(rest[:2], "little"), int.from_bytes(rest[2:4], "little")
        values: dict[int, bytes] = {}
        if instruction == WRITE:
            values = {who: rest[2:]}
        elif instruction == SYNC_READ:
            values = dict.fromkeys(rest[4:], b"")
        elif instruction == SYNC_WRITE:
            values = {rest[k]: rest[k + 1 : k + 1 + size] for k in range(4, len(rest), size + 1)}
        for servo, data in handle(who, instruction, address, size, values).items():
            body = bytes([servo]) + (len(data) + 4).to_bytes(2, "little") + bytes([STATUS, 0]) + data
            answer += b"\xff\xff\xfd\0" + body + _crc(b"\xff\xff\xfd\0" + body)
    return answer, unread


def _crc(data: bytes) -> bytes:
    """CRC-16 of protocol 2.0: polynomial 0x8005, from 0, not reflected."""
    crc = 0
    for byte in data:
        crc ^= byte << 8
        for _ in range(8):
            crc = (crc << 1 ^ 0x8005 if crc & 0x8000 else crc << 1) & 0xFFFF
    return crc.to_bytes(2, "little")
