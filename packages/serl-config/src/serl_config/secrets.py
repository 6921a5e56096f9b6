"""Secrets in a config: which keys hold one, where a reference finds it, and the config as it may be shown to others.

token: env:NAME | file:PATH | the word itself ─▶ secret() ─▶ the word, in the process that needs it
without_secrets(config) ─▶ whatever leaves the machine (W&B)
literal_secrets(config) ─▶ keys whose words stand in the config: its file is then for its owner alone
"""

import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_NAMES = re.compile(r"(^|_)(token|secret|password|passwd|api_?key|credentials?|private_key)s?$", re.IGNORECASE)
_COUNTS = re.compile(r"_tokens$")  # prompt_tokens: a number of them
_REFERENCES = ("env:", "file:")
HIDDEN = "(hidden)"


def secret(value: Any, key: str) -> str | None:
    """The secret that `value` of the dotted `key` means; None for none.

    Raises ValueError, which never holds the secret, when a reference leads nowhere or to a file that others may read.
    """
    if value is None:
        return None
    kind, _, where = str(value).partition(":")
    if kind == "env":
        word = os.environ.get(where)
        if not word:
            raise ValueError(f"{key}=env:{where}: the environment has no {where}, or an empty one")
        return word
    if kind == "file":
        path = Path(where).expanduser()
        check_private(path, key)
        if not (word := path.read_text(encoding="utf-8").strip()):
            raise ValueError(f"{key}=file:{where}: the file is empty")
        return word
    return str(value)


def check_private(path: Path, key: str, others: int = 0o077) -> None:
    """ValueError unless `path` is a file whose mode has none of the bits in `others`."""
    if not path.is_file():
        raise ValueError(f"{key}: no file {path}")
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & others:
        raise ValueError(f"{key}: {path} can be read by others (mode {mode:04o}): chmod 600 {path}")


def without_secrets(node: Any) -> Any:
    """A copy of plain containers in which every word under a key of a secret is hidden; references may stay."""
    if isinstance(node, Mapping):
        return {key: _hide(value) if _is_secret(key) else without_secrets(value) for key, value in node.items()}
    if isinstance(node, Sequence) and not isinstance(node, str | bytes):
        return [without_secrets(value) for value in node]
    return node


def literal_secrets(node: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys under which a secret itself stands, not a reference."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            where = f"{prefix}{key}"
            if _is_secret(key) and _hide(value) != value:
                yield where
            elif not _is_secret(key):
                yield from literal_secrets(value, f"{where}.")
    elif isinstance(node, Sequence) and not isinstance(node, str | bytes):
        for index, value in enumerate(node):
            yield from literal_secrets(value, f"{prefix}{index}.")


def _is_secret(key: Any) -> bool:
    return bool(_NAMES.search(str(key))) and not _COUNTS.search(str(key))


def _hide(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _hide(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_hide(inner) for inner in value]
    if value is None or isinstance(value, bool) or str(value).startswith(_REFERENCES):
        return value
    return HIDDEN
