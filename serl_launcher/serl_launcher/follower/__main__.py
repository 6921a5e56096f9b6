"""`python -m serl_launcher.follower <run_dir>`: follow the gateway of config.yaml's launch.main_host until SIGTERM.

Exit codes: 0 after a signal; 2 where it cannot work, said in one line: another run's journal or config, a mistake of
the user, a gateway that was silent for follower.patience_s.
"""

import logging
import signal
import sys
from contextlib import ExitStack, closing
from pathlib import Path

from serl_launcher.follower.follower import Follower, GatewayGoneError
from serl_launcher.follower.settings import FollowerSettings
from serl_launcher.replay.entries import SpecChangedError
from serl_launcher.replay.journal_writer import RunFolderBusyError
from serl_launcher.replay.ring import RingError
from serl_launcher.run.alive import beat
from serl_launcher.run.config import read_config
from serl_launcher.run.first_host import follower_client
from serl_launcher.run.paths import RunPaths
from serl_transport.contract.errors import WireError

log = logging.getLogger("follower")
MISTAKES = (ValueError, RunFolderBusyError, RingError, SpecChangedError, WireError, GatewayGoneError)


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        print("usage: python -m serl_launcher.follower <run_dir>", file=sys.stderr)
        return 2
    form = "%(asctime)s %(name)s %(levelname).1s %(message)s"
    logging.basicConfig(level=logging.INFO, format=form, datefmt="%H:%M:%S")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))  # at any moment: what is on disk is whole
    paths = RunPaths(Path(argv[0]))
    try:
        cfg = read_config(paths.config)
        settings = FollowerSettings.of(cfg)
        with ExitStack() as stack:
            client = follower_client(cfg, wait)
            stack.callback(client.stop)
            stack.enter_context(closing(Follower(settings, paths, client))).run()
    except MISTAKES as mistake:
        print(f"follower: {getattr(mistake, 'message', None) or mistake}", file=sys.stderr)
        return 2
    return 0


def wait(message: str) -> None:
    """The gateway is not there yet."""
    beat()
    log.warning("%s", message)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
