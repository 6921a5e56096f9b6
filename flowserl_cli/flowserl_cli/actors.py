"""run_actors.sh behind the bootstrap: several actors without a person, kept alive, each with a name of its own.

    run_actors.sh 8 ip=gpu-box            ─▶ <name>-0 … <name>-7, started again when they die, lines prefixed
    run_actors.sh 8 --hosts sim1,sim2 …   ─▶ 8 on each, by ssh in a tmux session there; --stop ends them

One terminal has no keys for many robots: `operator=` of a person's device is refused. A host needs this
checkout at the same place, ssh without a password, tmux, and with security.keys_dir its keys: nothing is copied there.
"""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flowserl_cli.sides import USER_MISTAKE, Side, Stopper

USAGE = """run_actors.sh COUNT [--hosts NAME,NAME|FILE] [--dry-run] [--stop] [overrides]
  COUNT        actors on this machine, or on each host; named <unique_identifier>-<host>-<number>
  --hosts      names for ssh, or a file with one a line: COUNT actors on each, in a tmux session that outlives ours
  --stop       with --hosts: end those sessions (the run's: run=<name>)
  --dry-run    print what would be run
  overrides    as for run_actor.sh: ip= task= run= …"""
PERSONS = ("keyboard", "gamepad", "spacemouse", "browser")  # operator=: devices of one person
SECONDS_APART = 0.5  # between two starts: each imports a simulator


@dataclass(frozen=True, slots=True)
class Asked:
    """The command line."""

    count: int
    hosts: tuple[str, ...]
    dry_run: bool
    stop: bool
    words: tuple[str, ...]

    @classmethod
    def read(cls, argv: Sequence[str]) -> "Asked":
        """ValueError says what is wrong with it."""
        words, hosts, rest = [], (), list(argv)
        flags = {"--dry-run": False, "--stop": False}
        count = rest.pop(0) if rest else ""
        if not count.isdigit() or not 1 <= int(count) <= 256:
            raise ValueError(f"expected how many actors, 1 to 256, got {count or 'nothing'!r}\n{USAGE}")
        while rest:
            word = rest.pop(0)
            if word in flags:
                flags[word] = True
            elif word == "--hosts" or word.startswith("--hosts="):
                hosts = named(word.partition("=")[2] or (rest.pop(0) if rest else ""))
            elif word.startswith("-") and "=" not in word:
                raise ValueError(f"unknown flag {word!r}\n{USAGE}")
            else:
                words.append(word)
        if device := next((w for w in words if w.startswith("operator=") and w.partition("=")[2] in PERSONS), None):
            raise ValueError(
                f"{device}: one person's device cannot help several actors; start that one by run_actor.sh"
            )
        if flags["--stop"] and not hosts:
            raise ValueError("--stop: expected --hosts, whose sessions it ends; here Ctrl-C ends the actors")
        task = os.environ.get("TASK", "pick")  # as run_actor.sh takes it
        return cls(int(count), hosts, flags["--dry-run"], flags["--stop"], (f"task={task}", f"run={task}", *words))


def named(text: str) -> tuple[str, ...]:
    """Hosts of `a,b`, or of a file with one a line; # begins a remark. ValueError where there is none."""
    path = Path(text)
    lines = path.read_text().splitlines() if text and path.is_file() else text.split(",")
    hosts = tuple(name for line in lines if (name := line.partition("#")[0].strip()))
    if not hosts or any(name.startswith("-") or len(name.split()) > 1 for name in hosts):
        raise ValueError(f"--hosts: expected names such as sim1,sim2, or a file with one a line, got {text!r}")
    return hosts


def names(words: Sequence[str], count: int, host: str) -> list[str]:
    """Identifiers of the actors of a host: a spool, a ledger and lines each."""
    given = [word.partition("=")[2] for word in words if word.startswith("unique_identifier=")]
    base = given[-1] if given else "actor"
    return [f"{base}-{host.replace('.', '-').rpartition('@')[2]}-{number}" for number in range(count)]


def main(argv: Sequence[str]) -> int:
    """Run, show or stop them; the exit code."""
    try:
        asked = Asked.read(argv)
    except ValueError as error:
        print(f"run_actors: {error}", file=sys.stderr)
        return USER_MISTAKE
    if asked.hosts:
        return on_hosts(asked)
    ids = names(asked.words, asked.count, socket.gethostname().partition(".")[0])
    if asked.dry_run:
        for name in ids:
            print(shlex.join(["bash", "run_actor.sh", *asked.words, f"unique_identifier={name}"]))
        return 0
    sides = [Side("actor", [*asked.words, f"unique_identifier={name}"], Path.cwd(), True, label=name) for name in ids]
    return keep_all(sides, Stopper(signal.SIGUSR1))


def keep_all(sides: Sequence[Side], stopper: Stopper, leads: Side | None = None) -> int:
    """Until each is over for good, or `leads` is: 0 when all went well, else the first other code. A mistake of the
    user ends them all."""
    passed = 0
    for side in sides:
        if stopper.signum is None:
            side.start()
            time.sleep(SECONDS_APART)
    try:
        while any([side.tick() is None for side in sides]):
            for signum in stopper.came[passed:]:
                passed += 1
                for side in sides:
                    side.pass_on(signum)
            if (leads and leads.final is not None) or USER_MISTAKE in [side.final for side in sides]:
                break
            time.sleep(0.1)
    finally:
        codes = [side.final for side in sides]
        for side in reversed(sides):
            side.stop()
    return (leads.final if leads and leads.final is not None else None) or next((code for code in codes if code), 0)


def on_hosts(asked: Asked) -> int:
    """The same command on each host, in a tmux session of the run's name; the exit code."""
    failed = []
    for host, command in commands(asked).items():
        if asked.dry_run:
            print(shlex.join(command))
            continue
        done = subprocess.run(command, check=False)
        print(
            f"{host}: {'failed, see above' if done.returncode else 'stopped' if asked.stop else 'started'}", flush=True
        )
        failed += [host] if done.returncode else []
    return 1 if failed else 0


def commands(asked: Asked) -> dict[str, list[str]]:
    """What ssh is told, by host."""
    folder = Path.cwd()
    run = next(word.partition("=")[2] for word in reversed(asked.words) if word.startswith("run="))
    session = f"flowserl-{run}".replace(".", "-")
    found = {}
    for host in asked.hosts:
        base = names(asked.words, 1, host)[0].removesuffix("-0")
        own = [word for word in asked.words if not word.startswith("unique_identifier=")]
        line = shlex.join(["bash", "run_actors.sh", str(asked.count), *own, f"unique_identifier={base}"])
        new = ["tmux", "new-session", "-d", "-s", session, "-c", str(folder), line]
        kill = ["tmux", "kill-session", "-t", session]
        found[host] = ["ssh", "-o", "BatchMode=yes", host, shlex.join(kill if asked.stop else new)]
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
