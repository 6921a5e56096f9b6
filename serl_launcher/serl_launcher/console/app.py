"""The console's web server: one page, one websocket a page, acts by POST, videos. Run by `__main__`.

    run folder ─▶ Feed, 1 Hz ─┐
    gateway ─▶ views, 5 Hz ───┴─▶ websocket of each page, what has changed        while a page is open; else nothing
    page ─▶ POST /act ─▶ ConsoleOperator ─▶ gateway        page ─▶ websocket `drive` ─▶ Driver ─▶ ConsoleOperator

Whatever waits (a disk, the gateway) waits on a thread; the loop here only hands on.
"""

import asyncio
import base64
import contextlib
import json
import logging
import os
import ssl
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.resources import files
from typing import Any

from aiohttp import WSMsgType, web
from omegaconf import DictConfig, OmegaConf

from serl_launcher.console.door import Door
from serl_launcher.console.driver import Driver
from serl_launcher.console.feed import Feed
from serl_launcher.console.operator import ConsoleOperator
from serl_launcher.run.alive import beat
from serl_launcher.run.console import ConsolePlace
from serl_launcher.run.internal import InternalClient
from serl_launcher.run.paths import RunPaths
from serl_transport.contract.bounds import check_text, printable, shown
from serl_transport.contract.errors import WireError

