"""A console's session over real gRPC: carried both ways, one at a time, and a viewer that does not read stalls nobody."""

import asyncio
import contextlib

import grpc
import pytest

from tests.unit.agent.servicer_kit import World, make_running_vm, world
from tests.unit.agent.waiting import until
from trimtab_agent import consoles
from trimtab_agent.hypervisor.base import Stamp
from trimtab_agent.hypervisor.kvm.consoles import join
from trimtab_controller.agents.consoles import GrpcConsoleLine, GrpcConsoles
from trimtab_protos import status, tls
from trimtab_protos.agent.v1 import console_service_pb2 as pb
from trimtab_protos.agent.v1.console_service_pb2_grpc import ConsoleServiceStub
from trimtab_protos.console_messages import ConsoleKind
from trimtab_protos.errors import Conflict, InvalidRequest, NotFound, PermissionDenied, TrimtabError, Unavailable
from trimtab_protos.messages import PowerAction

__all__ = ["world"]


class Viewer:
    """One session, as the controller holds it."""

    def __init__(
        self, channel: grpc.aio.Channel, *, vm_id: str = "vm-1", kind: "pb.ConsoleKind" = pb.CONSOLE_KIND_SERIAL
    ) -> None:
        self.channel = channel
        self.call = ConsoleServiceStub(channel).OpenConsole(timeout=60)
        self.first = pb.OpenConsoleRequest(vm_id=vm_id, kind=kind)

    async def open(self) -> "Viewer":
        try:
            await self.send(self.first)
        except grpc.aio.AioRpcError:
            # The write met the end of the call, and gRPC has forgotten why it ended: one that was refused is asked for once more.
            self.call = ConsoleServiceStub(self.channel).OpenConsole(timeout=60)
            await self.send(self.first)
        assert await self.read() == pb.OpenConsoleResponse()
        return self

    async def send(self, request: pb.OpenConsoleRequest) -> None:
        with contextlib.suppress(asyncio.InvalidStateError):  # the agent has ended the call; reading says how
            await self.call.write(request)

    async def type(self, text: bytes) -> None:
        await self.send(pb.OpenConsoleRequest(content=text))

    async def read(self) -> pb.OpenConsoleResponse | None:
        try:
            answer = await self.call.read()
        except grpc.aio.AioRpcError as error:
            raise status.from_rpc_error(error, peer="agent") from error
        return answer or None

    async def heard(self, wanted: bytes) -> bytes:
        said = b""
        while wanted not in said:
            answer = await asyncio.wait_for(self.read(), 30)
            assert answer is not None, said
            said += answer.content
        return said


async def refused(viewer: Viewer) -> TrimtabError:
    with pytest.raises(TrimtabError) as caught:
        await viewer.open()
    return caught.value


@pytest.fixture
async def running(world: World) -> World:
    host = await world.start("host-1")
    await make_running_vm(host)
    return world


async def test_bytes_go_both_ways_until_the_guest_stops(running: World) -> None:
    host = running.hosts[0]
    viewer = await Viewer(host.channel).open()
    await viewer.type(b"whoami\r")
    assert await viewer.heard(b"heard: whoami\r\n") == b"whoami\r\nheard: whoami\r\n"
    host.hypervisor.change_power("vm-1", PowerAction.FORCE_OFF, Stamp(epoch=1, turn=2))
    assert await asyncio.wait_for(viewer.read(), 30) is None
    assert await viewer.call.code() is grpc.StatusCode.OK


async def test_the_serial_port_has_one_session_at_a_time_and_the_screen_several(running: World) -> None:
    channel = running.hosts[0].channel
    first = await Viewer(channel).open()
    busy = await refused(Viewer(channel))
    assert (type(busy), busy.code) == (Conflict, "console-busy")
    screens = [await Viewer(channel, kind=pb.CONSOLE_KIND_VNC).open() for _ in range(consoles.SESSIONS_MAX[ConsoleKind.VNC])]
    assert (await refused(Viewer(channel, kind=pb.CONSOLE_KIND_VNC))).code == "console-busy"
    assert await screens[-1].heard(b"\n") == b"RFB 003.008\n"
    # Whoever leaves, in order or not, makes room.
    await first.call.done_writing()
    assert await asyncio.wait_for(first.read(), 30) is None
    second = await Viewer(channel).open()
    second.call.cancel()

    async def again() -> bool:
        try:
            await Viewer(channel).open()
        except Conflict:
            return False
        return True

    async with asyncio.timeout(30):
        while not await again():
            await asyncio.sleep(0)


