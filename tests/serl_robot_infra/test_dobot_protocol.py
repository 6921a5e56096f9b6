"""Dobot's protocol as text and bytes: what a controller says, in a person's words."""

import struct

import numpy as np
import pytest

from serl_robot_infra.envs.dobot import protocol
from serl_robot_infra.envs.dobot.protocol import RefusedError, parse_alarms, parse_packet, parse_reply


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("-1,{},EnableRobot();", r"EnableRobot\(\) refused: -1 \(failed to execute\)"),
        ("-2,{},ServoJ(0,0,0,0,0,0,t=0.050);", r"refused: -2 \(the arm has an alarm\)"),
        ("-10000,{},Mov(-500,100,200,150,0,90);", r"Mov\(.* refused: -10000 \(no such command\)"),
        ("-40001,{},SpeedFactor(0);", r"refused: -40001 \(parameter out of its range\)"),
        ("Control Mode Is Not Tcp\t", "set it to TCP/IP mode in DobotStudio Pro"),
        ("Connection refused, IP:Port has been occupied\t", "the controller says 'Connection refused, IP:Port"),
    ],
)
def test_a_refusal_is_said_in_words(text, told):
    with pytest.raises(RefusedError, match=told):
        parse_reply(text)


def test_answers_and_alarms_are_read():
    assert parse_reply("0,{5},RobotMode();") == "5"
    assert parse_reply("0,{},Tool(1);") == ""
    values = parse_reply("0,{[[117,18],[],[4097],[],[],[],[]]},GetErrorID();")
    said = "alarm 117 (collision), alarm 18 (out of reach), servo 2: alarm 4097 (see alarm_servo.json)"
    assert parse_alarms(values) == said
    assert parse_alarms("[[],[],[],[],[],[],[]]") == "no alarm by name"


def test_a_packet_of_1440_bytes_is_read_and_another_stream_is_not():
    packet = bytearray(1440)
    struct.pack_into("<Q", packet, 24, 5)
    struct.pack_into("<Q", packet, 48, 0x0123456789ABCDEF)
    struct.pack_into("<6d", packet, 432, *range(0, 180, 30))
    struct.pack_into("<6d", packet, 624, 100, -200, 300, 180, 0, -90)
    packet[1026], packet[1031] = 1, 101
    seen = parse_packet(bytes(packet))
    assert (seen.mode, seen.enabled, seen.alarmed, protocol.MODELS[seen.model]) == (5, True, False, "nova2")
    np.testing.assert_allclose(seen.joints, np.radians(range(0, 180, 30)))
    np.testing.assert_allclose(seen.pose, [0.1, -0.2, 0.3, np.pi, 0, -np.pi / 2])
    with pytest.raises(ConnectionError, match="no feedback of a Dobot: expected the test value 0x0123456789abcdef"):
        parse_packet(bytes(1440))


def test_commands_are_in_degrees_and_millimetres():
    joints = np.radians([0.0, 10.0, -90.0, 0.0, 90.0, 1.23456])
    assert (
        protocol.servo_joints(joints, 0.05, v4=False) == "ServoJ(0.0000,10.0000,-90.0000,0.0000,90.0000,1.2346,0.050)"
    )
    assert protocol.servo_joints(joints, 0.05, v4=True).endswith(",1.2346,t=0.050)")
    pose = np.array([0.1, 0.2, 0.3, np.pi, 0.0, 0.0])
    assert protocol.servo_tool(pose, 0.05, v4=False) == "ServoP(100.0000,200.0000,300.0000,180.0000,0.0000,0.0000)"
    assert protocol.set_tool(1, [0, 0, 0.197, 0, 0, 0]) == "SetTool(1,{0.0000,0.0000,197.0000,0.0000,0.0000,0.0000})"
