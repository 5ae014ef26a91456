"""A gateway with real certificates on loopback, and machines that join it and speak to it as agents do."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from trimtab_controller import config, installation
from trimtab_controller.clock import SystemClock
from trimtab_controller.config import Settings
from trimtab_controller.core.model import Actor, Host
from trimtab_controller.pki import CONTROLLER_NAME, FleetPki
from trimtab_controller.rpc import server
from trimtab_controller.rpc.server import GatewayProcess
from trimtab_controller.services import hosts as host_service
from trimtab_controller.store import hosts
from trimtab_controller.store.database import Database
from trimtab_protos.agent.v1 import domain_pb2, inventory_pb2
from trimtab_protos.controller.v1 import gateway_service_pb2 as pb
from trimtab_protos.controller.v1 import gateway_service_pb2_grpc as pb_grpc
from trimtab_protos.controller.v1 import join_service_pb2, join_service_pb2_grpc

DEADLINE_S = 60.0
"""For what hangs: how fast a machine is, is no test's matter."""
LIBVIRT_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
"""One for all machines of a test run: making them is what is slow."""


class ShiftedClock(SystemClock):
    """The system's clocks, moved by what a test says."""

    def __init__(self) -> None:
        self.shift_s = 0.0

    def now(self) -> datetime:
        return datetime.now(UTC) + timedelta(seconds=self.shift_s)

    def boottime_s(self) -> float:
        return super().boottime_s() + self.shift_s


async def eventually(condition: Callable[[], Any], *, within_s: float = DEADLINE_S) -> Any:
    """Wait until the condition holds; return what it gave."""
    deadline = asyncio.get_running_loop().time() + within_s
    while True:
        found = condition()
        if isinstance(found, Awaitable):
            found = await found
        if found:
            return found
        assert asyncio.get_running_loop().time() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.02)


def certificate_request(key: Any, name: str = "whatever") -> str:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def host_libvirt_key() -> Any:
    return LIBVIRT_KEY


def key_pem(key: Any) -> bytes:
    pem: bytes = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return pem


def inventory(**changes: Any) -> inventory_pb2.Inventory:
    """A small host's inventory with a digest of its own."""
    found = inventory_pb2.Inventory(
        hostname="node",
        arch="x86_64",
        machine_id=uuid.uuid4().hex,
        smbios_uuid=str(uuid.uuid4()),
        boot_id="boot-1",
        kernel="6.1",
        agent_version="0.1.0",
        libvirt_version="9.0.0",
        qemu_version="7.2.22",
        accelerator="tcg",
        cpu_vendor="AMD",
        cpu_model="qemu64",
        cpus=8,
        memory_mib=16384,
        digest=uuid.uuid4().hex,
    )
    for name, value in changes.items():
        if isinstance(value, list):
            getattr(found, name).extend(value)
        else:
            setattr(found, name, value)
    return found


