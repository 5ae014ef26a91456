"""ConsoleService: carries bytes between a call of the controller and a guest's console on this host.

A viewer that does not read must stall nobody. The serial port is read whatever the viewer does, since a guest that finds it full waits
with everything that it wants to say, its log included: beyond a bound the oldest bytes are dropped and counted. The screen's protocol
speaks when it is asked, so there a slow viewer is simply not read for.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator

import structlog

from trimtab_agent import edge
from trimtab_agent.hypervisor.base import Hypervisor
from trimtab_agent.workers import WorkerPool
from trimtab_protos import tls
from trimtab_protos.agent.v1 import console_service_pb2 as pb
from trimtab_protos.agent.v1.console_service_pb2_grpc import ConsoleServiceServicer
from trimtab_protos.console_messages import ConsoleKind
from trimtab_protos.errors import Conflict, InvalidRequest

PIECE_BYTES = 64 << 10
SERIAL_HELD_BYTES = 256 << 10
SESSIONS_MAX = {ConsoleKind.SERIAL: 1, ConsoleKind.VNC: 4}
"""Of one vm. QEMU's serial socket serves one at a time; a second one would wait unanswered."""
_KINDS = {pb.CONSOLE_KIND_SERIAL: ConsoleKind.SERIAL, pb.CONSOLE_KIND_VNC: ConsoleKind.VNC}

log = structlog.get_logger(__name__)


class ConsoleServicer(ConsoleServiceServicer):
    """The consoles of one host's guests."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        *,
        query: WorkerPool,
        authorise: Callable[[tls.AuthContext], None] = tls.require_controller,
    ) -> None:
        self._hypervisor = hypervisor
        self._query = query
        self._authorise = authorise
        self._sessions: Counter[tuple[str, ConsoleKind]] = Counter()

    @edge.stream
    async def OpenConsole(
        self, requests: AsyncIterator[pb.OpenConsoleRequest], context: edge.Context
    ) -> AsyncIterator[pb.OpenConsoleResponse]:
        self._authorise(context)
        first = await anext(aiter(requests), pb.OpenConsoleRequest())
        kind = _KINDS.get(first.kind)
        if kind is None or first.content:
            raise InvalidRequest("console-kind", "the first message names a vm and a kind, and has no content", field="kind")
        with self._seat(first.vm_id, kind):
            joined = await edge.in_pool(self._query, lambda: self._hypervisor.open_console(first.vm_id, kind))
            joined.setblocking(False)
            reader, writer = await asyncio.open_connection(sock=joined, limit=PIECE_BYTES)
            log.info("console joined", vm_id=first.vm_id, kind=kind.value)
            try:
                yield pb.OpenConsoleResponse()
                said = _drained(reader) if kind is ConsoleKind.SERIAL else _read(reader)
                async for answer in _until(said, _feed(requests, writer)):
                    yield answer
            finally:
                writer.close()
                log.info("console left", vm_id=first.vm_id, kind=kind.value)

    @contextlib.contextmanager
    def _seat(self, vm_id: str, kind: ConsoleKind) -> Iterator[None]:
        place = (vm_id, kind)
        if self._sessions[place] >= SESSIONS_MAX[kind]:
            raise Conflict(
                "console-busy",
                f"the {kind.value} console of {vm_id} has {SESSIONS_MAX[kind]} sessions open, as many as may be; end one first",
            )
        self._sessions[place] += 1
        try:
            yield
        finally:
            self._sessions[place] -= 1
            if not self._sessions[place]:
                del self._sessions[place]


async def _feed(requests: AsyncIterator[pb.OpenConsoleRequest], writer: asyncio.StreamWriter) -> None:
    """Write what the viewer sends; returns when it has sent all, or the guest's side closed."""
    with contextlib.suppress(OSError):
        async for request in requests:
            if len(request.content) > PIECE_BYTES:
                raise InvalidRequest("content-too-large", f"content: at most {PIECE_BYTES} bytes in one message", field="content")
            writer.write(request.content)
            await writer.drain()


async def _read(reader: asyncio.StreamReader) -> AsyncGenerator[pb.OpenConsoleResponse, None]:
    """Yield what the console says, read only as fast as it is taken."""
    with contextlib.suppress(OSError):
        while piece := await reader.read(PIECE_BYTES):
            yield pb.OpenConsoleResponse(content=piece)


async def _drained(reader: asyncio.StreamReader) -> AsyncGenerator[pb.OpenConsoleResponse, None]:
    """Yield what the console says, read at once and held up to a bound; what is dropped is counted."""
    held, dropped_bytes, has_ended = bytearray(), 0, False
    changed = asyncio.Event()

    async def drain() -> None:
        nonlocal dropped_bytes, has_ended
        with contextlib.suppress(OSError):
            while piece := await reader.read(PIECE_BYTES):
                held.extend(piece)
                excess_bytes = max(0, len(held) - SERIAL_HELD_BYTES)
                del held[:excess_bytes]
                dropped_bytes += excess_bytes
                changed.set()
        has_ended = True
        changed.set()

    draining = asyncio.create_task(drain())
    try:
        while True:
            await changed.wait()
            changed.clear()
            while held:
                answer = pb.OpenConsoleResponse(content=bytes(held[:PIECE_BYTES]), skipped_bytes=dropped_bytes)
                del held[:PIECE_BYTES]
                dropped_bytes = 0
                yield answer
            if has_ended:
                return
    finally:
        draining.cancel()


async def _until(
    said: AsyncGenerator[pb.OpenConsoleResponse, None], feeding: Coroutine[None, None, None]
) -> AsyncIterator[pb.OpenConsoleResponse]:
    """Yield what the console says until it ends, or the viewer has sent all; a failure to write is raised."""
    fed = asyncio.ensure_future(feeding)
    try:
        while True:
            spoken = asyncio.ensure_future(anext(said, None))
            await asyncio.wait({fed, spoken}, return_when=asyncio.FIRST_COMPLETED)
            if not spoken.done():
                spoken.cancel()
                await asyncio.gather(spoken, return_exceptions=True)
                fed.result()
                return
            answer = spoken.result()
            if answer is None:
                return
            yield answer
    finally:
        fed.cancel()
        await asyncio.gather(fed, return_exceptions=True)
        await said.aclose()
