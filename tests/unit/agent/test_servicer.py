"""The servicer over a simulated host, through real gRPC with the fleet's certificates."""

from pathlib import Path

import grpc
import pytest

from tests.unit.agent.factories import (
    NETWORK,
    SHARED,
    domain_spec,
    host_credentials,
    volume_spec,
)
from tests.unit.agent.servicer_kit import (
    TIMEOUT_S,
    Host,
    World,
    call,
    define_request,
    key,
    make_running_vm,
    pool_message,
    power_request,
    refusal,
    volume_request,
)
from tests.unit.agent.waiting import until
from trimtab_agent.hypervisor.simulated import SimulatedHost
from trimtab_agent.hypervisor.simulation import Fault, FaultKind
from trimtab_agent.simulated_agents import start_simulated_agent, stop_simulated_agent
from trimtab_protos import tls
from trimtab_protos.agent.v1 import agent_service_pb2 as pb
from trimtab_protos.agent.v1 import domain_pb2, storage_pb2
from trimtab_protos.agent.v1.agent_service_pb2_grpc import AgentServiceStub
from trimtab_protos.codec import from_proto, to_proto
from trimtab_protos.errors import (
    Conflict,
    Internal,
    InvalidRequest,
    PermissionDenied,
    Unavailable,
)
from trimtab_protos.messages import Inventory

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


async def test_who_asks_for_fitness_alone_gets_what_a_guest_needs_and_no_more(host: Host) -> None:
    whole = await host.call("GetInventory", pb.GetInventoryRequest())
    asked = await host.call("GetInventory", pb.GetInventoryRequest(only_fitness=True))
    assert isinstance(whole, pb.GetInventoryResponse)
    assert isinstance(asked, pb.GetInventoryResponse)
    for name in ("arch", "accelerator", "machines", "usable_cpu_models", "cpu_features", "has_uefi", "capabilities", "bridges"):
        assert getattr(asked.inventory, name) == getattr(whole.inventory, name)
    assert whole.inventory.digest
    assert len(whole.inventory.certificates) > 0
    assert (asked.inventory.digest, len(asked.inventory.certificates), len(asked.inventory.pools)) == ("", 0, 0)


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


async def test_what_a_domain_shall_be_may_have_changed_when_its_command_is_repeated(host: Host) -> None:
    """A verb on a vm is asked again, after a death or since the guest had not followed; its security group may be another by then."""
    await make_running_vm(host)
    key = define_request(step="apply").key
    for vcpus in (1, 2):
        domain = define_request(domain_spec(vcpus=vcpus)).domain
        await host.call("ApplyDomain", pb.ApplyDomainRequest(key=key, domain=domain))
        assert host.hypervisor.domains["vm-1"].spec.vcpus == vcpus


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