class AgentStream:
    """An open session, from the agent's side."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._sequence = 0

    async def send(self, request: pb.SessionRequest) -> None:
        await asyncio.wait_for(self._call.write(request), DEADLINE_S)

    async def receive(self) -> pb.SessionResponse:
        response = await asyncio.wait_for(self._call.read(), DEADLINE_S)
        if response is grpc.aio.EOF:
            raise AssertionError(f"the stream ended: {await self._call.code()} {await self._call.details()}")
        assert isinstance(response, pb.SessionResponse)
        return response

    async def beat(self, **fields: Any) -> pb.HeartbeatAck:
        """Send a heartbeat and return its ack."""
        self._sequence += 1
        beat = pb.Heartbeat(sequence=self._sequence, is_hypervisor_up=True)
        for name, value in fields.items():
            if isinstance(value, list):
                getattr(beat, name).extend(value)
            elif hasattr(value, "DESCRIPTOR"):
                getattr(beat, name).CopyFrom(value)
            else:
                setattr(beat, name, value)
        await self.send(pb.SessionRequest(heartbeat=beat))
        while True:
            response = await self.receive()
            if response.WhichOneof("body") == "heartbeat_ack":
                if response.heartbeat_ack.sequence < self._sequence:
                    continue  # one that waited for the record of what it said, granted late
                assert response.heartbeat_ack.sequence == self._sequence
                return response.heartbeat_ack

    async def put(self, *items: pb.OutboxItem) -> int:
        """Send an outbox batch; return the sequence that is durable."""
        await self.send(pb.SessionRequest(outbox=pb.Outbox(items=items)))
        while True:
            response = await self.receive()
            if response.WhichOneof("body") == "outbox_ack":
                return response.outbox_ack.sequence

    async def end(self) -> tuple[grpc.StatusCode, str]:
        """Return with what the gateway ended the stream."""
        with suppress(grpc.aio.AioRpcError):
            while await asyncio.wait_for(self._call.read(), DEADLINE_S) is not grpc.aio.EOF:
                continue
        return await self._call.code(), await self._call.details()

    def cancel(self) -> None:
        self._call.cancel()


@dataclass
class Machine:
    """A machine that may become a host."""

    fleet: "Fleet"
    name: str
    machine_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    smbios_uuid: str = field(default_factory=lambda: str(uuid.uuid4()))
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    host_id: str = ""
    certificate_pem: bytes = b""
    ca_pem: bytes = b""
    skew_s: float = 0.0
    _channels: list[Any] = field(default_factory=list)

    def facts(self, **changes: Any) -> join_service_pb2.HostFacts:
        sent = self.fleet.clock.now().timestamp() + self.skew_s
        values: dict[str, Any] = {
            "name": self.name,
            "machine_id": self.machine_id,
            "smbios_uuid": self.smbios_uuid,
            "agent_version": "0.1.0",
            "agent_address": "127.0.0.1:8446",
            "migration_address": "127.0.0.1",
            "sent_unix_ms": int(sent * 1000),
        }
        return join_service_pb2.HostFacts(**{**values, **changes})

    def _join_stub(self) -> join_service_pb2_grpc.JoinServiceStub:
        credentials = grpc.ssl_channel_credentials(self.fleet.pki.bundle_pem().encode())
        channel = grpc.aio.secure_channel(
            f"127.0.0.1:{self.fleet.process.join_port}",
            credentials,
            options=[("grpc.ssl_target_name_override", CONTROLLER_NAME), ("grpc.use_local_subchannel_pool", 1)],
        )
        self._channels.append(channel)
        return join_service_pb2_grpc.JoinServiceStub(channel)

    async def check(self, token: str, **facts: Any) -> list[str]:
        request = join_service_pb2.CheckJoinRequest(token=token, facts=self.facts(**facts))
        return list((await self._join_stub().CheckJoin(request, timeout=DEADLINE_S)).refusals)

    async def join(
        self, token: str, *, request: str = "", proof: bytes = b"", previous_pem: bytes = b"", **facts: Any
    ) -> "Machine":
        joining = join_service_pb2.JoinRequest(
            token=token,
            facts=self.facts(**facts),
            agent_csr_pem=request or certificate_request(self.key),
            libvirt_csr_pem=certificate_request(LIBVIRT_KEY),
            rejoin_proof=proof,
            previous_certificate_pem=previous_pem.decode(),
        )
        response = await self._join_stub().Join(joining, timeout=DEADLINE_S)
        self.host_id = response.host_id
        self.certificate_pem = response.agent_certificate_pem.encode()
        self.ca_pem = response.ca_bundle_pem.encode()
        self.libvirt_certificate_pem = response.libvirt_certificate_pem.encode()
        return self

    def stub(self, **credentials: bytes) -> pb_grpc.GatewayServiceStub:
        """Connect with the machine's own certificate, or with what the test gives."""
        return self.stub_at(self.fleet.process.host_port, **credentials)

    def stub_at(self, port: int, **credentials: bytes) -> pb_grpc.GatewayServiceStub:
        chosen = {"root": self.ca_pem, "key": key_pem(self.key), "certificate": self.certificate_pem, **credentials}
        channel = grpc.aio.secure_channel(
            f"127.0.0.1:{port}",
            grpc.ssl_channel_credentials(chosen["root"], chosen["key"] or None, chosen["certificate"] or None),
            options=[("grpc.ssl_target_name_override", CONTROLLER_NAME), ("grpc.use_local_subchannel_pool", 1)],
        )
        self._channels.append(channel)
        return pb_grpc.GatewayServiceStub(channel)

    async def say_hello(self, *, stub: pb_grpc.GatewayServiceStub | None = None, **hello: Any) -> AgentStream:
        """Open the stream and send a Hello; whether it is welcome is the test's to see."""
        values: dict[str, Any] = {
            "host_id": self.host_id,
            "incarnation": "inc-1",
            "boot_id": "boot-1",
            "inventory": inventory(),
            "agent_address": "127.0.0.1:8446",
        }
        stream = AgentStream((stub or self.stub()).Session())
        # One that is refused by its certificate may be ended before the Hello was written: `end` has what for.
        with suppress(grpc.aio.AioRpcError):
            await stream.send(pb.SessionRequest(hello=pb.Hello(**{**values, **hello})))
        return stream

    async def open(self, **hello: Any) -> tuple[AgentStream, pb.Welcome]:
        stream = await self.say_hello(**hello)
        response = await stream.receive()
        assert response.WhichOneof("body") == "welcome"
        return stream, response.welcome

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()


