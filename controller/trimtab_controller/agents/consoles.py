"""Sessions at guests' consoles over gRPC: one channel and one call each, for the API's event loop.

A channel of its own, since a viewer may fill it: commands to the host share nothing with it.
"""

import asyncio
import contextlib
from collections.abc import Callable

import grpc

from trimtab_protos.agent.v1 import console_service_pb2 as pb
from trimtab_protos.agent.v1.console_service_pb2_grpc import ConsoleServiceStub
from trimtab_protos.console_messages import ConsoleKind
from trimtab_protos.errors import TrimtabError, Unavailable
from trimtab_protos.status import from_rpc_error

OPEN_TIMEOUT_S = 10.0
# Longer than the API lets any session last: the end of a call that nobody ended.
SESSION_TIMEOUT_S = 4000.0
SKIPPED = b"\r\n[%d bytes skipped]\r\n"
_KINDS = {ConsoleKind.SERIAL: pb.CONSOLE_KIND_SERIAL, ConsoleKind.VNC: pb.CONSOLE_KIND_VNC}


class GrpcConsoles:
    """`find` returns a host's address and may block; `connect` opens a channel to (host_id, address) on the running loop."""

    def __init__(self, *, find: Callable[[str], str], connect: Callable[[str, str], grpc.aio.Channel]) -> None:
        self._find = find
        self._connect = connect

    async def open_console(self, host_id: str, vm_id: str, kind: ConsoleKind) -> "GrpcConsoleLine":
        address = await asyncio.to_thread(self._find, host_id)
        if not address:
            raise Unavailable("host-has-no-agent", f"host {host_id} never connected", host_id=host_id)
        channel = self._connect(host_id, address)
        line = GrpcConsoleLine(channel, host_id)
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                await line.open(pb.OpenConsoleRequest(vm_id=vm_id, kind=_KINDS[kind]))
        except TimeoutError as error:
            await line.close()
            raise Unavailable("peer-unreachable", f"host {host_id} did not open the console in time", host_id=host_id) from error
        except BaseException:
            await line.close()
            raise
        return line


class GrpcConsoleLine:
    """One open session; `read` and `write` may run at the same time."""

    def __init__(self, channel: grpc.aio.Channel, host_id: str) -> None:
        self._channel = channel
        self._host_id = host_id
        self._call = ConsoleServiceStub(channel).OpenConsole(timeout=SESSION_TIMEOUT_S)

    async def open(self, request: pb.OpenConsoleRequest) -> None:
        try:
            await self._ask(request)
        except grpc.aio.AioRpcError:
            # A write that meets the end of a call which the agent refuses becomes an internal error of gRPC's, and why it ended is
            # lost: an open without effect may be asked for once more.
            self._call = ConsoleServiceStub(self._channel).OpenConsole(timeout=SESSION_TIMEOUT_S)
            try:
                await self._ask(request)
            except grpc.aio.AioRpcError as failed:
                raise self._refusal(failed) from failed
        if not await self._next():
            raise Unavailable("console-closed", "the guest closed its console as it was opened")

    async def _ask(self, request: pb.OpenConsoleRequest) -> None:
        with contextlib.suppress(asyncio.InvalidStateError):  # the agent has ended the call already; reading says how
            await self._call.write(request)

    async def read(self) -> bytes:
        answer = await self._next()
        if answer is None:
            return b""
        return (SKIPPED % answer.skipped_bytes if answer.skipped_bytes else b"") + answer.content

    async def write(self, content: bytes) -> None:
        await self.write_message(pb.OpenConsoleRequest(content=content))

    async def write_message(self, request: pb.OpenConsoleRequest) -> None:
        try:
            await self._call.write(request)
        except asyncio.InvalidStateError:
            # The other side has ended the call; who reads learns how.
            await asyncio.Event().wait()
        except grpc.aio.AioRpcError as failed:
            raise self._refusal(failed) from failed

    async def close(self) -> None:
        self._call.cancel()
        await self._channel.close()

    async def _next(self) -> pb.OpenConsoleResponse | None:
        try:
            answer = await self._call.read()
        except grpc.aio.AioRpcError as failed:
            raise self._refusal(failed) from failed
        return answer if isinstance(answer, pb.OpenConsoleResponse) else None

    def _refusal(self, failed: grpc.aio.AioRpcError) -> TrimtabError:
        return from_rpc_error(failed, peer=f"agent of {self._host_id}")
