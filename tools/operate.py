#!/usr/bin/env python
"""Say what a running learner is to do, or look at it: docs/operating.md has what each act does.

    python tools/operate.py pause [--actor robot-1]          resume [--actor robot-1]
    python tools/operate.py training_pause                   training_resume
    python tools/operate.py verdict EPISODE reject           accept | reject | success | failure | discard | clear
    python tools/operate.py serve 12                         latest: the newest again
    python tools/operate.py set trainer.max_steps_per_tick 1.5
    python tools/operate.py end_stage | publish | stop | status | log

EPISODE is an episode_id of episodes.jsonl or its ordinal. Each act is kept in runs/<name>/acts.jsonl, with who and
when, before this tool says that it is done; `log` lists them. With keys (--keys keys --name alice), only a name with
role operator in the learner's allow-list may do more than look. Exit codes: 0 done, 1 refused or silent, 2 a mistake.
"""

import argparse
import json
import sys
import uuid
from typing import Any

from serl_transport import TrainerClient, TrainerConfig
from serl_transport.contract.bounds import printable
from serl_transport.contract.errors import WireError
from serl_transport.contract.people import who

REPLY_MS = 60_000  # `serve` compares the checksum of a version, which may be large


def main(argv: list[str] | None = None) -> int:
    """Exit 0 when the learner did it, 1 when it refused or is silent, 2 on a mistake here."""
    args = parse(argv)
    try:
        payload = payload_of(args)
        reply = ask(args, payload)
    except ValueError as mistake:
        print(f"operate: {mistake}", file=sys.stderr)
        return 2
    except WireError as refusal:
        print(f"operate: {refusal.code}: {refusal.message}", file=sys.stderr)
        return 1
    print("\n".join(map(line, reply["acts"])) if args.request == "log" else json.dumps(reply, indent=1))
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--ip", default="127.0.0.1")
    common.add_argument("--port", type=int, default=5588)
    common.add_argument("--broadcast-port", type=int, default=5589)
    common.add_argument("--keys", help="folder with learner.public and <name>.secret")
    common.add_argument("--name", default="operator", help="as in the learner's allow-list")
    common.add_argument("--person", help="who asks, for the ledger; default: FLOWSERL_OPERATOR, else the login")
    common.add_argument("--id", help="of the act: the same id is not done twice, however often it is sent")
    requests = parser.add_subparsers(dest="request", required=True)
    for name in ("pause", "resume"):
        requests.add_parser(name, parents=[common]).add_argument("--actor", help="one unique_identifier; default: all")
    for name in ("training_pause", "training_resume", "publish", "stop", "status", "log"):
        requests.add_parser(name, parents=[common])
    requests.add_parser("end_stage", parents=[common]).add_argument("--stage", help="refused when another one goes on")
    verdict = requests.add_parser("verdict", parents=[common])
    verdict.add_argument("episode")
    verdict.add_argument("word")
    requests.add_parser("serve", parents=[common]).add_argument("version", help="a number, or latest")
    change = requests.add_parser("set", parents=[common])
    change.add_argument("key")
    change.add_argument("value", help="as JSON: 1.5, true, null, a word")
    return parser.parse_args(argv)


def payload_of(args: argparse.Namespace) -> dict[str, Any]:
    """What the request carries. ValueError for a word that cannot be meant."""
    if args.request in ("status", "log"):
        return {}
    act = {"id": args.id or uuid.uuid4().hex, "person": who(args.person, "--person")}
    match args.request:
        case "pause" | "resume":
            return act | ({"actor": args.actor} if args.actor else {})
        case "end_stage":
            return act | ({"stage": args.stage} if args.stage else {})
        case "verdict":
            return act | {
                "episode_id": int(args.episode) if args.episode.isdigit() else args.episode,
                "word": args.word,
            }
        case "serve":
            if args.version != "latest" and not args.version.isdigit():
                raise ValueError(f"serve: expected a version's number or latest, got {args.version!r}")
            return act | {"version": None if args.version == "latest" else int(args.version)}
        case "set":
            return act | {"key": args.key, "value": _value(args.value)}
    return act


def _value(word: str) -> Any:
    try:
        return json.loads(word)
    except ValueError:
        return word


def ask(args: argparse.Namespace, payload: dict[str, Any]) -> dict[str, Any]:
    """One request. Raises the learner's typed refusal, ServerSilent or ValueError."""
    config = TrainerConfig(port_number=args.port, broadcast_port=args.broadcast_port, keys_dir=args.keys)
    client = TrainerClient(args.name, args.ip, config, role="operator", wait_for_server=False)
    try:
        return client.request("acts" if args.request == "log" else args.request, payload, timeout_ms=REPLY_MS)
    finally:
        client.stop()


def line(act: dict[str, Any]) -> str:
    """An act of the ledger for people: number, time, who, what."""
    said = {key: value for key, value in act.items() if key not in ("n", "id", "time", "by", "act", "trains")}
    words = " ".join(f"{key}={json.dumps(value)}" for key, value in said.items())
    return printable(
        f"{act['n']:>5}  {act.get('time', '?'):29}  {act.get('by', '?'):12}  {act['act']} {words}".rstrip()
    )


if __name__ == "__main__":
    sys.exit(main())