log = logging.getLogger("console")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
LOOK_S, VIEW_S, BEAT_S = 1.0, 0.2, 0.5
PATIENCE_S = 2.0  # for the gateway's answer to `views`
MESSAGE_BYTES, ACT_BYTES = 8 << 10, 16 << 10
PAGES, ACTS = 32, 4  # websockets that are served; acts that wait for the gateway at a time, others behind them
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "media-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Console:
    """Serves one run; operator: by whom it acts."""

    def __init__(self, cfg: DictConfig, paths: RunPaths, place: ConsolePlace, operator: ConsoleOperator) -> None:
        self._paths, self._place, self._operator = paths, place, operator
        self._tls = (cfg.console.tls_cert, cfg.console.tls_key) if place.tls else None
        self._door = Door(place, cfg.console.hosts or ())
        self._feed = Feed(paths, OmegaConf.to_container(cfg, resolve=True))
        self._files = {entry.name: entry.read_bytes() for entry in files(__package__).joinpath("page").iterdir()}
        self._pages = 0  # that are open
        self._acts = ThreadPoolExecutor(ACTS, "act")  # a slow act must not hold up a frame
        self._opened, self._making = asyncio.Event(), asyncio.Lock()
        self._views: dict[str, Any] = {}  # actor -> its newest `live`, pictures as data URLs
        self._hands: dict[str, Any] = {}

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[list[asyncio.Task]]:
        """Serve in here, by these tasks, which never end of themselves.

        OSError: the port cannot be had; ValueError: certificates that do not fit.
        """

        @web.middleware
        async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
            return await self._guard(request, handler)

        app = web.Application(middlewares=[guard], client_max_size=ACT_BYTES)
        app.router.add_get("/", self._page)
        app.router.add_get("/page/{name}", self._file)
        app.router.add_get("/ws", self._websocket)
        app.router.add_post("/act", self._act)
        app.router.add_get("/video/{episode}", self._video)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        tasks = [asyncio.create_task(work) for work in (self._beat(), self._look(), self._view())]
        try:
            await web.TCPSite(runner, self._place.host, self._place.port, ssl_context=self._context()).start()
            log.info("console at %s port %d", self._place.host, self._place.port)
            yield tasks
        finally:
            for task in tasks:
                task.cancel()
            await runner.cleanup()
            self._acts.shutdown(wait=False, cancel_futures=True)
            self._operator.close()

    def _context(self) -> ssl.SSLContext | None:
        if self._tls is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(*self._tls)
        except ssl.SSLError as error:
            raise ValueError(f"console.tls_cert and console.tls_key do not fit: {error}") from None
        return context

    # What is served.

    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Before every handler: a name of ours, the word or its cookie; for what acts, a page of ours."""
        if not self._door.is_our_name(request.headers.get("Host")):
            return _refused(f"not by this name: open the console by its address, or name {shown(request.host)} in "
                            "console.hosts")  # fmt: skip
        if not self._door.opens(request.query.get("t") or request.cookies.get(self._door.cookie)):
            return _refused("open the address that the learner's screen shows; this one lacks its word")
        acts = request.method == "POST" or request.path == "/ws"
        if acts and not self._door.is_from_our_page(request.headers):
            return _refused("only the console's own page may ask this")
        response = await handler(request)
        if not response.prepared:
            response.headers.update(HEADERS)
        return response

    async def _page(self, request: web.Request) -> web.Response:
        response = web.Response(body=self._files["index.html"], content_type="text/html", charset="utf-8")
        if word := request.query.get("t"):
            response.set_cookie(**self._door.cookie_of(word))
        return response

    async def _file(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name not in self._files:
            raise web.HTTPNotFound
        kind = TYPES[name.rpartition(".")[2]]
        return web.Response(body=self._files[name], content_type=kind, charset="utf-8")

    async def _video(self, request: web.Request) -> web.StreamResponse:
        episode = request.match_info["episode"]
        name = self._feed.videos.get(episode) or await self._make_video(episode)
        return web.FileResponse(self._paths.videos / name, headers=HEADERS)

    async def _make_video(self, episode: str) -> str:
        """Its actor recorded none here: made of the dataset, one at a time, by a process that gives way to others."""
        if not self._feed.knows(episode):
            raise web.HTTPNotFound(text="no such episode")
        words = [sys.executable, "-m", "serl_launcher.console.footage", str(self._paths.root), episode]
        async with self._making:
            made = await asyncio.create_subprocess_exec(*words, stdout=PIPE, stderr=PIPE, preexec_fn=_give_way)
            name, why = await made.communicate()
        if made.returncode:
            raise web.HTTPNotFound(text=f"no video: {why.decode().strip().splitlines()[-1:] or ['it ended']}")
        return name.decode().strip()

    async def _act(self, request: web.Request) -> web.Response:
        try:
            asked = await request.json()
            kind, payload = check_text("request", asked["request"], 64), dict(asked["payload"])
            person = check_text("person", asked["person"], 64)
        except (ValueError, KeyError, TypeError) as error:
            return web.json_response({"error": f"expected request, payload and person: {error}"}, status=400)
        log.warning("%s asks: %s %s", person, kind, printable(json.dumps(payload)))
        try:
            ask = partial(self._operator.request, kind, payload | {"person": person})
            reply = await asyncio.get_running_loop().run_in_executor(self._acts, ask)
        except WireError as refusal:
            log.warning("%s was refused %s: %s", person, kind, refusal.message)
            return web.json_response({"error": f"{refusal.code}: {refusal.message}"}, status=409)
        return web.json_response({"reply": reply})

    async def _websocket(self, request: web.Request) -> web.WebSocketResponse:
        if self._pages >= PAGES:
            raise web.HTTPServiceUnavailable(text=f"{PAGES} pages are open, as many as this console serves")
        socket = web.WebSocketResponse(heartbeat=10.0, max_msg_size=MESSAGE_BYTES)
        await socket.prepare(request)
        driver = Driver(self._operator.request, socket.send_json)
        self._pages += 1
        self._opened.set()
        sender = asyncio.create_task(self._send(socket))
        try:
            async for message in socket:
                if message.type == WSMsgType.TEXT:
                    driver.take(message.data)
        finally:
            sender.cancel()
            self._pages -= 1
            if not self._pages:
                self._opened.clear()
            await driver.end()
        return socket

    async def _send(self, socket: web.WebSocketResponse) -> None:
        """What has changed, to one page, as fast as that page takes it."""
        number, seen = 0, {}
        while not socket.closed:
            number, news = self._feed.since(number)
            live = {actor: view for actor, view in self._views.items() if seen.get(actor) != view["number"]}
            seen = {actor: view["number"] for actor, view in self._views.items()}
            ages = {actor: view["age_s"] for actor, view in self._views.items()}
            with contextlib.suppress(ConnectionError):
                await socket.send_json({**news, "live": live, "ages": ages, "hands": self._hands})
            await asyncio.sleep(VIEW_S)

    # What goes on beside.

    async def _beat(self) -> None:
        while True:
            beat()
            await asyncio.sleep(BEAT_S)

    async def _look(self) -> None:
        while True:
            await self._opened.wait()
            await asyncio.to_thread(self._feed.look)
            await asyncio.sleep(LOOK_S)

    async def _view(self) -> None:
        client = InternalClient(self._paths.root, "console", patience_s=PATIENCE_S)
        newest = 0
        while True:
            await self._opened.wait()
            started = time.monotonic()
            try:
                told = await asyncio.to_thread(client.call, "views", {"since": newest})
            except WireError as error:  # the feed tells that the gateway is silent
                log.debug("no pictures: %s", error)
                self._views, self._hands = {}, {}
                await asyncio.sleep(LOOK_S)
                continue
            newest = max((view["number"] for view in told["actors"].values()), default=0)
            self._views = {actor: self._view_of(actor, view) for actor, view in told["actors"].items()}
            self._hands = told["hands"]
            await asyncio.sleep(max(0.02, VIEW_S - (time.monotonic() - started)))

    def _view_of(self, actor: str, view: dict[str, Any]) -> dict[str, Any]:
        """As the page takes it; the last one again where nothing is new."""
        if "pictures" not in view:
            return {**self._views.get(actor, {"pictures": {}}), **view}
        pictures = {camera: _data_url(jpeg) for camera, jpeg in view["pictures"].items()}
        return view | {"pictures": pictures}


def _give_way() -> None:
    os.nice(10)


def _data_url(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()


def _refused(why: str) -> web.Response:
    return web.Response(status=403, text=f"{why}\n", headers=HEADERS)
