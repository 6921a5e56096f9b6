"""`_console_watcher.py <run_dir>` asks the gateway for pictures as the console does while a page is open."""

import sys
import time

from serl_launcher.console.app import VIEW_S
from serl_launcher.run.internal import InternalClient

client, newest = InternalClient(sys.argv[1], "console"), 0
while True:
    told = client.call("views", {"since": newest})
    newest = max((view["number"] for view in told["actors"].values()), default=0)
    time.sleep(VIEW_S)
