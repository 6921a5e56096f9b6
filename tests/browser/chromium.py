"""A real headless Chromium for the tests of the console, driven over the DevTools protocol. Used by test_console_page.

No driver package: the protocol is JSON over a websocket, and of it a dozen methods are needed.
"""

import base64
import itertools
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from websockets.sync.client import connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
KEYS = {"enter": ("Enter", 13, "\r"), "esc": ("Escape", 27, "")}


def find() -> str | None:
    """Its path; None: there is none on this machine."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Chromium:
    """One browser process with a profile of its own in `folder`."""

    def __init__(self, folder: Path) -> None:
        path = find()
        assert path
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
                 "--disable-dev-shm-usage", "--mute-audio", "--remote-debugging-port=0",
                 f"--user-data-dir={folder}"]  # fmt: skip
        self.process = subprocess.Popen([path, *flags, "about:blank"], stderr=subprocess.DEVNULL)
        active = folder / "DevToolsActivePort"
        deadline = time.monotonic() + 60
        while not active.exists() or "\n" not in active.read_text():
            assert time.monotonic() < deadline, "Chromium does not come up"
            assert self.process.poll() is None, "Chromium ended"
            time.sleep(0.05)
        self._port = int(active.read_text().split()[0])

    def page(self, width: int = 1280, height: int = 900, dark: bool = False) -> "Page":
        """A new tab, blank, of this size."""
        with urlopen(Request(f"http://127.0.0.1:{self._port}/json/new?about:blank", method="PUT")) as answer:
            page = Page(json.load(answer)["webSocketDebuggerUrl"])
        page.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        page.call("Emulation.setFocusEmulationEnabled", enabled=True)
        return page

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(20)


class Page:
    """One tab. What it logs as an error, and what it throws, is in `errors`."""

    def __init__(self, url: str) -> None:
        self._socket = connect(url, max_size=None)
        self._ids = itertools.count(1)
        self.errors: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One method of the protocol; AssertionError says what it refused."""
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=30))
            if message.get("id") == number:
                assert "error" not in message, message["error"]
                return message["result"]
            self._note(message)

    def open(self, url: str) -> None:
        """Go there, and wait until its DOM is there."""
        self.call("Page.navigate", url=url)
        self.wait("document.readyState !== 'loading' && location.href !== 'about:blank'")

    def js(self, expression: str) -> Any:
        """The value of an expression, promises awaited."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, expression: str, seconds: float = 20.0) -> Any:
        """Until the expression is true; its value."""
        deadline = time.monotonic() + seconds
        while not (value := self.js(expression)):
            assert time.monotonic() < deadline, f"never: {expression}\n{self.text()[:3000]}"
            time.sleep(0.05)
        return value

    def text(self) -> str:
        """What a person reads."""
        return self.js("document.body.innerText")

    def click(self, text: str, within: str = "body") -> None:
        """The first shown button of this text."""
        fits = f"b => b.textContent.startsWith({json.dumps(text)}) && !b.hidden"
        found = f"[...document.querySelectorAll('{within} button')].find({fits})"
        self.wait(f"Boolean({found})")
        self.js(f"{found}.click()")

    def fill(self, selector: str, text: str) -> None:
        """Type into a field."""
        self.js(
            f"(() => {{ const f = document.querySelector({json.dumps(selector)}); f.value = {json.dumps(text)};"
            " f.dispatchEvent(new Event('input')); f.dispatchEvent(new Event('change')); })()"
        )

    def down(self, key: str) -> None:
        self._key("keyDown", key)

    def up(self, key: str) -> None:
        self._key("keyUp", key)

    def tap(self, key: str) -> None:
        self.down(key)
        self.up(key)

    def _key(self, kind: str, key: str) -> None:
        name, code, text = KEYS.get(key, (key, ord(key.upper()[0]), key))
        self.call("Input.dispatchKeyEvent", type=kind, key=name, code=f"Key{key.upper()}", windowsVirtualKeyCode=code,
                  text=text if kind == "keyDown" else "")  # fmt: skip

    def screenshot(self, path: Path, whole: bool = True) -> None:
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        """Close the tab as a person does."""
        self.call("Page.close")
        self._socket.close()

    def _note(self, message: dict[str, Any]) -> None:
        kind, params = message.get("method"), message.get("params", {})
        if kind == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"])[:500])
        if kind == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.errors.append(json.dumps(params["args"])[:500])
        if kind == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
