"""Image sources: uploads and peers over real gRPC, going on where they broke; files only from the import folder."""

import asyncio
import contextlib
import http.server
import os
import secrets
import socket
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import pytest_asyncio

from tests.unit.agent.factories import SHARED, host_credentials, new_fleet_authority
from tests.unit.agent.gateway_double import GatewayDouble
from tests.unit.agent.test_url_source import Web, resolves_to, web
from trimtab_agent.certificates import FixedCredentials
from trimtab_agent.hypervisor.simulated import SimulatedHost, SimulatedHypervisor
from trimtab_agent.hypervisor.simulation import SimulatedFleet
from trimtab_agent.simulated_agents import SharedResources, start_simulated_agent, stop_simulated_agent
from trimtab_agent.sources import MAX_BREAKS, Sources
from trimtab_protos.errors import Conflict, InvalidRequest, NotFound, TrimtabError, Unavailable
from trimtab_protos.messages import (
    DiskFormat,
    HostFileSource,
    ImageSource,
    ImageSpec,
    JobProgress,
    PeerSource,
    PoolSpec,
    UploadSource,
    UrlSource,
)

__all__ = ["web"]
CONTENT = secrets.token_bytes(500_000)


@dataclass
class Control:
    cancelled: threading.Event = field(default_factory=threading.Event)

    def report(self, progress: JobProgress) -> None:
        pass


class World:
    def __init__(self) -> None:
        self.authority = new_fleet_authority()
        self.gateway = GatewayDouble(self.authority)
        self.pauses: list[float] = []
        self.announced: list[int] = []
        self.control = Control()

    @property
    def sources(self) -> Sources:
        credentials = FixedCredentials(host_credentials(self.authority, "host-2"))
        resolver = resolves_to("127.0.0.1")
        return Sources(credentials, gateways=lambda: [self.gateway.address], pause=self.pauses.append, resolver=resolver)

    async def read(self, source: ImageSource, pool: PoolSpec = SHARED) -> bytes:
        blocks = self.sources.read_blocks(source, pool, self.control, on_size=self.announced.append)
        return await asyncio.to_thread(lambda: b"".join(blocks))


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    await world.gateway.start()
    yield world
    await world.gateway.stop()


async def test_an_upload_is_read_through_the_gateway(world: World) -> None:
    world.gateway.uploads["up-1"] = CONTENT
    assert await world.read(UploadSource(upload_id="up-1", size_bytes=len(CONTENT))) == CONTENT


async def test_an_upload_goes_on_where_it_broke_off(world: World) -> None:
    world.gateway.uploads["up-1"] = CONTENT
    world.gateway.breaks_upload_after = 200_000
    assert await world.read(UploadSource(upload_id="up-1", size_bytes=len(CONTENT))) == CONTENT
    assert len(world.pauses) == 1


async def test_a_gateway_that_is_gone_fails_the_transfer_after_some_attempts(world: World) -> None:
    await world.gateway.stop()
    with pytest.raises(Unavailable):
        await world.read(UploadSource(upload_id="up-1", size_bytes=1))
    assert len(world.pauses) == MAX_BREAKS


async def test_an_upload_that_is_not_there_fails_at_once(world: World) -> None:
    with pytest.raises(TrimtabError) as caught:
        await world.read(UploadSource(upload_id="up-none", size_bytes=1))
    assert not caught.value.retryable
    assert world.pauses == []


async def test_a_cancel_ends_a_transfer(world: World) -> None:
    world.gateway.uploads["up-1"] = CONTENT
    world.control.cancelled.set()
    with pytest.raises(Conflict) as caught:
        await world.read(UploadSource(upload_id="up-1", size_bytes=len(CONTENT)))
    assert caught.value.code == "job-cancelled"


@dataclass
class Stall:
    """A server that stops in the middle of what it says, where its client's user thinks better of it."""

    cancelled: threading.Event
    said: bytes
    has_lost_client: threading.Event = field(default_factory=threading.Event)

    def __call__(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.wfile.write(self.said)
        self.cancelled.set()
        handler.connection.settimeout(10)
        with contextlib.suppress(OSError):
            while handler.connection.recv(4096):
                pass
            self.has_lost_client.set()


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\nX: y", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n"])
async def test_a_cancel_ends_a_wait_for_what_a_server_does_not_say(world: World, web: Web, said: bytes) -> None:
    web.answers["/disk"] = stall = Stall(world.control.cancelled, said)
    with pytest.raises(Conflict) as caught:
        await world.read(web.source("/disk"))
    assert caught.value.code == "job-cancelled"
    assert await asyncio.to_thread(stall.has_lost_client.wait, 20), "the connection is closed at once"


