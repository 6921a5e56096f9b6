"""Who gets in: the word of the address once, a cookie afterwards; only by a name that is ours; acts only from our page.

Asked by `app` before anything else. What others try: docs/security.md, The console.
"""

import hmac
import ipaddress
import socket
from collections.abc import Collection, Mapping
from urllib.parse import urlsplit

from serl_launcher.run.console import ConsolePlace


class Door:
    """hosts: names under which the page may be opened beside addresses, localhost and this machine's own."""

    def __init__(self, place: ConsolePlace, hosts: Collection[str] = ()) -> None:
        self._place = place
        self._hosts = {"localhost", socket.gethostname().lower(), *(host.lower() for host in hosts)}
        # Cookies know no ports: another run's console on this host must not overwrite ours.
        self.cookie = f"flowserl_{place.port}"

    def is_our_name(self, host: str | None) -> bool:
        """Is the name of this Host header an address or one of ours?

        A page elsewhere can make its own name lead here (DNS rebinding), but neither of these can it have.
        """
        try:
            name = (urlsplit(f"//{host}").hostname or "") if host else ""
        except ValueError:
            return False
        if name in self._hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def opens(self, word: str | None) -> bool:
        """Is it the word, of an address or a cookie? Compared in constant time."""
        return word is not None and hmac.compare_digest(word.encode(), self._place.token.encode())

    def is_from_our_page(self, headers: Mapping[str, str]) -> bool:
        """Was this sent by a page that we served? Browsers name the page's origin in every POST and websocket."""
        scheme = "https" if self._place.tls else "http"
        return headers.get("Origin") == f"{scheme}://{headers.get('Host')}"

    def cookie_of(self, word: str) -> dict[str, object]:
        """Arguments of set_cookie: sent to us alone, never by another site's links, read by no script."""
        return {
            "name": self.cookie, "value": word, "httponly": True, "samesite": "Strict", "path": "/",
            "secure": self._place.tls, "max_age": 30 * 24 * 3600,
        }  # fmt: skip
