#!/usr/bin/env python
"""Steer a running learner: pause, resume, publish, stop, or look at its status.

    python tools/operate.py pause --ip 10.0.0.5 --keys keys --name alice
    python tools/operate.py status

pause: actors wait between episodes. publish: the trainer publishes its parameters now. stop: the run ends as if its
schedule were done. With keys, only a name with role operator in the learner's allow-list may do more than look.
"""

import argparse
import json
import sys

from serl_transport import TrainerClient, TrainerConfig
from serl_transport.contract.errors import WireError

REQUESTS = ("pause", "resume", "publish", "stop", "status")


def main(argv: list[str] | None = None) -> int:
    """Exit 0 when the learner did it, 1 when it refused or is silent, 2 on a mistake here."""
    parser = argparse.ArgumentParser(description="Steer a running learner.")
    parser.add_argument("request", choices=REQUESTS)
    parser.add_argument("--ip", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5588)
    parser.add_argument("--broadcast-port", type=int, default=5589)
    parser.add_argument("--keys", help="folder with learner.public and <name>.secret")
    parser.add_argument("--name", default="operator", help="as in the learner's allow-list")
    args = parser.parse_args(argv)
    try:
        reply = ask(args)
    except ValueError as mistake:
        print(f"operate: {mistake}", file=sys.stderr)
        return 2
    except WireError as refusal:
        print(f"operate: {refusal.code}: {refusal.message}", file=sys.stderr)
        return 1
    print(json.dumps(reply, indent=1))
    return 0


def ask(args: argparse.Namespace) -> dict:
    """One request. Raises the learner's typed refusal, ServerSilent or ValueError."""
    config = TrainerConfig(port_number=args.port, broadcast_port=args.broadcast_port, keys_dir=args.keys)
    client = TrainerClient(args.name, args.ip, config, role="operator", wait_for_server=False)
    try:
        return client.request(args.request)
    finally:
        client.stop()


if __name__ == "__main__":
    sys.exit(main())
