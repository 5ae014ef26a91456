"""The servicer over a simulated host, through real gRPC with the fleet's certificates."""

import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from tests.unit.agent.factories import (
    LOCAL,
    NETWORK,
    SHARED,
    command_key,
    domain_spec,
    host_credentials,
    new_fleet_authority,
    volume_spec,
)
from tests.unit.agent.waiting import until
from trimtab_agent.agent import Agent
from trimtab_agent.hypervisor.simulated import SimulatedHost, SimulatedHypervisor
from trimtab_agent.hypervisor.simulation import Fault, FaultKind, SimulatedFleet
from trimtab_agent.simulated_agents import SharedResources, start_simulated_agent, stop_simulated_agent
from trimtab_controller.pki import SigningAuthority
from trimtab_protos import status, tls
from trimtab_protos.agent.v1 import agent_service_pb2 as pb
from trimtab_protos.agent.v1 import command_pb2, domain_pb2, inventory_pb2, storage_pb2
from trimtab_protos.agent.v1.agent_service_pb2_grpc import AgentServiceStub, ReplicaServiceStub
from trimtab_protos.codec import from_proto, to_proto
from trimtab_protos.errors import (
    Conflict,
    Internal,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    TrimtabError,
    Unavailable,
)
from trimtab_protos.messages import CommandKey, DomainSpec, Inventory, MigrationOptions, PoolSpec, VolumeSpec

TIMEOUT_S = 10.0
LEASE = 1


@dataclass
class Host:
    """One simulated host with its agent, and a stub that calls it as the controller does."""

    agent: Agent
    hypervisor: SimulatedHypervisor
    channel: grpc.aio.Channel
    stub: AgentServiceStub

    async def call(self, verb: str, request: object) -> object:
        return await call(self.stub, verb, request)


