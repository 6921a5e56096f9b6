"""What a mistake in the config says, out of the exceptions that Hydra wraps around it.

Called by the entry points of both sides (actor, trainer, policy server) and by tools, with what `instantiate` raised.
"""

import re

# What a constructor raises about what it was given. Anything else (a device out of memory) is no mistake of the user.
_USER_ERRORS = (ValueError, TypeError, ImportError, AttributeError, FileNotFoundError)
_WORDED_FOR_USERS = (ValueError, OSError)
_KEY = re.compile(r"^full_key: (\S+)$", re.MULTILINE)


def is_config_mistake(error: BaseException) -> bool:
    """Is this about the config: a refusal of a constructor, a wrong argument, a `_target_` that is not there?"""
    culprit = beneath(error)
    return isinstance(culprit, _USER_ERRORS) or culprit is error  # without a cause Hydra itself refuses the node


def mistake_message(error: BaseException) -> str:
    """The message beneath the wrapping; what the interpreter says (a wrong argument or `_target_`) after its key.

    >>> mistake_message(ValueError("expected 1, got 2"))
    'expected 1, got 2'
    """
    culprit = beneath(error)
    text = str(culprit) or type(culprit).__name__
    if isinstance(culprit, _WORDED_FOR_USERS):
        return text
    keys = [key for link in _chain(error) for key in _KEY.findall(str(link))]
    missing = "._target_" if "Error locating target" in str(error) else ""
    return (f"{keys[-1]}{missing}: " if keys else "") + text.splitlines()[0]


def beneath(error: BaseException) -> BaseException:
    """The first of the causes that was raised with words for the user, else the very first cause."""
    links = _chain(error)
    return next((link for link in links if isinstance(link, _WORDED_FOR_USERS)), links[-1])


def _chain(error: BaseException) -> list[BaseException]:
    links = [error]
    while (cause := links[-1].__cause__) is not None:
        links.append(cause)
    return links
