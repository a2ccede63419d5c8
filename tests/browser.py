# SPDX-License-Identifier: Apache-2.0
"""A real browser without a window, spoken to by the DevTools protocol: what a page looks like, says and asks for."""
from __future__ import annotations

import asyncio
import base64
import itertools
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp

__all__ = ["Browser", "find_browser"]

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
         "--remote-debugging-port=0")
START_S, ANSWER_S = 60.0, 60.0


def find_browser() -> str | None:
    """Path of a Chromium; None where there is none."""
    return next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))),
                None)


class Browser:
    """One page in a Chromium of its own; an async context manager.

    Attributes: events: all that the page sent since it was opened: what it wrote to the console, errors, requests.
    """

    def __init__(self, program: str) -> None:
        self._program, self._ids = program, itertools.count(1)
        self.events: list[dict[str, Any]] = []

    async def __aenter__(self) -> Browser:
        self._folder = tempfile.mkdtemp(prefix="qgnn-browser-")
        self._process = subprocess.Popen([self._program, *FLAGS, f"--user-data-dir={self._folder}", "about:blank"],
                                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            self._session = aiohttp.ClientSession()
            port = await self._port()
            async with self._session.get(f"http://127.0.0.1:{port}/json") as answer:
                (page,) = [one for one in await answer.json() if one["type"] == "page"]
            self._socket = await self._session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=64 << 20)
            for domain in ("Page", "Runtime", "Log", "Network"):
                await self.call(f"{domain}.enable")
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()
        self._process.terminate()
        self._process.wait(10)
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _port(self) -> int:
        file, end = Path(self._folder, "DevToolsActivePort"), time.monotonic() + START_S
        while True:
            lines = file.read_text().splitlines() if file.exists() else []
            if len(lines) == 2:
                return int(lines[0])
            assert self._process.poll() is None, "the browser ended early"
            assert time.monotonic() < end, f"no browser within {START_S:g} s"
            await asyncio.sleep(0.02)

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command's result."""
        number = next(self._ids)
        await self._socket.send_json({"id": number, "method": method, "params": params})
        while True:
            message = await self._socket.receive_json(timeout=ANSWER_S)
            if message.get("id") == number:
                assert "error" not in message, (method, message["error"])
                return dict(message["result"])
            self.events.append(message)

    async def open(self, page: Path, *, width: int, dark: bool) -> float:
        """Load a file in a window of this width; the seconds until it was loaded."""
        await self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1,
                        mobile=False)
        await self.call("Emulation.setEmulatedMedia",
                        features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.events.clear()
        start = time.monotonic()
        await self.call("Page.navigate", url=page.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(await self._socket.receive_json(timeout=ANSWER_S))
        return time.monotonic() - start

    async def ask(self, expression: str) -> Any:
        """What a JavaScript expression is, as JSON."""
        found = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def picture(self, out: Path) -> None:
        """The whole page as PNG."""
        size = (await self.call("Page.getLayoutMetrics"))["cssContentSize"]
        shot = await self.call("Page.captureScreenshot", captureBeyondViewport=True, clip={
            "x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1})
        out.write_bytes(base64.b64decode(shot["data"]))

    def complaints(self) -> list[str]:
        """Errors and warnings that the page caused."""
        found = []
        for event in self.events:
            if event["method"] in ("Runtime.exceptionThrown", "Log.entryAdded"):
                found.append(str(event["params"]))
            elif event["method"] == "Runtime.consoleAPICalled" and event["params"]["type"] in ("error", "warning"):
                found.append(str(event["params"]["args"]))
        return found

    def requests(self) -> list[str]:
        """Addresses that the page asked for."""
        return [event["params"]["request"]["url"] for event in self.events
                if event["method"] == "Network.requestWillBeSent"]
