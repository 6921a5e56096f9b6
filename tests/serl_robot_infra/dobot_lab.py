"""An X-Trainer and its person as a process: controllers, grippers, leaders, cameras on HTTP, hands at the leaders.

    python dobot_lab.py FOLDER        prints the words for run_actor.sh on one line, and ends with its stdin

Nothing in the actor is replaced: it opens TCP, serial ports and OpenCV's streams. The person presses the leaders'
buttons: ready before each episode, free to bring them home, takeover when the policy dawdles; then moves them.
"""

import http.server
import io
import sys
import threading
import time
from pathlib import Path

import numpy as np
from dobot_rig import CAMERAS, DobotRig
from fake_dobot import HOME
from PIL import Image

GOAL = {"left": [0.25, 0.2, 0.0, 0.0, 0.0, 0.0], "right": [-0.25, -0.2, 0.0, 0.0, 0.0, 0.0]}  # from home, rad
HAND_SPEED = 0.35  # rad per second
PATIENCE_S = 4.0  # before the person helps a policy that goes astray
STUCK_S = 1.0  # one that comes no nearer is helped sooner: what is waited through is recorded, and learned from
PERIOD_S = 0.02


class Person(threading.Thread):
    """Moves what is free, presses what is meant."""

    def __init__(self, rig: DobotRig):
        super().__init__(daemon=True)
        self._rig, self._leaders, self._rng = rig, rig.leaders, np.random.default_rng(0)
        self._at = {side: np.radians(HOME[side]) for side in HOME}
        self.demonstrated = self.helped = 0

    def run(self) -> None:
        while True:
            self._set_the_scene()
            self._press("right", "b")  # ready
            if self._wait(self._moves, 1.5):
                if self._wait(self._free, 1.0):
                    self.demonstrated += 1
                    self._drive()
                else:
                    self._watch()

    def _set_the_scene(self) -> None:
        """Wait until the robot stands at home; the leaders there, too."""
        while self._moves() or not self._at_home():
            time.sleep(PERIOD_S)
        while not self._free():
            self._press("left", "a", 1.3)
            self._wait(self._free, 1.0)
        for side in HOME:
            self._put(side, np.radians(HOME[side]))

    def _watch(self) -> None:
        """The policy drives: help when it takes too long, or comes no nearer."""
        self._nearest, self._nearest_at = np.inf, time.monotonic() + STUCK_S  # it takes a moment to begin
        self._wait(lambda: not self._moves() or self._comes_no_nearer(), PATIENCE_S)
        if not self._moves():
            return
        self._press("left", "a", 1.3)  # free
        for side in HOME:
            self._put(side, np.radians(self._rig.arms[side].joints))
        self._press("left", "a")
        if self._moves() and self._wait(self._free, 3.0):
            self.helped += 1
            self._drive()

    def _comes_no_nearer(self) -> bool:
        arms = self._rig.arms.items()
        off = max(np.abs(np.radians(arm.joints - HOME[side]) - GOAL[side])[:2].max() for side, arm in arms)
        if off < self._nearest - 0.02:
            self._nearest, self._nearest_at = off, max(time.monotonic(), self._nearest_at)
        return bool(off > 0.04) and time.monotonic() - self._nearest_at > STUCK_S

    def _drive(self) -> None:
        """To the goal, with a hand's inaccuracy, until the episode is over."""
        goal = {side: np.radians(HOME[side]) + GOAL[side] + self._rng.normal(0, 0.004, 6) for side in HOME}
        while self._free() and self._moves() and not self._returns(goal):
            for side in HOME:
                gap = goal[side] - self._at[side]
                self._put(side, self._at[side] + np.clip(gap, -HAND_SPEED * PERIOD_S, HAND_SPEED * PERIOD_S))
            time.sleep(PERIOD_S)

    def _returns(self, goal) -> bool:
        """The leaders are at the goal, and the robot goes home."""
        there = np.abs(goal["left"] - self._at["left"]).max() < 1e-3
        return there and np.abs(np.radians(self._rig.arms["left"].joints) - goal["left"]).max() > 0.2

    def _moves(self) -> bool:
        """The robot is sent commands."""
        return any(time.monotonic() - arm.commands[-1][0] < 0.6 for arm in self._rig.arms.values() if arm.commands)

    def _at_home(self) -> bool:
        return all(np.abs(arm.joints - HOME[side]).max() < 3.0 for side, arm in self._rig.arms.items())

    def _put(self, side: str, joints: np.ndarray) -> None:
        self._at[side] = joints
        self._leaders[side].put(joints, 1.0)

    def _free(self) -> bool:
        return all(leader.locked == {0} for leader in self._leaders.values())

    def _press(self, side: str, button: str, seconds: float = 0.1) -> None:
        self._leaders[side].pressed.add(button)
        time.sleep(seconds)
        self._leaders[side].pressed.discard(button)
        time.sleep(0.15)

    def _wait(self, condition, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline:
            time.sleep(PERIOD_S)
        return condition()


class Stream(http.server.BaseHTTPRequestHandler):
    """A network camera: motion JPEG of noise around a shade."""

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        rng = np.random.default_rng(0)
        try:
            while True:
                picture = io.BytesIO()
                Image.fromarray(rng.integers(90, 110, (120, 160, 3), np.uint8)).save(picture, "JPEG")
                head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {picture.tell()}\r\n\r\n"
                self.wfile.write(head.encode() + picture.getvalue() + b"\r\n")
                time.sleep(0.07)
        except OSError:
            return  # the actor closed the camera


def words(rig: DobotRig, port: int) -> list[str]:
    """What the actor's command line says of this lab."""
    said = ["task.env.camera_max_age_ms=3000", "task.env.feedback_max_age_ms=1000", "task.operator.max_age_ms=2000"]
    for side, arm in rig.arms.items():
        said += [f"task.env.arms.{side}.{key}={value}" for key, value in arm.node.items()]
        said.append(f"task.env.arms.{side}.gripper.port={rig.grippers[side].port}")
        said.append(f"task.operator.arms.{side}.port={rig.leaders[side].port}")
    for camera in CAMERAS:
        said.append(f"task.env.cameras.{camera}.source=http://127.0.0.1:{port}/{camera}.mjpg")
        said += [f"task.env.cameras.{camera}.width=160", f"task.env.cameras.{camera}.height=120"]
    return said


def serve_cameras() -> int:
    """Their port, until the process ends."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stream)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_port


def main(folder: Path) -> None:
    """Until stdin is closed."""
    with DobotRig(folder) as rig:
        person = Person(rig)
        person.start()
        print(*words(rig, serve_cameras()), flush=True)
        sys.stdin.read()
        fastest = {side: np.radians(arm.fastest).round(2).tolist() for side, arm in rig.arms.items()}
        print(f"demonstrated {person.demonstrated} helped {person.helped} fastest {fastest}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
