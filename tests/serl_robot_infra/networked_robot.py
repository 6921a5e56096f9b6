"""A robot that registers with LeRobot from outside, without a bus of ours: over a network, with a base's speed."""

from dataclasses import dataclass

from lerobot.robots import Robot, RobotConfig


@RobotConfig.register_subclass("networked")
@dataclass
class NetworkedConfig(RobotConfig):
    host: str = "here"


class Networked(Robot):
    """`up` is the network, `log` what the robot was told; the newest one is `last`."""

    config_class, name = NetworkedConfig, "networked"
    last: "Networked | None" = None

    def __init__(self, config):
        super().__init__(config)
        self.up, self.log, self._open, self._at = True, [], False, 5.0
        Networked.last = self

    observation_features = property(lambda self: {"lift.pos": float, "x.vel": float})
    action_features = property(lambda self: {"lift.pos": float, "x.vel": float})
    is_connected = property(lambda self: self._open)
    is_calibrated = property(lambda self: True)

    def connect(self, calibrate=True):
        assert not calibrate
        self._open = True
        try:
            self._look()
        except TimeoutError:
            self._open = False
            raise
        self.log.append("connect")

    def calibrate(self):
        raise AssertionError("nobody is there to calibrate")

    def configure(self): ...

    def get_observation(self):
        self._look()
        return {"lift.pos": self._at, "x.vel": 0.7}

    def send_action(self, action):
        self._look()
        self._at = action["lift.pos"]
        self.log.append(dict(action))
        return action

    def disconnect(self):
        self._open = False
        self.log.append("disconnect")

    def _look(self):
        if not (self.up and self._open):
            raise TimeoutError("no answer from here")
