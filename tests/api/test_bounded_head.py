"""The head of a request is bounded before anybody has shown a token; bodies have their own bound."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from trimtab_controller.bounded_head import HEAD_MAX_BYTES, BoundedHead

BODY_BYTES = 4 * HEAD_MAX_BYTES


async def app(_scope: Any, receive: Any, send: Any) -> None:
    """Answer with how many bytes the body had."""
    taken, more = 0, True
    while more:
        message = await receive()
        taken, more = taken + len(message.get("body", b"")), message.get("more_body", False)
    content = str(taken).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(len(content)).encode())]})
    await send({"type": "http.response.body", "body": content})


@pytest.fixture
async def port() -> AsyncIterator[int]:
    config = uvicorn.Config(app, http=BoundedHead, log_config=None, lifespan="off")
    config.load()
    state = ServerState()
    server = await asyncio.get_running_loop().create_server(lambda: BoundedHead(config, state, {}), "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()
    for connection in list(state.connections):
        connection.transport.close()


async def test_a_head_that_does_not_end_is_refused_and_the_connection_closed(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET / HTTP/1.1\r\nHost: here\r\n")
    line = b"X-More: " + b"x" * 8000 + b"\r\n"
    sent = 0
    while not reader.at_eof() and sent < 16 * HEAD_MAX_BYTES:
        writer.write(line)
        sent += len(line)
        try:
            await writer.drain()
            answer = await asyncio.wait_for(reader.read(100), 0.05)
        except TimeoutError:
            continue
        except ConnectionError:
            break
        assert answer[:12] in {b"HTTP/1.1 400", b""}, answer
        break
    assert sent <= 2 * HEAD_MAX_BYTES
    writer.close()


async def test_bodies_and_requests_one_after_the_other_are_not_counted(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(3):
        writer.write(f"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: {BODY_BYTES}\r\n\r\n".encode() + b"x" * BODY_BYTES)
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        assert head.startswith(b"HTTP/1.1 200")
        content = await asyncio.wait_for(reader.readexactly(len(str(BODY_BYTES))), 10)
        assert int(content) == BODY_BYTES
    writer.close()
