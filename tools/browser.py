"""Headless Chromium, driven over WebDriver's HTTP by the standard library: for tests of the page,
and for pictures of it.
"""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

FLAGS = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--force-color-profile=srgb"]


class NoBrowser(Exception):
    """There is no Chromium on this machine, or no driver for it."""


class Browser:
    """One window."""

    def __init__(self, base: str):
        self.base = base

    def call(self, method: str, path: str, **body: Any) -> Any:
        """The value that WebDriver gives."""
        data = json.dumps(body).encode() if method == "POST" else None
        try:
            with urlopen(Request(self.base + path, data, method=method), timeout=60) as answer:
                return json.load(answer)["value"]
        except HTTPError as error:
            raise AssertionError(error.read().decode()) from None

    def open(self, url: str) -> None:
        self.call("POST", "/url", url=url)

    def js(self, script: str, *args: Any) -> Any:
        """What a function body returns, in the page."""
        return self.call("POST", "/execute/sync", script=script, args=list(args))

    def later(self, script: str) -> Any:
        """What a function body with an `await` returns."""
        text = f"const done = arguments[0]; (async () => {{ {script} }})()"
        text += ".then(done, (error) => done(String(error)))"
        return self.call("POST", "/execute/async", script=text, args=[])

    def until(self, script: str, *args: Any) -> Any:
        """What a function body returns when it is at last truthy."""
        for _ in range(600):
            if found := self.js(script, *args):
                return found
            time.sleep(0.05)
        raise AssertionError(f"never: {script}\n{self.js('return document.body.innerText')}")

    def find(self, selector: str) -> str:
        found = self.call("POST", "/element", using="css selector", value=selector)
        return next(iter(found.values()))

    def click(self, selector: str) -> None:
        self.call("POST", f"/element/{self.find(selector)}/click")

    def type(self, selector: str, text: str) -> None:
        self.call("POST", f"/element/{self.find(selector)}/value", text=text)

    def keys(self, *keys: str) -> None:
        """Press keys where the focus is."""
        acts = [{"type": t, "value": k} for k in keys for t in ("keyDown", "keyUp")]
        source = {"type": "key", "id": "keyboard", "actions": acts}
        self.call("POST", "/actions", actions=[source])

    def hover(self, selector: str) -> None:
        origin = {"element-6066-11e4-a52e-4f735466cecf": self.find(selector)}
        move = {"type": "pointerMove", "duration": 0, "origin": origin, "x": 0, "y": 0}
        source = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}}
        self.call("POST", "/actions", actions=[{**source, "actions": [move]}])

    def resize(self, width: int, height: int) -> None:
        """The size of the page itself, also below what a window may have."""
        metrics = {
            "width": width,
            "height": height,
            "deviceScaleFactor": 1.5,
            "mobile": width < 600,
        }
        self.chrome("Emulation.setDeviceMetricsOverride", **metrics)

    def chrome(self, command: str, **params: Any) -> Any:
        """A command of Chrome's own protocol."""
        return self.call("POST", "/goog/cdp/execute", cmd=command, params=params)

    def log(self, kind: str) -> list[dict[str, Any]]:
        """What the browser has noted since it was last asked."""
        return self.call("POST", "/se/log", type=kind)

    def screenshot(self) -> bytes:
        return base64.b64decode(self.call("GET", "/screenshot"))


@contextmanager
def browser() -> Iterator[Browser]:
    """A window. Raises NoBrowser where there can be none."""
    chrome = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chrome is None or driver is None:
        raise NoBrowser("no Chromium (on Debian: apt-get install chromium chromium-driver)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL) as process:
        try:
            base = f"http://127.0.0.1:{port}"
            for _ in range(200):
                try:
                    urlopen(base + "/status", timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.05)
            asked = {
                "goog:chromeOptions": {"args": FLAGS, "binary": chrome},
                "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
            }
            data = json.dumps({"capabilities": {"alwaysMatch": asked}}).encode()
            with urlopen(Request(base + "/session", data, method="POST"), timeout=120) as answer:
                session = json.load(answer)["value"]["sessionId"]
            window = Browser(f"{base}/session/{session}")
            try:
                yield window
            finally:
                window.call("DELETE", "")
        finally:
            process.terminate()
            process.wait(20)
