"""Names of people: who drives, judges and asks. An actor's config, a page and tools/operate.py give them; records keep
them.
"""

import getpass
import os
from collections.abc import Iterable
from typing import Any

from serl_transport.contract.bounds import check_text, shown
from serl_transport.contract.errors import BadFrame

VARIABLE = "FLOWSERL_OPERATOR"
CHARACTERS = 64
PEOPLE = 16  # of one batch at most
SCRIPT = "script"  # drives where an operator is none of flesh


def check_person(key: str, value: Any) -> str:
    """A name of 1 to 64 characters on one line, without a comma, which stands between names in a record. ValueError."""
    name = check_text(key, value, CHARACTERS)
    if "," in name or name != name.strip():
        raise ValueError(f"{key}: expected a name without a comma or blanks around it, got {shown(name)}")
    return name


def read_people(key: str, value: Any) -> tuple[str, ...]:
    """Names as a message lists them. BadFrame."""
    if not isinstance(value, list | tuple) or len(value) > PEOPLE:
        raise BadFrame(f"{key}: expected a list of at most {PEOPLE} names, got {shown(value)}")
    try:
        return tuple(check_person(key, name) for name in value)
    except ValueError as error:
        raise BadFrame(str(error)) from None


def each_once(names: Iterable[str | None]) -> tuple[str, ...]:
    """Each name once, by who came first; None is nobody's."""
    return tuple(dict.fromkeys(name for name in names if name is not None))


def named(device: object, otherwise: str) -> str:
    """Who is at a device, as its `person` says; otherwise: where it does not know."""
    return getattr(device, "person", None) or otherwise


def who(said: Any = None, key: str = "operator_name") -> str:
    """Who sits here: what was said, else FLOWSERL_OPERATOR, else the login. ValueError for what is no name."""
    if said is not None:
        return check_person(key, said)
    if name := os.environ.get(VARIABLE):
        return check_person(VARIABLE, name)
    try:
        return check_person("login", getpass.getuser())
    except (KeyError, OSError):  # a container's number without a name
        return f"uid {os.getuid()}"
