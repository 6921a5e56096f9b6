#!/usr/bin/env python
"""Make CURVE keys for a learner, its actors, its operators and its trainer's other hosts; see docs/security.md.

    python tools/keygen.py keys --actor robot-1 --actor robot-2 --operator alice

Writes keys/learner.{secret,public}, keys/<name>.secret and keys/allow_list, secrets with mode 0600. Nothing is ever
overwritten: a learner's pair that exists is kept, a name that exists is refused.
"""

import argparse
import os
import sys
from pathlib import Path

from serl_transport.security.allow_list import ROLES
from serl_transport.security.keys import LEARNER, KeyPair, read_secret, write_pair

HEADER = "# role name public-key; actor: push, infer, ask; operator: also pause, resume, stop; follower: read\n"


def main(argv: list[str] | None = None) -> int:
    """Exit 0, or 2 with one line on a mistake (nothing is written then)."""
    parser = argparse.ArgumentParser(description="Make CURVE keys: one pair per party, and the learner's allow-list.")
    parser.add_argument("folder", type=Path, help="where the keys go (security.keys_dir)")
    parser.add_argument("--actor", action="append", default=[], metavar="NAME", help="a unique_identifier")
    parser.add_argument("--operator", action="append", default=[], metavar="NAME", help="who may pause and stop")
    parser.add_argument("--follower", action="append", default=[], metavar="NAME", help="host-1, … of launch=nodes")
    args = parser.parse_args(argv)
    parties = [(role, name) for role in ROLES for name in getattr(args, role)]
    try:
        make(args.folder, parties)
    except (ValueError, OSError) as mistake:
        print(f"keygen: {mistake}", file=sys.stderr)
        return 2
    print(advice(args.folder, parties))
    return 0


def make(folder: Path, parties: list[tuple[str, str]]) -> None:
    """Write the files. ValueError before anything is written when a name is bad or taken."""
    names = [name for _, name in parties]
    for name in names:
        unfit = not name or name == LEARNER or name.startswith(".") or name.split() != [name]
        if unfit or any(c in name for c in "/\0*#"):
            raise ValueError(
                f"{name!r} cannot name an actor, operator or host: no spaces, '/', '*' or '#', not 'learner'"
            )
        if (folder / f"{name}.secret").exists() or names.count(name) > 1:
            raise ValueError(f"{name!r} has keys in {folder} already; remove them and their line in allow_list first")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if (folder / f"{LEARNER}.secret").exists():
        read_secret(folder / f"{LEARNER}.secret")
    else:
        write_pair(folder, LEARNER, KeyPair.new())
    lines = []
    for role, name in parties:
        pair = KeyPair.new()
        write_pair(folder, name, pair)
        lines.append(f"{role} {name} {pair.public.decode()}\n")
    add_lines(folder / "allow_list", lines)


def add_lines(path: Path, lines: list[str]) -> None:
    """Append to the allow-list in one step, so that a running learner never reads half of it."""
    text = path.read_text() if path.exists() else HEADER
    part = path.with_name(path.name + ".part")
    part.write_text(text + "".join(lines))
    part.chmod(0o644)  # whatever the umask says: a list that others can write is refused
    os.replace(part, path)


def advice(folder: Path, parties: list[tuple[str, str]]) -> str:
    """What to put where."""
    lines = [
        f"learner: learner.secret and allow_list stay in {folder}; start it with",
        f"    bind_host=0.0.0.0 security.keys_dir={folder}",
    ]
    for role, name in parties:
        use = f"unique_identifier={name} security.keys_dir=<that folder>"
        if role == "operator":
            use = f".venv/bin/python tools/operate.py pause --name {name} --keys <that folder> --ip <learner>"
        if role == "follower":
            use = "launch=nodes launch.machine_rank=<n> launch.main_host=<learner> security.keys_dir=<that folder>"
        lines += [f"{role} {name}: copy learner.public and {name}.secret to a folder on its machine (scp -p), then"]
        lines += [f"    {use}"]
    lines.append(f"Then delete what you copied away from {folder}, except learner.public: a secret has one home.")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
