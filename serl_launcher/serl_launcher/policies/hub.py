"""The model hub: whether it is asked at all, and what is said when it does not answer. Heads and tokenizers ask here.

A hub that cannot be reached costs a few seconds, not minutes of the library's retries: then only what lies on this
machine is used, and the log says so.
"""

import logging
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from serl_transport.connection.reach import obstacle

log = logging.getLogger("policy")


def is_offline(source: str) -> bool:
    """Whether `source` must be found on this machine: a path, HF_HUB_OFFLINE is set, or the hub cannot be reached."""
    return Path(source).exists() or os.environ.get("HF_HUB_OFFLINE") == "1" or unreachable() is not None


@lru_cache(1)
def unreachable() -> str | None:
    """Why the hub cannot be reached, in words, said in the log; None when it can, or is asked through a proxy."""
    from huggingface_hub.constants import ENDPOINT

    address = urlsplit(ENDPOINT)
    if getproxies().get(address.scheme):
        return None
    default = 80 if address.scheme == "http" else 443
    why = obstacle(address.hostname or "", address.port or default)
    if why is not None:
        log.warning("the hub %s cannot be reached (%s): only what is on this machine is used", ENDPOINT, why)
    return why


def fetched(get: Callable[..., str], source: str) -> str:
    """`get(local_files_only=…)`. Raises ValueError, why the hub did not give it, where it did not."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    offline = is_offline(source)
    try:
        return get(local_files_only=offline)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        asked = os.environ.get("HF_HUB_OFFLINE") != "1"
        if asked and offline and (why := unreachable()):
            raise ValueError(f"the hub cannot be reached ({why}); name a folder") from None
        raise ValueError(f"the hub did not give it: {str(error).splitlines()[0]}") from None
