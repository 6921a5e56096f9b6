"""Whose ticket an episode's id is: a keyed digest in the id itself, so that nothing has to be remembered.

    issue ─▶ <stage>-<seed>-<name of the secret><nonce><digest>      digest: HMAC(secret; nonce, stage, mode, seed, who)
    item of an episode that is not open ─▶ check ─▶ taken, or Refused

The gateway's tickets make the ids, `Ingest` asks `check`. The secret lies in the run's folder, private and on disk
before the first ticket goes out: tickets hold after any restart, and for items that a spool kept for days.
"""

import hashlib
import hmac
import json
import logging
import os
from pathlib import Path

from serl_launcher.run.files import DamagedFileError, read_sealed, write_sealed
from serl_transport.contract.errors import Refused
from serl_transport.contract.schema import EpisodeInfo
from serl_transport.security.files import check_private

log = logging.getLogger("gateway")

SECRET_BYTES = 32
_NAME, _NONCE, _DIGEST = 4, 8, 20  # hex digits: which secret, what makes the id unique, 80 bits of the HMAC


class Seal:
    """secret: of the run. unticketed: are episodes taken that nobody was given a ticket for?"""

    def __init__(self, secret: bytes, unticketed: bool) -> None:
        self._secret, self._unticketed = secret, unticketed
        self._name = hashlib.sha256(b"name of the secret" + secret).hexdigest()[:_NAME]

    def episode_id(self, stage: str, mode: str, seed: int, actor: str, boot: str) -> str:
        """A new id for the episode that this process is to make."""
        nonce = os.urandom(_NONCE // 2).hex()
        return f"{stage}-{seed:07d}-{self._name}{nonce}{self._digest(nonce, stage, mode, seed, actor, boot)}"

    def check(self, info: EpisodeInfo) -> None:
        """Raise Refused unless the episode's maker holds its ticket, or needs none."""
        digits = info.episode_id.rpartition("-")[2]
        if len(digits) != _NAME + _NONCE + _DIGEST or digits[:_NAME] != self._name:
            if self._unticketed:
                return
            raise Refused(
                f"episode {info.episode_id!r} has no ticket of this run: ask for next_episode, or let the learner take "
                "episodes without one (gateway.unticketed=true)"
            )
        nonce, digest = digits[_NAME : _NAME + _NONCE], digits[_NAME + _NONCE :]
        expected = self._digest(nonce, info.stage, info.mode, info.seed, info.actor_id, info.boot_id)
        if not hmac.compare_digest(digest.encode(), expected.encode()):
            raise Refused(
                f"episode {info.episode_id!r}: its ticket is another's, or was for another stage, mode or seed than "
                f"{info.stage!r}, {info.mode}, {info.seed} of {info.actor_id!r}"
            )

    def _digest(self, *of: str | int) -> str:
        return hmac.digest(self._secret, json.dumps(of).encode(), "sha256").hex()[:_DIGEST]


def load_secret(path: Path, used: bool) -> bytes:
    """The run's secret, made where there is none; used: the run has data, so there should be one.

    ValueError when others may read it; OSError when it cannot be written.
    """
    lost = f"{path} is missing"
    try:
        check_private(path)
        body = read_sealed(path, ["secret"], ["secret"])
        if body is not None:
            return bytes.fromhex(body["secret"])
    except FileNotFoundError:
        pass
    except DamagedFileError as damage:
        used, lost = True, str(damage)
    if used:
        log.warning(
            "%s: made anew. What actors recorded under the old one and have not begun to deliver is refused unless "
            "gateway.unticketed=true", lost,
        )  # fmt: skip
    secret = os.urandom(SECRET_BYTES)
    write_sealed(path, {"secret": secret.hex()}, mode=0o600)
    return secret
