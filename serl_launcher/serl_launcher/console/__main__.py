"""`python -m serl_launcher.console <run_dir>`: serve the page of this run until SIGTERM or SIGINT. A derived role.

Exit codes: 0 after a signal, 2 for a mistake of the user (said in one line).
"""

import asyncio
import logging
import signal
import sys
from pathlib import Path

from serl_launcher.console.app import Console
from serl_launcher.console.operator import ConsoleOperator
from serl_launcher.run import console
from serl_launcher.run.config import read_config
from serl_launcher.run.paths import RunPaths
from serl_launcher.run.ready import say_ready


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        print("usage: python -m serl_launcher.console <run_dir>", file=sys.stderr)
        return 2
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(name)s %(levelname).1s %(message)s", datefmt="%H:%M:%S"
    )
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)  # each line would hold the word that opens the page
    paths = RunPaths(Path(argv[0]))
    try:
        cfg = read_config(paths.config, "console")
        asyncio.run(_serve(Console(cfg, paths, console.read(paths), ConsoleOperator.of(cfg))))
    except (ValueError, OSError) as mistake:
        print(f"console: {mistake}", file=sys.stderr)
        return 2
    return 0


async def _serve(page: Console) -> None:
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    async with page.listening() as tasks:
        say_ready()
        signalled = asyncio.create_task(ended.wait())
        done, _ = await asyncio.wait([signalled, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in done - {signalled}:
            task.result()  # it failed: end with its traceback, and be started again


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
