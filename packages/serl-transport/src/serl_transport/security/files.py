"""Files that say who may do what must be in nobody else's hands: refused by name, with the chmod that mends it.

Called by whoever reads a key, an allow-list or the tickets' secret. As for sshd, the group counts as others.
"""

import stat
from pathlib import Path


def check_unwritable(path: Path) -> None:
    """ValueError when others may change or replace this file; OSError when it is not there."""
    for place in (path, path.parent):
        mode = stat.S_IMODE(place.stat().st_mode)
        if mode & 0o022:
            raise ValueError(f"{place} can be written by others (mode {mode:04o}): chmod go-w {place}")


def check_private(path: Path) -> None:
    """ValueError when others may read this file, change it or replace it; OSError when it is not there."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ValueError(f"{path} can be read by others (mode {mode:04o}): chmod 600 {path}, or make a new one")
    check_unwritable(path)
