"""What people at the learner's console see of this actor: small pictures and what goes on, while somebody looks.

    loop ─▶ LiveObserver keeps references ─▶ thread, every PERIOD_S while link.watched ─▶ request `live` ─▶ gateway

The loop pays a few assignments a tick. The thread shrinks and encodes; what it cannot send it leaves out: the next
picture is a moment away.
"""

import io
import math
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from serl_robot_infra.link import LearnerLink
from serl_robot_infra.observers.base import EpisodeReport, Observer
from serl_robot_infra.observers.console import Vitals
from serl_transport.contract.errors import WireError
from serl_transport.contract.schema import EpisodeInfo, Observation, TimeStep

PERIOD_S = 0.2
UNWATCHED_S = 0.5  # between two looks whether somebody looks
AGAIN_S = 1.0  # after a learner that did not take one
SIDE, QUALITY = 160, 60  # of a picture: its longer side at most, pixels, and JPEG's quality
SAID_S = 3.0  # a message is shown for so long; what lasts is said again
_TIMEOUT_MS = 1000


class LiveObserver(Observer):
    """vitals: asked for each picture. Ends with `close`."""

    def __init__(self, link: LearnerLink, vitals: Callable[[], Vitals]) -> None:
        self._link, self._vitals = link, vitals
        self._info: EpisodeInfo | None = None
        self._seen: Observation | None = None
        self._ticks, self._return, self._started = 0, 0.0, 0.0
        self._driver: str | None = None  # operator | policy; None: nobody drives now
        self._person: str | None = None  # by name, where an operator drives
        self._said, self._said_at = "", -SAID_S
        self._trouble: str | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="live", daemon=True).start()

    def episode_started(self, info: EpisodeInfo) -> None:
        self._info, self._ticks, self._return = info, 0, 0.0

    def tick(self, step: TimeStep) -> None:
        """Keep the picture, which nobody can write to any more, and count."""
        if not self._ticks:
            self._started = time.monotonic()
        self._seen, self._driver, self._trouble = step.observation, "operator" if step.intervention else "policy", None
        self._person = step.driver
        self._ticks += 1
        self._return += step.reward

    def episode_ended(self, report: EpisodeReport, last_observation: Observation | None) -> None:
        self._driver, self._person, self._info = None, None, None
        self._seen = last_observation or self._seen

    def message(self, text: str) -> None:
        self._said, self._said_at = text, time.monotonic()

    def ask(self, text: str) -> None:
        self.message(text)

    def trouble(self, text: str | None) -> None:
        self._trouble = text

    def close(self) -> None:
        """End the thread; not waited for."""
        self._ended.set()

    def _run(self) -> None:
        pause = 0.0
        while not self._ended.wait(pause):
            pause = self._look()

    def _look(self) -> float:
        """Send one where somebody looks; how long to wait until the next."""
        if not self._link.watched:
            return UNWATCHED_S
        started = time.monotonic()
        try:
            self._link.request("live", self.body(), timeout_ms=_TIMEOUT_MS)
        except WireError:  # the console shows how old its pictures are
            return AGAIN_S
        return max(0.0, PERIOD_S - (time.monotonic() - started))

    def body(self) -> dict[str, Any]:
        """One `live` (docs/contracts/requests.md): the newest picture of each camera, and what goes on."""
        info, seen, vitals = self._info, self._seen, self._vitals()
        running = info is not None and self._ticks
        lately = time.monotonic() - self._said_at < SAID_S
        return {
            "pictures": {} if seen is None else {name: small_jpeg(image) for name, image in seen.images.items()},
            "episode": info.episode_id if info else None,
            "stage": info.stage if info else None,
            "mode": info.mode if info else None,
            "driver": self._driver,
            "person": self._person,
            "says": self._trouble or (self._said if lately else None),
            "tick": self._ticks if info else None,
            "return": round(self._return, 3) if info else None,
            "hz": round(self._ticks / max(time.monotonic() - self._started, 1e-3), 1) if running else None,
            "infer_ms": vitals.infer_p50_ms,
            "overruns": vitals.overruns,
            "refused": vitals.refused,
            "backlog": vitals.backlog,
        }


def small_jpeg(image: np.ndarray) -> bytes:
    """A JPEG of uint8[h, w, 3], its longer side at most SIDE pixels."""
    picture = Image.fromarray(image)
    if (factor := math.ceil(max(picture.size) / SIDE)) > 1:
        picture = picture.reduce(factor)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()