async def test_a_viewer_that_does_not_read_loses_the_oldest_and_the_guest_goes_on(running: World) -> None:
    host = running.hosts[0]
    viewer = await Viewer(host.channel).open()
    sent_bytes = 4 << 20
    # The simulated guest answers with as much as is typed; nothing of it is read before all is sent and answered.
    line = b"x" * 1023 + b"\r"
    for _ in range(sent_bytes // (32 * len(line))):
        await viewer.type(line * 32)
    await viewer.type(b"last\r")
    domain = host.hypervisor.domains["vm-1"]
    await until(lambda: b"heard: last" in bytes(domain.console), what="the guest to have answered all")
    said_bytes, skipped_bytes, tail = 0, 0, b""
    while b"heard: last\r\n" not in tail:
        answer = await asyncio.wait_for(viewer.read(), 30)
        assert answer is not None
        said_bytes, skipped_bytes = said_bytes + len(answer.content), skipped_bytes + answer.skipped_bytes
        tail = (tail + answer.content)[-64:]
    assert skipped_bytes > 0
    assert said_bytes + skipped_bytes == 2 * sent_bytes + (sent_bytes // 1024) * (2 + len("heard: ")) + len(
        "last\r\nheard: last\r\n"
    )


async def test_what_is_refused_says_why(running: World) -> None:
    host = running.hosts[0]
    assert type(await refused(Viewer(host.channel, vm_id="vm-none"))) is NotFound
    assert (await refused(Viewer(host.channel, kind=pb.CONSOLE_KIND_UNSPECIFIED))).code == "console-kind"
    viewer = await Viewer(host.channel).open()
    await viewer.type(b"x" * (consoles.PIECE_BYTES + 1))
    with pytest.raises(InvalidRequest, match="at most 65536 bytes"):
        await viewer.heard(b"never")
    host.hypervisor.change_power("vm-1", PowerAction.FORCE_OFF, Stamp(epoch=1, turn=2))
    assert (await refused(Viewer(host.channel))).code == "wrong-domain-state"


async def test_only_the_controller_reaches_a_console(running: World) -> None:
    await running.start("host-2")
    stranger = running.channel(running.hosts[0].agent.address, as_name="host-2", to="host-1")
    assert type(await refused(Viewer(stranger))) is PermissionDenied
    await stranger.close()
    assert tls.CONTROLLER_NAME != "host-2"


async def test_a_refusal_that_comes_before_the_first_word_is_told_as_it_is(running: World) -> None:
    await running.start("host-2")
    stranger = running.channel(running.hosts[0].agent.address, as_name="host-2", to="host-1")
    line = GrpcConsoleLine(stranger, "host-1")
    await asyncio.wait_for(line._call.code(), 10)
    with pytest.raises(PermissionDenied):
        await asyncio.wait_for(line.open(pb.OpenConsoleRequest(vm_id="vm-1", kind=pb.CONSOLE_KIND_SERIAL)), 10)
    await line.close()


async def test_the_controllers_own_client_carries_a_session_and_tells_what_was_skipped(running: World) -> None:
    host = running.hosts[0]
    desk = GrpcConsoles(
        find=lambda _host_id: host.agent.address,
        connect=lambda host_id, address: running.channel(address, as_name=tls.CONTROLLER_NAME, to=host_id),
    )
    line = await desk.open_console("host-1", "vm-1", ConsoleKind.SERIAL)
    with pytest.raises(Conflict):
        await desk.open_console("host-1", "vm-1", ConsoleKind.SERIAL)
    await line.write(b"hello\r")
    said = b""
    while b"heard: hello" not in said:
        said += await asyncio.wait_for(line.read(), 30)
    host.hypervisor.change_power("vm-1", PowerAction.FORCE_OFF, Stamp(epoch=1, turn=2))
    while await asyncio.wait_for(line.read(), 30):
        pass
    await line.close()
    nowhere = GrpcConsoles(find=lambda _host_id: "", connect=lambda _host_id, _address: host.channel)
    with pytest.raises(Unavailable):
        await nowhere.open_console("host-1", "vm-1", ConsoleKind.SERIAL)


def test_a_guest_that_an_earlier_agent_started_is_told_how_it_gets_a_console() -> None:
    before = "<domain><devices><serial type='file'><source path='/var/log/x.log'/></serial></devices></domain>"
    with pytest.raises(Conflict, match="stop and start the vm") as caught:
        join(before, "vm-1", ConsoleKind.SERIAL)
    assert caught.value.code == "console-absent"