async def test_a_cancel_ends_a_wait_for_a_server_that_does_not_even_shake_hands(world: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> bytes:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(10)
                connection.recv(65536)
                world.control.cancelled.set()
                return connection.recv(65536)

        serving = asyncio.create_task(asyncio.to_thread(accept))
        url = f"https://images.example:{listener.getsockname()[1]}/disk"
        with pytest.raises(Conflict) as caught:
            await world.read(UrlSource(url=url, allowed_networks=("127.0.0.0/8",)))
        assert caught.value.code == "job-cancelled"
        assert await serving == b"", "it hung up"


async def test_an_image_is_read_from_the_peer_that_its_certificate_names(world: World) -> None:
    fleet, resources = SimulatedFleet(), SharedResources()
    host = SimulatedHost(host_id="host-1")
    hypervisor = SimulatedHypervisor(fleet, host)
    image = ImageSpec(image_id="img-1", pool_id=SHARED.pool_id, format=DiskFormat.RAW)
    hypervisor.import_image(image, SHARED, HostFileSource(file_name="x"), world.control)
    wanted = Path(hypervisor.open_image("img-1", SHARED)).read_bytes()
    agent = await start_simulated_agent(fleet, host, resources=resources, credentials=host_credentials(world.authority, "host-1"))
    ticket = secrets.token_hex(32)
    agent.offers.make(image_id="img-1", pool=SHARED, ticket=ticket, peer_host_id="host-2", ttl_s=60)

    def source(host_id: str, given: str) -> PeerSource:
        return PeerSource(
            host_id=host_id,
            address=agent.address,
            pool_id=SHARED.pool_id,
            ticket=given,
            stored_sha256="",
            file_size_bytes=len(wanted),
            virtual_size_bytes=len(wanted),
        )

    with pytest.raises(Unavailable) as caught:
        await world.read(source("host-1", secrets.token_hex(32)))
    assert caught.value.code == "ticket-refused"
    assert world.pauses == [], "a ticket does not get better by waiting"
    with pytest.raises(Unavailable):
        await world.read(source("host-9", ticket))
    assert await world.read(source("host-1", ticket)) == wanted
    await stop_simulated_agent(agent)
    resources.close()
    fleet.close()


# --- the import folder ---------------------------------------------------------------------------------------------------


@pytest.fixture
def pool(tmp_path: Path) -> PoolSpec:
    (tmp_path / "pool/import").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(b"secret")
    return PoolSpec(pool_id="pool-files", path=str(tmp_path / "pool"))


async def test_a_file_of_the_import_folder_is_read(world: World, pool: PoolSpec) -> None:
    Path(pool.path, "import/disk.qcow2").write_bytes(CONTENT)
    assert await world.read(HostFileSource(file_name="disk.qcow2"), pool) == CONTENT
    assert world.announced == [len(CONTENT)]


@pytest.mark.parametrize("name", ["", "..", ".hidden", "../secret", "/etc/passwd", "sub/disk", "a\0b", "x" * 256])
async def test_a_name_that_leads_elsewhere_is_refused(world: World, pool: PoolSpec, name: str) -> None:
    with pytest.raises(InvalidRequest):
        await world.read(HostFileSource(file_name=name), pool)


async def test_links_and_pipes_in_the_import_folder_are_refused(world: World, pool: PoolSpec) -> None:
    folder = Path(pool.path, "import")
    (folder / "link").symlink_to(Path(pool.path).parent / "secret")
    os.mkfifo(folder / "pipe")
    (folder / "directory").mkdir()
    for name in ("link", "pipe", "directory"):
        with pytest.raises(InvalidRequest):
            await world.read(HostFileSource(file_name=name), pool)


async def test_a_linked_import_folder_is_refused(world: World, pool: PoolSpec) -> None:
    folder = Path(pool.path, "import")
    folder.rmdir()
    folder.symlink_to("/etc")
    with pytest.raises(InvalidRequest):
        await world.read(HostFileSource(file_name="passwd"), pool)


async def test_a_missing_file_is_not_found(world: World, pool: PoolSpec) -> None:
    with pytest.raises(NotFound):
        await world.read(HostFileSource(file_name="none.qcow2"), pool)
