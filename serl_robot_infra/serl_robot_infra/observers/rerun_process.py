"""rerun in a process of its own: it waits without end for a viewer that does not read, also at the exit.

    rerun_log.RerunObserver ─▶ stdin, pickled (method, arguments) ─▶ Recording ─▶ viewer or .rrd file

Started by rerun_log as `python -m …rerun_process TARGET`, a viewer's URL or a file. Ends at the end of stdin, and when
the actor is gone.
"""

import os
import pickle
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

QUALITY = 80  # JPEG's
LEFT_S = 5.0  # for the rest, once the actor is gone
FLUSH_S = 2.0


class Recording:
    """What a viewer is sent. target: `rerun+http://…` or the path of an .rrd file."""

    def __init__(self, target: str) -> None:
        import rerun

        rerun.unregister_shutdown()  # it would wait for the viewer
        self._rerun, self._to_file = rerun, not target.startswith("rerun+")
        self._stream = rerun.RecordingStream("flowserl")
        if self._to_file:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            self._stream.save(target)
        else:
            self._stream.connect_grpc(target)

    def lay_out(self, cameras: list[str]) -> None:
        """Pictures on the left; on the right action and plan over each other, state, reward and driver, the log."""
        views = self._rerun.blueprint
        pictures = [views.Spatial2DView(origin=f"camera/{name}", name=name) for name in cameras]
        series = [
            views.TimeSeriesView(contents=["action/**", "planned/**"], name="action and plan"),
            views.TimeSeriesView(origin="state", name="state"),
            views.TimeSeriesView(contents=["reward", "return", "operator"], name="reward and driver"),
            views.TextLogView(origin="episode", name="episodes"),
        ]
        columns = [views.Vertical(*pictures)] if pictures else []
        self._stream.send_blueprint(views.Blueprint(views.Horizontal(*columns, views.Vertical(*series))))

    def text(self, text: str) -> None:
        """A line of the log of episodes."""
        self._stream.log("episode", self._rerun.TextLog(text))

    def tick(self, tick: int, images: dict[str, np.ndarray], values: dict[str, float]) -> None:
        """One tick: uint8[h, w, 3] by camera, and numbers by entity."""
        self._stream.set_time("tick", sequence=tick)
        for camera, image in images.items():
            self._stream.log(f"camera/{camera}", self._rerun.Image(image).compress(jpeg_quality=QUALITY))
        for entity, value in values.items():
            self._stream.log(entity, self._rerun.Scalars(value))

    def plan(self, tick: int, chunk: dict[str, np.ndarray]) -> None:
        """A chunk's actions at the ticks that they were planned for: float[n] by name. Where chunks overlap both are
        there.
        """
        for name, values in chunk.items():
            times = [self._rerun.TimeColumn("tick", sequence=np.arange(tick, tick + len(values)))]
            self._stream.send_columns(f"planned/{name}", times, self._rerun.Scalars.columns(scalars=values))

    def close(self) -> None:
        """Send what is buffered; a file gets its footer."""
        self._stream.flush(timeout_sec=FLUSH_S)
        if self._to_file:
            self._stream.disconnect()


def main(target: str) -> int:
    """Calls from stdin until its end; the exit status."""
    actor = os.getppid()
    threading.Thread(target=_leave_with, args=(actor,), daemon=True).start()
    recording: Any = Recording(target)
    while True:
        try:
            method, arguments = pickle.load(sys.stdin.buffer)  # of the actor that started this process
        except EOFError:
            break
        getattr(recording, method)(*arguments)
    recording.close()
    sys.stdout.flush()
    os._exit(0)  # rerun's threads are not waited for


def _leave_with(actor: int) -> None:
    while os.getppid() == actor:
        time.sleep(1.0)
    time.sleep(LEFT_S)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