@dataclass
class Fleet:
    settings: Settings
    database: Database
    clock: ShiftedClock
    process: GatewayProcess
    nudges: list[int]
    machines: list[Machine] = field(default_factory=list)

    @property
    def pki(self) -> FleetPki:
        return FleetPki(self.settings.pki_dir)

    def token(self, name: str, **options: Any) -> str:
        place = installation.join_place(self.settings)
        return self.database.write(
            lambda session: host_service.create_token(
                session, name, Actor(name="admin"), self.clock.now(), place=place, **options
            )
        ).secret

    def machine(self, name: str, **options: Any) -> Machine:
        made = Machine(self, name, **options)
        self.machines.append(made)
        return made

    async def member(self, name: str) -> Machine:
        """Return a machine that has joined."""
        return await self.machine(name).join(self.token(name))

    def host(self, host_id: str) -> Host:
        return self.database.read(lambda session: hosts.get(session, host_id))

    def kinds_of_events(self, subject_id: str) -> list[str]:
        return [event.kind for event in self.events(subject_id)]

    def events(self, subject_id: str) -> list[Any]:
        from trimtab_controller.store import events

        return list(self.database.read(lambda session: events.page_after(session, 0, limit=500, subject_id=subject_id)))


ON_BOTH_DATABASES = pytest.mark.parametrize(
    "fleet", ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)], indirect=True
)


@pytest.fixture
async def fleet(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Fleet]:
    """A founded fleet with a running gateway and no hosts; on SQLite unless the test says otherwise."""
    url = request.getfixturevalue(f"{getattr(request, 'param', 'sqlite')}_url")
    redis_url = f"unix://{tmp_path}/no-redis.sock"
    # Longer windows than a fleet has: these tests tell the edges apart by whole seconds.
    settings = config.load(
        data_dir=tmp_path / "fleet",
        advertise="127.0.0.1",
        database_url=url,
        redis_url=redis_url,
        suspect_after_s=15.0,
        lost_after_s=60.0,
    )
    clock = ShiftedClock()
    installation.found(settings, clock, {})
    database = Database(settings.effective_database_url)
    nudges: list[int] = []
    process = await server.start(
        settings,
        database,
        clock=clock,
        nudge=lambda: nudges.append(1),
        host_address="127.0.0.1:0",
        join_address="127.0.0.1:0",
    )
    made = Fleet(settings, database, clock, process, nudges)
    yield made
    for machine in made.machines:
        await machine.close()
    # A test may have started another one, over a copy.
    await made.process.stop()
    made.database.close()


async def silent_for(fleet: Fleet, seconds: float) -> None:
    """Let time pass with a gateway that is well: its right is renewed and its clockwork ticked all along."""
    for _second in range(int(seconds)):
        fleet.clock.shift_s += 1
        await fleet.process.gateway.right.renew()
        await fleet.process.watch.judge()


def domain(vm_id: str, state: str = "RUNNING", *, epoch: int = 1, reason: str = "NONE", **fields: Any) -> Any:
    return domain_pb2.DomainObservation(
        vm_id=vm_id,
        uuid=str(uuid.uuid4()),
        name=vm_id,
        state=domain_pb2.DomainState.Value(f"DOMAIN_STATE_{state}"),
        reason=domain_pb2.StateReason.Value(f"STATE_REASON_{reason}"),
        epoch=epoch,
        **fields,
    )
