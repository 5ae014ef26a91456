"""Carries bytes between a viewer's websocket and a console, for as long as the session may last."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import structlog
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from trimtab_controller.api.context import ConsoleLine
from trimtab_controller.api.runtime import Runtime
from trimtab_controller.services import consoles
from trimtab_controller.services.consoles import Ending, Seat
from trimtab_protos.errors import TrimtabError, Unavailable

log = structlog.get_logger(__name__)

CONTENT_BYTES_MAX = 64 << 10
LEFT = Ending("left", "the session was ended")
# The records follow what a host saw within this.
_WORD_WITHIN_S = 5.0
_WORD_EVERY_S = 0.2
NORMAL_CODE, ENDED_CODE = 1000, 4000
# A close frame holds 123 bytes of text.
_REASON_BYTES_MAX = 123


async def relay(websocket: WebSocket, runtime: Runtime, seat: Seat, line: ConsoleLine) -> Ending:
    """Carry bytes until the viewer leaves, the guest's side closes or the session may not go on; return why it ended."""
    typed = asyncio.Event()
    ways: list[Coroutine[Any, Any, Ending]] = [
        _up(websocket, line, typed),
        _down(websocket, runtime, seat, line),
        _watch(runtime, seat),
        _idle(runtime, typed),
    ]
    tasks = [asyncio.ensure_future(_ending_of(way)) for way in ways]
    try:
        ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return next(task.result() for task in tasks if task in ended)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def hang_up(websocket: WebSocket, ending: Ending) -> None:
    """Close the socket with `CODE: sentence`; a viewer that has gone already is fine."""
    if websocket.client_state is not WebSocketState.CONNECTED:
        return
    code = NORMAL_CODE if ending == LEFT else ENDED_CODE
    reason = f"{ending.code}: {ending.sentence}".encode()[:_REASON_BYTES_MAX].decode(errors="ignore")
    try:
        await websocket.close(code, reason)
    except (RuntimeError, WebSocketDisconnect):
        log.info("viewer had gone before the session ended", cause=ending.code)


async def _ending_of(way: Awaitable[Ending]) -> Ending:
    try:
        return await way
    except WebSocketDisconnect:
        return LEFT
    except TrimtabError as error:
        return Ending(error.code, error.message)


async def _up(websocket: WebSocket, line: ConsoleLine, typed: asyncio.Event) -> Ending:
    while True:
        message = await websocket.receive()
        if message["type"] == "websocket.disconnect":
            return LEFT
        content: bytes = message.get("bytes") or (message.get("text") or "").encode()
        typed.set()
        for begin in range(0, len(content), CONTENT_BYTES_MAX):
            await line.write(content[begin : begin + CONTENT_BYTES_MAX])


async def _down(websocket: WebSocket, runtime: Runtime, seat: Seat, line: ConsoleLine) -> Ending:
    while content := await line.read():
        await websocket.send_bytes(content)
    # The guest's side closed. Why, the records say soon.
    found = await _first(_WORD_WITHIN_S, lambda: _ask(runtime, seat, consoles.after_end))
    return found or Ending("console-ended", f"vm {seat.vm.name} closed its console: it was stopped, restarted or moved")


async def _watch(runtime: Runtime, seat: Seat) -> Ending:
    settings = runtime.context.settings
    deadline_s = asyncio.get_running_loop().time() + settings.console_max_s
    while asyncio.get_running_loop().time() < deadline_s:
        await asyncio.sleep(settings.console_check_s)
        ending = await _ask(runtime, seat, consoles.standing)
        if ending is not None:
            return ending
    return Ending("session-too-long", f"a session lasts {settings.console_max_s:.0f} s at most; open the console again")


async def _idle(runtime: Runtime, typed: asyncio.Event) -> Ending:
    idle_s = runtime.context.settings.console_idle_s
    while True:
        try:
            await asyncio.wait_for(typed.wait(), idle_s)
        except TimeoutError:
            return Ending("idle", f"nothing came from the viewer for {idle_s:.0f} s; open the console again")
        typed.clear()


async def _ask(runtime: Runtime, seat: Seat, question: Callable[..., Ending | None]) -> Ending | None:
    """Return the records' answer; a database that does not answer ends no session."""
    try:
        return await runtime.context.db.read(lambda session: question(session, seat.console, now=runtime.context.clock.now()))
    except Unavailable:
        return None


async def _first(within_s: float, ask: Callable[[], Awaitable[Ending | None]]) -> Ending | None:
    deadline_s = asyncio.get_running_loop().time() + within_s
    while True:
        found = await ask()
        if found is not None or asyncio.get_running_loop().time() >= deadline_s:
            return found
        await asyncio.sleep(_WORD_EVERY_S)