async def call(stub: object, verb: str, request: object) -> object:
    try:
        return await getattr(stub, verb)(request, timeout=TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        raise status.from_rpc_error(error, peer="agent") from error


class World:
    def __init__(self) -> None:
        self.authority: SigningAuthority = new_fleet_authority()
        self.fleet = SimulatedFleet()
        self.resources = SharedResources()
        self.hosts: list[Host] = []

    def channel(self, address: str, *, as_name: str, to: str) -> grpc.aio.Channel:
        credentials = host_credentials(self.authority, as_name)
        options = tls.channel_options(to, is_own_connection=True)
        return grpc.aio.secure_channel(address, credentials.for_channel(), options=options)

    async def start(self, host_id: str, *, has_lease: bool = True) -> Host:
        agent = await start_simulated_agent(
            self.fleet,
            SimulatedHost(host_id=host_id),
            resources=self.resources,
            credentials=host_credentials(self.authority, host_id),
        )
        await until(lambda: agent.replay.is_rebuilt, what="the journal's rebuild")
        if has_lease:
            agent.grant_lease(number=LEASE, ttl_s=60.0)
        channel = self.channel(agent.address, as_name=tls.CONTROLLER_NAME, to=host_id)
        host = Host(agent, self.fleet.hosts[host_id], channel, AgentServiceStub(channel))
        self.hosts.append(host)
        return host

    async def stop(self, host: Host) -> None:
        self.hosts.remove(host)
        await host.channel.close()
        await stop_simulated_agent(host.agent)


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    yield world
    for host in list(world.hosts):
        await world.stop(host)
    world.resources.close()
    world.fleet.close()


@pytest_asyncio.fixture
async def host(world: World) -> Host:
    return await world.start("host-1")


def key(**given: object) -> command_pb2.CommandKey:
    return to_proto(command_key(**given), command_pb2.CommandKey)


def pool_message(pool: PoolSpec = SHARED) -> storage_pb2.PoolSpec:
    return to_proto(pool, storage_pb2.PoolSpec)


def volume_request(volume: VolumeSpec | None = None, **given: object) -> pb.EnsureVolumeRequest:
    volume = volume or volume_spec()
    return pb.EnsureVolumeRequest(
        key=key(step="volume", **given), volume=to_proto(volume, storage_pb2.VolumeSpec), pool=pool_message()
    )


def define_request(domain: DomainSpec | None = None, **given: object) -> pb.DefineDomainRequest:
    domain = domain or domain_spec()
    return pb.DefineDomainRequest(
        key=key(**{"subject_id": domain.vm_id, **given}), domain=to_proto(domain, domain_pb2.DomainSpec)
    )


def power_request(action: pb.PowerAction, vm_id: str = "vm-1", **given: object) -> pb.ChangePowerRequest:
    return pb.ChangePowerRequest(key=key(**{"step": "power", "subject_id": vm_id, **given}), vm_id=vm_id, action=action)


async def make_running_vm(host: Host, domain: DomainSpec | None = None) -> None:
    await host.call("EnsureVolume", volume_request())
    await host.call("DefineDomain", define_request(domain))
    await host.call("ChangePower", power_request(pb.POWER_ACTION_START))


async def refusal(host: Host, verb: str, request: object) -> TrimtabError:
    with pytest.raises(TrimtabError) as caught:
        await host.call(verb, request)
    return caught.value


# --- who may call ------------------------------------------------------------------------------------------------------------


async def test_the_controller_reads_the_inventory(host: Host) -> None:
    answer = await host.call("GetInventory", pb.GetInventoryRequest())
    assert isinstance(answer, pb.GetInventoryResponse)
    found = from_proto(answer.inventory, Inventory)
    assert (found.hostname, answer.incarnation) == ("host-1", host.agent.incarnation)
    assert [certificate.purpose for certificate in found.certificates] == ["agent"]
    assert len(found.digest) == 64


async def test_another_hosts_certificate_may_not_command(world: World, host: Host) -> None:
    channel = world.channel(host.agent.address, as_name="host-2", to="host-1")
    with pytest.raises(PermissionDenied) as caught:
        await call(AgentServiceStub(channel), "ListDomains", pb.ListDomainsRequest())
    assert caught.value.code == "peer-not-the-controller"
    await channel.close()


async def test_a_certificate_of_another_fleet_is_not_even_heard(world: World, host: Host) -> None:
    foreign = World()
    channel = foreign.channel(host.agent.address, as_name=tls.CONTROLLER_NAME, to="host-1")
    with pytest.raises(Unavailable):
        await call(AgentServiceStub(channel), "ListDomains", pb.ListDomainsRequest())
    await channel.close()
    foreign.resources.close()


async def test_renewed_credentials_count_from_the_next_connection(world: World, host: Host) -> None:
    renewed = host_credentials(world.authority, "host-1")
    assert host.agent.parts.credentials is not None
    host.agent.parts.credentials.replace(renewed)
    channel = world.channel(host.agent.address, as_name=tls.CONTROLLER_NAME, to="host-1")
    answer = await call(AgentServiceStub(channel), "GetInventory", pb.GetInventoryRequest())
    assert isinstance(answer, pb.GetInventoryResponse)
    assert answer.inventory.certificates[0].serial == f"{renewed.certificate().serial_number:x}"
    # The connection that was open before goes on.
    assert await host.call("GetInventory", pb.GetInventoryRequest()) == answer
    await channel.close()


async def test_without_certificates_an_agent_serves_on_a_unix_socket_only(world: World, tmp_path: Path) -> None:
    with pytest.raises(Internal):
        await start_simulated_agent(world.fleet, SimulatedHost(host_id="host-8"), resources=world.resources, credentials=None)
    address = f"unix:{tmp_path}/agent.sock"
    agent = await start_simulated_agent(
        world.fleet, SimulatedHost(host_id="host-9"), resources=world.resources, credentials=None, listen_address=address
    )
    async with grpc.aio.insecure_channel(address) as channel:
        answer = await call(AgentServiceStub(channel), "GetInventory", pb.GetInventoryRequest())
    assert isinstance(answer, pb.GetInventoryResponse)
    assert answer.inventory.hostname == "host-9"
    await stop_simulated_agent(agent)


# --- a vm's life -------------------------------------------------------------------------------------------------------------


async def test_a_vm_is_made_started_stopped_and_removed(host: Host) -> None:
    await make_running_vm(host)
    seen = await host.call("GetDomain", pb.GetDomainRequest(vm_id="vm-1"))
    assert isinstance(seen, pb.GetDomainResponse)
    assert (seen.domain.state, seen.domain.epoch) == (domain_pb2.DOMAIN_STATE_RUNNING, 1)

    console = await host.call("ReadConsole", pb.ReadConsoleRequest(vm_id="vm-1", offset=-1000))
    assert isinstance(console, pb.ReadConsoleResponse)
    assert console.content == b"GUEST UP vm-1\n"

    off = await host.call("ChangePower", power_request(pb.POWER_ACTION_FORCE_OFF))
    assert isinstance(off, pb.ChangePowerResponse)
    assert off.domain.reason == domain_pb2.STATE_REASON_DESTROYED

    await host.call("UndefineDomain", pb.UndefineDomainRequest(key=key(step="remove"), vm_id="vm-1", pools=[pool_message()]))
    await host.call(
        "DeleteVolume",
        pb.DeleteVolumeRequest(
            key=key(step="erase"), volume_id="vol-1", pool=pool_message(), format=storage_pb2.DISK_FORMAT_QCOW2
        ),
    )
    gone = await host.call("GetDomain", pb.GetDomainRequest(vm_id="vm-1"))
    assert isinstance(gone, pb.GetDomainResponse)
    assert gone.domain.state == domain_pb2.DOMAIN_STATE_ABSENT


async def test_domains_are_paged_by_name(host: Host) -> None:
    for number in range(5):
        vm_id = f"vm-{number}"
        await host.call("DefineDomain", define_request(domain_spec(vm_id, disks=())))
    names: list[str] = []
    token = ""
    while True:
        page = await host.call("ListDomains", pb.ListDomainsRequest(page_size=2, page_token=token))
        assert isinstance(page, pb.ListDomainsResponse)
        assert len(page.domains) <= 2
        names += [domain.vm_id for domain in page.domains]
        token = page.next_page_token
        if not token:
            break
    assert names == [f"vm-{number}" for number in range(5)]


async def test_a_bridge_that_is_missing_is_an_answer_that_is_looked_at_again(host: Host) -> None:
    network = to_proto(NETWORK, domain_pb2.NetworkSpec)
    network.kind, network.bridge, network.mtu = domain_pb2.NETWORK_KIND_BRIDGE, "br9", 1500
    request = pb.EnsureNetworkRequest(key=key(subject_id="net-1", epoch=0), network=network)
    answer = await host.call("EnsureNetwork", request)
    assert isinstance(answer, pb.EnsureNetworkResponse)
    assert not answer.is_reachable
    assert "br9" in answer.problem
    host.hypervisor.host = SimulatedHost(
        host_id="host-1", bridges=(*host.hypervisor.host.bridges, type(host.hypervisor.host.bridges[0])(name="br9"))
    )
    again = await host.call("EnsureNetwork", request)
    assert isinstance(again, pb.EnsureNetworkResponse)
    assert again.is_reachable


# --- commands ----------------------------------------------------------------------------------------------------------------


async def test_a_repeated_command_gets_the_recorded_answer_and_does_nothing(host: Host) -> None:
    await make_running_vm(host)
    request = power_request(pb.POWER_ACTION_FORCE_OFF)
    first = await host.call("ChangePower", request)
    await host.call("ChangePower", power_request(pb.POWER_ACTION_START))
    assert await host.call("ChangePower", request) == first
    assert host.hypervisor.domains["vm-1"].state == "running"


async def test_a_command_joins_its_own_repetition_that_is_under_way(world: World, host: Host) -> None:
    await host.call("EnsureVolume", volume_request())
    await host.call("DefineDomain", define_request())
    fault = world.fleet.plan_fault("change_power", Fault(FaultKind.HANG))
    request = power_request(pb.POWER_ACTION_START)
    first = host.stub.ChangePower(request, timeout=TIMEOUT_S)
    await until(fault.met.is_set, what="the first call's hang")
    second = host.stub.ChangePower(request, timeout=TIMEOUT_S)
    other = power_request(pb.POWER_ACTION_FORCE_OFF)
    other.key.CopyFrom(request.key)
    assert (await refusal(host, "ChangePower", other)).code == "key-reused"
    fault.released.set()
    assert await first == await second
    assert host.hypervisor.domains["vm-1"].starts == 1


async def test_a_command_goes_on_after_its_callers_deadline_and_is_recorded(world: World, host: Host) -> None:
    await host.call("EnsureVolume", volume_request())
    await host.call("DefineDomain", define_request())
    fault = world.fleet.plan_fault("change_power", Fault(FaultKind.HANG))
    request = power_request(pb.POWER_ACTION_START)
    with pytest.raises(grpc.aio.AioRpcError):
        await host.stub.ChangePower(request, timeout=0.3)
    assert fault.met.is_set()
    fault.released.set()
    answer = await host.call("ChangePower", request)
    assert isinstance(answer, pb.ChangePowerResponse)
    assert answer.domain.starts == 1


async def test_two_commands_on_one_vm_never_overlap_and_another_vm_does_not_wait(world: World, host: Host) -> None:
    await make_running_vm(host)
    await host.call("DefineDomain", define_request(domain_spec("vm-2", disks=())))
    fault = world.fleet.plan_fault("change_power", Fault(FaultKind.HANG))
    slow = host.stub.ChangePower(power_request(pb.POWER_ACTION_PAUSE), timeout=TIMEOUT_S)
    await until(fault.met.is_set, what="the slow call's hang")
    waiting = host.stub.ChangePower(power_request(pb.POWER_ACTION_FORCE_OFF), timeout=TIMEOUT_S)
    await host.call("ChangePower", power_request(pb.POWER_ACTION_START, "vm-2"))
    assert host.hypervisor.domains["vm-1"].state == "running"
    assert not waiting.done()
    fault.released.set()
    assert (await slow).domain.state == domain_pb2.DOMAIN_STATE_PAUSED
    assert (await waiting).domain.state == domain_pb2.DOMAIN_STATE_STOPPED


async def test_the_older_driver_is_refused_by_its_turn(host: Host) -> None:
    await make_running_vm(host)
    await host.call("ChangePower", power_request(pb.POWER_ACTION_PAUSE, turn=7))
    error = await refusal(host, "ChangePower", power_request(pb.POWER_ACTION_RESUME, turn=6))
    assert (type(error), error.code) == (Conflict, "stale-turn")


async def test_a_start_without_the_hosts_lease_is_refused_and_a_stop_is_not(world: World) -> None:
    host = await world.start("host-1", has_lease=False)
    await host.call("EnsureVolume", volume_request())
    assert (await refusal(host, "DefineDomain", define_request())).code == "no-lease"
    host.agent.grant_lease(number=4, ttl_s=60.0)
    assert (await refusal(host, "DefineDomain", define_request(lease_number=3))).code == "no-lease"
    assert (await refusal(host, "DefineDomain", define_request(lease_number=0))).code == "no-lease"
    await host.call("DefineDomain", define_request(lease_number=4))
    await host.call("UndefineDomain", pb.UndefineDomainRequest(key=key(lease_number=0), vm_id="vm-1", kill_if_running=True))
    assert "vm-1" not in host.hypervisor.domains


async def test_a_command_of_another_incarnation_is_refused(host: Host) -> None:
    assert (await refusal(host, "DefineDomain", define_request(incarnation="inc-other"))).code == "other-incarnation"
    await host.call("EnsureVolume", volume_request(incarnation=host.agent.incarnation))


async def test_a_late_effect_does_not_follow_its_own_undo(host: Host) -> None:
    from trimtab_protos.messages import Direction

    undo = pb.UndefineDomainRequest(key=key(operation_id="op-late", direction=Direction.UNDO), vm_id="vm-1", kill_if_running=True)
    await host.call("UndefineDomain", undo)
    assert (await refusal(host, "DefineDomain", define_request(operation_id="op-late"))).code == "already-undone"
    assert "vm-1" not in host.hypervisor.domains


async def test_a_retryable_failure_is_tried_again_and_a_final_one_is_remembered(world: World, host: Host) -> None:
    request = volume_request(turn=3)
    world.fleet.plan_fault("ensure_volume", Fault(FaultKind.FAIL_BEFORE, Unavailable("hypervisor-down", "no answer")))
    assert isinstance(await refusal(host, "EnsureVolume", request), Unavailable)
    await host.call("EnsureVolume", request)

    other = volume_request(volume_spec("vol-2"), turn=3)
    world.fleet.plan_fault("ensure_volume", Fault(FaultKind.FAIL_BEFORE, Conflict("volume-differs", "another one")))
    assert (await refusal(host, "EnsureVolume", other)).code == "volume-differs"
    assert (await refusal(host, "EnsureVolume", other)).code == "volume-differs"
    assert "vol-2" not in world.fleet.store("host-1", SHARED).volumes
    other.key.turn = 4
    await host.call("EnsureVolume", other)


async def test_a_defect_of_ours_reaches_the_peer_without_a_traceback(world: World, host: Host) -> None:
    def broken(*_args: object) -> None:
        raise RuntimeError("secret path /etc/shadow")

    host.hypervisor.ensure_volume = broken  # type: ignore[method-assign,assignment]
    error = await refusal(host, "EnsureVolume", volume_request())
    assert isinstance(error, Internal)
    assert "shadow" not in str(error) + str(error.context)


@pytest.mark.parametrize(
    ("verb", "request_message", "code"),
    [
        ("EnsureVolume", pb.EnsureVolumeRequest(), "enum-value-unknown"),
        ("RemovePool", pb.RemovePoolRequest(pool_id="pool-1"), "key-missing"),
        ("RemovePool", pb.RemovePoolRequest(key=key(turn=0), pool_id="pool-1"), "key-invalid"),
        ("RemovePool", pb.RemovePoolRequest(key=key(subject_id=""), pool_id="pool-1"), "key-invalid"),
        ("RemovePool", pb.RemovePoolRequest(key=key(step="x" * 300), pool_id="pool-1"), "key-invalid"),
        ("ChangePower", power_request(pb.POWER_ACTION_START, "vm-2", subject_id="vm-1"), "subject-mismatch"),
        ("ChangePower", power_request(pb.POWER_ACTION_UNSPECIFIED), "action-unknown"),
        ("StartImageImport", pb.StartImageImportRequest(key=key()), "source-missing"),
        ("ListDomains", pb.ListDomainsRequest(page_size=5000), "page-size-out-of-range"),
        ("GetJob", pb.GetJobRequest(operation_id="op-1", step="x"), "direction-missing"),
    ],
)
async def test_a_request_that_makes_no_sense_is_refused_with_its_reason(
    host: Host, verb: str, request_message: object, code: str
) -> None:
    error = await refusal(host, verb, request_message)
    assert (type(error), error.code) == (InvalidRequest, code)


# --- jobs --------------------------------------------------------------------------------------------------------------------


def import_request(**given: object) -> pb.StartImageImportRequest:
    return pb.StartImageImportRequest(
        key=key(**{"step": "import", "subject_id": "img-1", "epoch": 0, **given}),
        image=storage_pb2.ImageSpec(
            image_id="img-1", pool_id=SHARED.pool_id, format=storage_pb2.DISK_FORMAT_QCOW2, max_bytes=1 << 30
        ),
        pool=pool_message(),
        host_file=storage_pb2.HostFileSource(file_name="guest.qcow2"),
    )


async def wait_for_job(host: Host, job_key: command_pb2.CommandKey) -> pb.Job:
    last = pb.Job()

    async def is_ended() -> bool:
        nonlocal last
        answer = await host.call(
            "GetJob", pb.GetJobRequest(operation_id=job_key.operation_id, step=job_key.step, direction=job_key.direction)
        )
        assert isinstance(answer, pb.GetJobResponse)
        last = answer.job
        return last.state != command_pb2.JOB_STATE_RUNNING

    for _attempt in range(500):
        if await is_ended():
            return last
    raise AssertionError(f"job did not end: {last}")


async def test_an_import_is_a_job_that_its_key_finds(host: Host) -> None:
    request = import_request()
    begun = await host.call("StartImageImport", request)
    assert isinstance(begun, pb.StartImageImportResponse)
    job = await wait_for_job(host, request.key)
    assert job.state == command_pb2.JOB_STATE_SUCCEEDED
    assert job.image.virtual_size_bytes == 1 << 30
    assert job.sequence > begun.job.sequence
    found = await host.call("StartImageImport", request)
    assert isinstance(found, pb.StartImageImportResponse)
    assert found.job == job
    listed = await host.call("ListJobs", pb.ListJobsRequest())
    assert isinstance(listed, pb.ListJobsResponse)
    assert list(listed.jobs) == [job]


async def test_an_unknown_job_is_not_found(host: Host) -> None:
    request = pb.GetJobRequest(operation_id="op-none", step="x", direction=command_pb2.DIRECTION_DO)
    assert isinstance(await refusal(host, "GetJob", request), NotFound)


async def test_an_image_is_copied_from_a_peer_with_a_ticket(world: World, host: Host) -> None:
    request = import_request()
    await host.call("StartImageImport", request)
    result = (await wait_for_job(host, request.key)).image
    ticket = secrets.token_hex(32)
    offer = pb.OfferImageRequest(
        key=key(subject_id="img-1", step="offer", epoch=0),
        image_id="img-1",
        pool=pool_message(),
        format=storage_pb2.DISK_FORMAT_QCOW2,
        ticket=ticket,
        ttl_s=60,
        peer_host_id="host-2",
    )
    answer = await host.call("OfferImage", offer)
    assert isinstance(answer, pb.OfferImageResponse)

    async def read(as_name: str, given: str, offset: int = 0) -> bytes:
        channel = world.channel(answer.address, as_name=as_name, to="host-1")
        try:
            blocks = ReplicaServiceStub(channel).ReadImage(
                pb.ReadImageRequest(image_id="img-1", ticket=given, offset=offset), timeout=TIMEOUT_S
            )
            return b"".join([block.content async for block in blocks])
        except grpc.aio.AioRpcError as error:
            raise status.from_rpc_error(error, peer="host-1") from error
        finally:
            await channel.close()

    for as_name, given in (("host-3", ticket), ("host-2", secrets.token_hex(32))):
        with pytest.raises(Unavailable) as caught:
            await read(as_name, given)
        assert caught.value.code == "ticket-refused"
    with pytest.raises(PermissionDenied):
        await read(tls.CONTROLLER_NAME, ticket)
    content = await read("host-2", ticket)
    assert len(content) == result.file_size_bytes
    with pytest.raises(Unavailable):
        await read("host-2", ticket)
    # The command's repetition brings another ticket, as after the source's agent was started anew.
    offer.ticket = secrets.token_hex(32)
    await host.call("OfferImage", offer)
    assert await read("host-2", offer.ticket, offset=result.file_size_bytes - 5) == content[-5:]


# --- migration ---------------------------------------------------------------------------------------------------------------


async def prepare(target: Host, domain: DomainSpec, **given: object) -> pb.PrepareMigrationResponse:
    answer = await target.call(
        "PrepareMigration",
        pb.PrepareMigrationRequest(
            key=key(**{"step": "prepare", "epoch": 2, **given}),
            domain=to_proto(domain, domain_pb2.DomainSpec),
            source_host_id="host-1",
        ),
    )
    assert isinstance(answer, pb.PrepareMigrationResponse)
    return answer


def migration_request(ready: pb.PrepareMigrationResponse, domain: DomainSpec, **given: object) -> pb.StartMigrationRequest:
    return pb.StartMigrationRequest(
        key=key(**{"step": "migrate", **given}),
        vm_id=domain.vm_id,
        libvirt_uri=ready.libvirt_uri,
        migration_uri=ready.migration_uri,
        options=to_proto(MigrationOptions(), pb.MigrationOptions),
        next_epoch=2,
        target_domain=to_proto(domain, domain_pb2.DomainSpec),
    )


async def test_a_guest_migrates_and_both_sides_settle(world: World, host: Host) -> None:
    target = await world.start("host-2")
    domain = domain_spec()
    await make_running_vm(host, domain)
    request = migration_request(await prepare(target, domain), domain)
    await host.call("StartMigration", request)
    job = await wait_for_job(host, request.key)
    assert job.state == command_pb2.JOB_STATE_SUCCEEDED
    assert world.fleet.running_hosts("vm-1") == {"host-2"}
    keep = pb.SettleMigrationRequest(
        key=key(step="settle", epoch=2),
        vm_id="vm-1",
        side=pb.MIGRATION_SIDE_KEEP,
        domain=to_proto(domain, domain_pb2.DomainSpec),
    )
    kept = await target.call("SettleMigration", keep)
    assert isinstance(kept, pb.SettleMigrationResponse)
    assert (kept.domain.state, kept.domain.epoch) == (domain_pb2.DOMAIN_STATE_RUNNING, 2)
    keep.key.epoch, keep.side = 1, pb.MIGRATION_SIDE_REMOVE
    removed = await host.call("SettleMigration", keep)
    assert isinstance(removed, pb.SettleMigrationResponse)
    assert removed.domain.state == domain_pb2.DOMAIN_STATE_ABSENT
    assert world.fleet.double_runs == []


async def test_a_migration_is_cancelled_and_the_guest_stays(world: World, host: Host) -> None:
    target = await world.start("host-2")
    domain = domain_spec()
    await make_running_vm(host, domain)
    world.fleet.memory_rate_bytes_s = 1 << 20
    request = migration_request(await prepare(target, domain), domain)
    await host.call("StartMigration", request)
    await until(lambda: "vm-1" in target.hypervisor.domains, what="the copying")
    await host.call("CancelJob", pb.CancelJobRequest(key=request.key))
    job = await wait_for_job(host, request.key)
    assert (job.state, job.error.code) == (command_pb2.JOB_STATE_CANCELLED, "job-cancelled")
    assert world.fleet.running_hosts("vm-1") == {"host-1"}
    assert "vm-1" not in target.hypervisor.domains
    stale = pb.CancelJobRequest(key=request.key)
    await host.call("ChangePower", power_request(pb.POWER_ACTION_PAUSE, turn=9))
    assert (await refusal(host, "CancelJob", stale)).code == "stale-turn"


async def test_a_restarted_agent_attaches_to_the_migration_that_goes_on(world: World, host: Host) -> None:
    target = await world.start("host-2")
    domain = domain_spec()
    await make_running_vm(host, domain)
    fault = world.fleet.plan_fault("migrate.copying", Fault(FaultKind.HANG))
    request = migration_request(await prepare(target, domain), domain)
    await host.call("StartMigration", request)
    await until(fault.met.is_set, what="the migration's middle")
    incarnation = host.agent.incarnation
    await world.stop(host)
    again = await world.start("host-1", has_lease=False)
    assert again.agent.incarnation == incarnation
    again.agent.grant_lease(number=2, ttl_s=60.0)
    await until(lambda: host.hypervisor.migrations["vm-1"].attached == 1, what="the attaching")
    fault.released.set()
    job = await wait_for_job(again, request.key)
    assert job.state == command_pb2.JOB_STATE_SUCCEEDED
    assert world.fleet.running_hosts("vm-1") == {"host-2"}


async def test_a_key_is_remembered_over_an_agents_restart_and_not_over_a_boot(world: World, host: Host) -> None:
    await make_running_vm(host)
    request = power_request(pb.POWER_ACTION_START)
    recorded = await host.call("ChangePower", request)
    await world.stop(host)
    again = await world.start("host-1")
    host.hypervisor.stop_by_hand("vm-1")
    assert await again.call("ChangePower", request) == recorded
    await world.stop(again)
    host.hypervisor.crash()
    host.hypervisor.boot()
    booted = await world.start("host-1")
    assert booted.agent.incarnation != host.agent.incarnation
    answer = await booted.call("ChangePower", request)
    assert isinstance(answer, pb.ChangePowerResponse)
    assert answer.domain.starts == 2


async def test_a_lost_journal_is_rebuilt_from_the_domains_metadata(world: World, host: Host) -> None:
    await make_running_vm(host)
    await host.call("ChangePower", power_request(pb.POWER_ACTION_PAUSE, turn=9, epoch=3))
    await world.stop(host)
    world.resources = SharedResources()
    again = await world.start("host-1")
    assert (await refusal(again, "ChangePower", power_request(pb.POWER_ACTION_RESUME, turn=8, epoch=3))).code == "stale-turn"
    assert (await refusal(again, "ChangePower", power_request(pb.POWER_ACTION_RESUME, turn=9, epoch=2))).code == "stale-epoch"
    await again.call("ChangePower", power_request(pb.POWER_ACTION_RESUME, turn=9, epoch=3))


async def test_hung_storage_leaves_threads_for_stopping_guests(world: World, host: Host) -> None:
    await make_running_vm(host)
    store = world.fleet.store("host-1", LOCAL)
    store.is_hung = True
    stuck = [
        host.stub.EnsurePool(
            pb.EnsurePoolRequest(key=key(subject_id=f"pool-{number}", epoch=0), pool=pool_message(LOCAL)), timeout=TIMEOUT_S
        )
        for number in range(6)
    ]
    off = await host.call("ChangePower", power_request(pb.POWER_ACTION_FORCE_OFF))
    assert isinstance(off, pb.ChangePowerResponse)
    assert off.domain.state == domain_pb2.DOMAIN_STATE_STOPPED
    with world.fleet.changed:
        store.is_hung = False
        world.fleet.changed.notify_all()
    for each in stuck:
        assert (await each).pool.pool_id == LOCAL.pool_id


def test_the_factories_make_what_the_wire_takes() -> None:
    domain = domain_spec()
    assert from_proto(to_proto(domain, domain_pb2.DomainSpec), DomainSpec) == domain
    assert from_proto(key(turn=2), CommandKey).turn == 2
    assert inventory_pb2.Inventory.DESCRIPTOR.name == "Inventory"
