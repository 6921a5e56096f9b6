"""Which code runs here: the commit, and each file that differs from it, untracked ones included. Called by run.record.

    git ─▶ commit, changed and untracked files with their sha256 ─▶ digest: the same digest is the same code
        └▶ patch(): the changes themselves, as `git apply` takes them on top of the commit

Without git (a copied tree, no git installed) the digest is over the project's own source files, and `problem` says so.
What git is told to ignore (keys/, .env, runs/) is looked at by nobody. Torch-free.
"""

import hashlib
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]  # the checkout
CODE = (".py", ".yaml", ".yml", ".sh", ".toml")  # of an untracked file: goes into the patch
MAX_FILES = 300  # changed files that are named
MAX_FILE_BYTES = 16 << 20  # larger ones are known by their size alone
MAX_PATCH_BYTES = 4 << 20
_GIT_S = 20.0


@dataclass(frozen=True, slots=True)
class Revision:
    """The code of a checkout at one moment."""

    commit: str | None  # 40 hex digits; None: not known
    changed: dict[str, str]  # file -> sha256 of what stands there now, `removed`, or `<n> bytes` of a large one
    digest: str  # of commit and changes, 16 hex digits
    problem: str | None = None  # why the commit is not known, or not all of it

    def __str__(self) -> str:
        """`3fa9c1d2e4f5+2 changed`, for tables."""
        commit = self.commit[:12] if self.commit else f"code {self.digest[:12]}"
        return f"{commit}+{len(self.changed)} changed" if self.changed else commit


def revision(root: Path = ROOT) -> Revision:
    """Of a checkout. Never raises: what cannot be found out is said in `problem`."""
    try:
        commit = _git(root, "rev-parse", "HEAD").decode().strip()
        names = _changed_files(root)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError) as error:
        return Revision(None, {}, _digest_of_sources(root), f"git: {_said(error)}")
    changed = {name: _content(root / name) for name in names[:MAX_FILES]}
    problem = f"{len(names) - MAX_FILES} more changed files are not named" if len(names) > MAX_FILES else None
    text = commit + "".join(f"\n{name} {content}" for name, content in changed.items())
    return Revision(commit, changed, hashlib.sha256(text.encode()).hexdigest()[:16], problem)


def patch(root: Path = ROOT) -> bytes | None:
    """What was changed since the commit, untracked source files included; None where it is not known or too much."""
    try:
        parts = [_git(root, "diff", "HEAD", "--binary", "--no-color", "--no-ext-diff", "--no-textconv")]
        for name in _untracked(root):
            path = root / name
            if path.suffix in CODE and path.is_file() and path.stat().st_size <= MAX_PATCH_BYTES:
                parts.append(_git(root, "diff", "--no-index", "--no-color", "--", os.devnull, name, good=(0, 1)))
    except (OSError, subprocess.SubprocessError):
        return None
    whole = b"".join(parts)
    return whole if len(whole) <= MAX_PATCH_BYTES else None


def _changed_files(root: Path) -> list[str]:
    """Paths relative to the checkout, of what differs from the commit and of what git does not know."""
    tracked = _git(root, "diff", "HEAD", "--name-only", "--no-renames", "-z")
    return sorted({*_names(tracked), *_untracked(root)})


def _untracked(root: Path) -> list[str]:
    return _names(_git(root, "ls-files", "--others", "--exclude-standard", "-z"))


def _names(raw: bytes) -> list[str]:
    return [name.decode(errors="surrogateescape") for name in raw.split(b"\0") if name]


def _content(path: Path) -> str:
    if path.is_symlink() or not path.is_file():
        return "removed" if not os.path.lexists(path) else "no file"
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        return f"{size} bytes"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest_of_sources(root: Path) -> str:
    digest = hashlib.sha256()
    for folder in ("config", "examples", "flowserl_cli", "packages", "serl_launcher", "serl_robot_infra"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in CODE and path.is_file():
                digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _git(root: Path, *words: str, good: Sequence[int] = (0,)) -> bytes:
    command = ["git", "-c", "core.quotepath=off", "-c", "core.fsmonitor=false", *words]
    env = os.environ | {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, timeout=_GIT_S, check=False)
    if done.returncode not in good:
        raise subprocess.CalledProcessError(done.returncode, "git", done.stdout, done.stderr)
    return done.stdout


def _said(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = (error.stderr or b"").decode(errors="replace").strip().splitlines()
        return lines[0] if lines else f"exit code {error.returncode}"
    return "is not installed" if isinstance(error, FileNotFoundError) else str(error)
