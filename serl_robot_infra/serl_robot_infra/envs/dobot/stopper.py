"""Stops the arms from the watchdog process, by a dashboard connection of its own (docs/safety.md). Named by env.py.

A controller that takes one dashboard client (V4 firmware: "IP:Port has been occupied") lets this one in only once the
actor's connection is gone: after a kill -9 that is at once. It is said at the start which it is.
"""

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

from serl_robot_infra.envs.dobot.channel import TURN_S, Channel, each, stop_arm

log = logging.getLogger(__name__)


class DobotStopper:
    """Answers `watchdog.Stopper`. arms: name -> {host, dashboard_port}; v4: the firmware."""

    def __init__(self, arms: Mapping[str, Mapping[str, Any]], v4: bool):
        self._v4 = v4
        self._channels = {name: Channel(arm["host"], arm["dashboard_port"]) for name, arm in arms.items()}
        for name, channel in self._channels.items():
            try:
                channel.open()
                channel.ask("RobotMode()")
            except OSError as fault:
                channel.close()
                log.warning(
                    "%s arm: no second dashboard connection (%s): this process stops it once the actor's own is gone, "
                    "not while a driver hangs; an arm without commands comes to rest at its last target",
                    name, fault,
                )  # fmt: skip

    def stop(self) -> None:
        """Each arm, whatever another one says. OSError: one of them is not known to stand."""
        each({name: partial(self._stop, channel) for name, channel in self._channels.items()})

    def _stop(self, channel: Channel) -> None:
        try:
            stop_arm(channel, self._v4)
        except OSError:
            channel.open(TURN_S)
            try:
                stop_arm(channel, self._v4)
            except OSError:
                channel.close()
                raise
