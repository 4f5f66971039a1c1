"""Pages in headless Chromium, by its DevTools protocol; pages of components, too, whose insides no dump shows."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from typing import Any

import aiohttp

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-port=0")
# The browser is given this long, in seconds, to start, and a page to show what is waited for.
_PATIENCE = 120.0


@dataclass
class Seen:
    """What became of a page.

    Attributes:
        value: of the expression.
        requests: addresses that the page asked for, itself among them.
    """

    value: Any
    requests: list[str] = field(default_factory=list)


def seen(url: str, expression: str, size: tuple[int, int] = (1500, 1400)) -> Seen:
    """Open a page and return the value of a JavaScript expression, as soon as it has one that is true."""
    return asyncio.run(asyncio.wait_for(_seen(url, expression, size), _PATIENCE))


async def _seen(url: str, expression: str, size: tuple[int, int]) -> Seen:
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        flags = (*_FLAGS, f"--user-data-dir={folder}", f"--window-size={size[0]},{size[1]}")
        process = await asyncio.create_subprocess_exec(
            CHROMIUM, *flags, "about:blank", stdout=subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
        )
        try:
            assert process.stderr is not None
            while not (line := (await process.stderr.readline()).decode()).startswith("DevTools listening on ws://"):
                assert line, "Chromium has ended"
            address = line.split("ws://")[1].split("/")[0]
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://{address}/json") as answer:
                    (page,) = [one for one in await answer.json() if one["type"] == "page"]
                async with session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    return await _Page(socket).seen(url, expression)
        finally:
            process.kill()
            await process.wait()


class _Page:
    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._numbers, self._requests = socket, itertools.count(1), list[str]()

    async def seen(self, url: str, expression: str) -> Seen:
        await self._call("Network.enable")
        await self._call("Page.enable")
        await self._call("Page.navigate", url=url)
        waiting = (
            "new Promise(done => {const look = () => {let value; try {value = "
            f"({expression})}} catch (error) {{}} value ? done(value) : setTimeout(look, 100)}}; look()}})"
        )
        answer: dict[str, Any] = {}
        while "value" not in answer:  # a promise is lost with the document that made it
            found = await self._call("Runtime.evaluate", expression=waiting, awaitPromise=True, returnByValue=True)
            answer = found.get("result", {})
        return Seen(answer["value"], self._requests)

    async def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        await self._socket.send_str(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads((await self._socket.receive()).data)
            if message.get("method") == "Network.requestWillBeSent":
                self._requests.append(message["params"]["request"]["url"])
            if message.get("id") == number:
                return message.get("result", {})
