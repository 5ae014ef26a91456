"""A small HTTP/1.1 client for load: one connection per caller, one request at a time on it, bytes in and bytes out.

A general client costs more CPU per request than the server that is measured beside it on the same cores.
"""

import asyncio
import json
import ssl
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trimtab_lab.simulated import SimulatedLab


class Connection:
    """One kept-alive connection to the API."""

    def __init__(self, url: str, authority_file: Path, token_file: Path) -> None:
        self._place = urlsplit(url).netloc
        self._context = ssl.create_default_context(cafile=str(authority_file))
        self._token = token_file.read_text().strip()
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    @classmethod
    def to(cls, lab: SimulatedLab) -> "Connection":
        return cls(lab.spec.url, lab.authority_file, lab.token_file)

    async def open(self) -> None:
        host, _, port = self._place.rpartition(":")
        self._reader, self._writer = await asyncio.open_connection(host, int(port), ssl=self._context, limit=1 << 24)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    async def get(self, path: str) -> Any:
        return await self.send("GET", path)

    async def post(self, path: str, document: dict[str, Any], *, key: str = "") -> Any:
        return await self.send("POST", path, json.dumps(document).encode(), key=key)

    async def send(self, method: str, path: str, body: bytes = b"", *, key: str = "") -> Any:
        """Return the answer's document. RuntimeError on any status that is no success."""
        if self._reader is None or self._reader.at_eof():
            await self.open()  # the server closes what was idle for some seconds
        assert self._reader is not None
        assert self._writer is not None
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._place}\r\nAuthorization: Bearer {self._token}\r\n"
        if key:
            head += f"Idempotency-Key: {key}\r\n"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self._writer.write(head.encode() + b"\r\n" + body)
        answer = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        length = int(answer.partition("\r\ncontent-length:")[2].partition("\r\n")[0] or 0)
        content = await self._reader.readexactly(length)
        status = int(answer[9:12])
        if status >= 300:
            raise RuntimeError(f"{method} {path} answered {status}: {content[:300]!r}")
        return json.loads(content) if content else None
