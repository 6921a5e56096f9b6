"""One page's frames on their way to the gateway, while a person drives from it. Owned by that page's websocket.

    websocket ─▶ take() ─▶ [the newest frame] ─▶ request `drive`, one at a time ─▶ beat, or why not ─▶ page

A newer frame replaces one that waits. Whatever ends the websocket lets the robot go.
"""

import asyncio
import json
import logging
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from serl_transport.contract.errors import WireError

log = logging.getLogger("console")


class Driver:
    """request: blocks for the gateway's answer; tell: sends a body to the page."""

    def __init__(
        self, request: Callable[[str, dict[str, Any]], dict[str, Any]], tell: Callable[[Any], Awaitable[None]]
    ) -> None:
        self._request, self._tell = request, tell
        self._page = secrets.token_hex(8)
        self._next: dict[str, Any] | None = None
        self._holds: dict[str, Any] | None = None  # actor and person, while this page drives
        self._task: asyncio.Task | None = None

    def take(self, text: str) -> None:
        """A message of the page: `{drive: {actor, person, frame | null}}`. What is none is passed over, and logged."""
        try:
            body = dict(json.loads(text)["drive"])
        except (ValueError, KeyError, TypeError) as error:
            log.error("a message of a page counts for nothing: %s", error)
            return
        self._next = body | {"page": self._page}
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work())

    async def end(self) -> None:
        """The page is gone."""
        self._next = None
        if self._task is not None:
            await asyncio.wait([self._task])
        if self._holds is not None:
            await self._ask(self._holds | {"frame": None})

    async def _work(self) -> None:
        while (body := self._next) is not None:
            self._next = None
            answer = await self._ask(body)
            try:
                await self._tell({"beat": answer})
            except ConnectionError:
                return

    async def _ask(self, body: dict[str, Any]) -> dict[str, Any]:
        self._holds = {**body, "frame": None} if body.get("frame") is not None else None
        try:
            return await asyncio.to_thread(self._request, "drive", body)
        except WireError as refusal:
            return {"error": f"{refusal.message}"}
