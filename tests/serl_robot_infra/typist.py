"""A person at a terminal: a pseudo-terminal as this process's standard input, and hands that type while `main` runs."""

import os
import signal
import threading
import time

from scripted_learner import RobotPick, Screen, actor_config

from flowserl_cli.compose import load_config
from serl_robot_infra.main import main

BY_PAD = ("operator=gamepad", "reward=operator")
REPEAT_S = 1 / 30  # a held key


class Typist:
    """Types at the terminal. Every wait fails after a while rather than hanging."""

    def __init__(self, master: int):
        self._master, self.screen = master, Screen()
        self.robot_ticks = lambda: len(RobotPick.last.sent) if RobotPick.last else 0

    def type(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def hold(self, key: bytes, seconds: float) -> None:
        """As a terminal repeats a held key, the first pause left out."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.type(key)
            time.sleep(REPEAT_S)

    def hang_up(self) -> None:
        os.close(self._master)
        self._master = -1

    def wait(self, condition, seconds=30.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"never happened; {self.screen.getvalue()[-2000:]}"
            time.sleep(0.005)

    def wait_ticks(self, n: int) -> None:
        """Until the robot has executed n more."""
        goal = self.robot_ticks() + n
        self.wait(lambda: self.robot_ticks() >= goal)

    def run(self, learner, tmp_path, hands, *words, env="scripted_learner.RobotPick", **rollout) -> tuple[int, str]:
        """The actor with these words of the command line, on the robot, while `hands` type; exit code and screen."""
        cfg = actor_config(learner, tmp_path, **rollout)
        chosen = load_config(list(words))
        for group in ("operator", "reward"):
            if group in chosen and any(word.startswith(group) for word in words):
                cfg[group] = chosen[group]
        cfg.operator_name = chosen.operator_name
        cfg.task.operator = None
        cfg.task.env = {"_target_": env}
        problems = []

        def work():
            try:
                hands()
            except Exception as problem:
                problems.append(problem)
                if running:
                    os.kill(os.getpid(), signal.SIGTERM)

        running = [True]
        thread = threading.Thread(target=work)
        thread.start()
        code = main(cfg, self.screen)
        running.clear()
        thread.join()
        if problems:
            raise problems[0]
        return code, self.screen.getvalue()
