"""`python -m serl_launcher.gateway <run_dir>`: read config.yaml, serve until SIGTERM or SIGINT.

Exit codes: 0 after a signal, 1 when the authenticator failed (the supervisor starts it again), 2 for a mistake of the
user (said in one line).
"""

import logging
import signal
import sys
from pathlib import Path

from serl_launcher.gateway.app import Gateway
from serl_launcher.gateway.settings import GatewaySettings
from serl_launcher.replay.journal import JournalCorrupt
from serl_launcher.replay.journal_writer import RunFolderBusyError
from serl_launcher.replay.ring import RingError
from serl_launcher.run.paths import RunPaths
from serl_launcher.run.ready import say_ready
from serl_transport.contract.errors import CannotListen, StorageFull

MISTAKES = (ValueError, OSError, RunFolderBusyError, CannotListen, JournalCorrupt, RingError, StorageFull)


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        print("usage: python -m serl_launcher.gateway <run_dir>", file=sys.stderr)
        return 2
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(name)s %(levelname).1s %(message)s", datefmt="%H:%M:%S"
    )
    paths = RunPaths(Path(argv[0]))
    try:
        gateway = Gateway(GatewaySettings.load(paths.config), paths)
    except MISTAKES as mistake:
        print(f"gateway: {mistake}", file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda signum, frame: gateway.stop())
    gateway.server.call_soon(say_ready)
    gateway.run()
    return 1 if gateway.server.failure else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
