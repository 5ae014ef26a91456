"""The agent over gRPC: migrations, and what survives the agent."""

from tests.unit.agent.factories import (
    LOCAL,
    domain_spec,
)
from tests.unit.agent.servicer_kit import (
    TIMEOUT_S,
    Host,
    World,
    key,
    make_running_vm,
    pool_message,
    power_request,
    refusal,
    wait_for_job,
)
from tests.unit.agent.waiting import until
from trimtab_agent.hypervisor.simulation import Fault, FaultKind
from trimtab_agent.simulated_agents import SharedResources
from trimtab_protos.agent.v1 import agent_service_pb2 as pb
from trimtab_protos.agent.v1 import command_pb2, domain_pb2, inventory_pb2
from trimtab_protos.codec import from_proto, to_proto
from trimtab_protos.messages import CommandKey, DomainSpec, MigrationOptions

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
