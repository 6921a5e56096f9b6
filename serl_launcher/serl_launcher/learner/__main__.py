"""`python -m serl_launcher.learner <run_dir>`: the trainer as a process, until every stage is done or SIGTERM.

One of several (RANK, WORLD_SIZE) when supervisor.several starts it: rank 0 is the trainer, and SIGTERM is for it alone;
the others follow it to the end. Exit 0: done or stopped. Exit 2: a mistake in config or checkpoint, said in one line.
"""

import logging
import os
import signal
import sys
from contextlib import closing
from pathlib import Path

from hydra.errors import InstantiationException

from serl_config.mistakes import is_config_mistake, mistake_message
from serl_launcher.learner.wiring import build_trainer
from serl_launcher.replay.followed_ring import BehindError
from serl_launcher.run.config import read_config
from serl_launcher.run.internal import InternalClient
from serl_launcher.run.paths import RunPaths

log = logging.getLogger("trainer")


def main(run_dir: str) -> int:
    rank = int(os.environ.get("RANK", "0"))
    name = f" rank {rank}" if rank else ""
    level = logging.WARNING if rank else logging.INFO  # what all do is told once
    logging.basicConfig(level=level, format=f"%(asctime)s %(name)s{name} %(message)s", datefmt="%H:%M:%S")
    paths = RunPaths(Path(run_dir))
    if rank:
        if os.environ.get("GROUP_RANK", "0") == "0":  # another host that is stopped has nobody who would say the end
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return _run(paths, None)
    with closing(InternalClient(paths.root, "trainer")) as gateway:
        return _run(paths, gateway)


def _run(paths: RunPaths, gateway: InternalClient | None) -> int:
    try:
        trainer = build_trainer(read_config(paths.config), paths, gateway)
    except (ValueError, FileNotFoundError, InstantiationException) as mistake:
        if not is_config_mistake(mistake):
            raise
        log.debug("where it came from", exc_info=True)
        print(f"trainer: {mistake_message(mistake)}", file=sys.stderr)
        return 2
    if gateway is not None:
        signal.signal(signal.SIGTERM, lambda *_: trainer.stop())
    try:
        trainer.run()
    except BehindError as late:
        print(f"trainer: {late}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
