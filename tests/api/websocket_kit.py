"""A websocket client straight on ASGI: it shows refusals before the upgrade and the word with which a session ends."""

import asyncio
import json
from typing import Any

from fastapi import FastAPI

TIMEOUT_S = 30


class Viewer:
    """`async with Viewer(app, path, token) as viewer`; after it `closed` holds (code, reason) or `refused` the problem."""

    def __init__(self, app: FastAPI, path: str, *subprotocols: str, **headers: str) -> None:
        self._app, self._path, self._subprotocols = app, path, list(subprotocols)
        self._headers = [(b"host", b"trimtab.test"), *((name.encode(), value.encode()) for name, value in headers.items())]
        self._to_app: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._from_app: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self.status = 0
        self.refused: dict[str, Any] = {}
        self.accepted = ""
        self.closed: tuple[int, str] = (0, "")

    async def __aenter__(self) -> "Viewer":
        scope = {
            "type": "websocket",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "scheme": "wss",
            "path": self._path,
            "raw_path": self._path.encode(),
            "query_string": b"",
            "headers": self._headers,
            "client": ("127.0.0.1", 1),
            "server": ("trimtab.test", 443),
            "subprotocols": self._subprotocols,
            "extensions": {"websocket.http.response": {}},
        }
        await self._to_app.put({"type": "websocket.connect"})
        self._task = asyncio.create_task(self._run(scope))
        await self._take()
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        await self._to_app.put({"type": "websocket.disconnect", "code": 1001})
        await asyncio.wait_for(self._task, TIMEOUT_S)

    async def type(self, content: bytes) -> None:
        await self._to_app.put({"type": "websocket.receive", "bytes": content})

    async def heard(self) -> bytes:
        """Return the next bytes; b"" at the end."""
        return await self._take()

    async def _run(self, scope: dict[str, Any]) -> None:
        await self._app(scope, self._to_app.get, self._from_app.put)

    async def _take(self) -> bytes:
        message = await asyncio.wait_for(self._from_app.get(), TIMEOUT_S)
        match message["type"]:
            case "websocket.accept":
                self.accepted = message.get("subprotocol") or ""
            case "websocket.http.response.start":
                self.status = message["status"]
                body = await asyncio.wait_for(self._from_app.get(), TIMEOUT_S)
                self.refused = json.loads(body["body"])
            case "websocket.close":
                self.closed = (message.get("code", 1000), message.get("reason", ""))
            case "websocket.send":
                return bytes(message["bytes"])
        return b""
