"""The session of a host: what a Hello commits, and what it carries besides heartbeats."""

import asyncio
from datetime import timedelta
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tests.unit.controller_rpc.conftest import (
    ON_BOTH_DATABASES,
    Fleet,
    Machine,
    certificate_request,
    eventually,
    host_libvirt_key,
    inventory,
    key_pem,
)
from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.rpc.sessions import superseded
from trimtab_controller.services import hosts as host_service
from trimtab_controller.store import certificates, host_reports, hosts, leases, schema
from trimtab_protos.agent.v1 import inventory_pb2, storage_pb2
from trimtab_protos.controller.v1 import gateway_service_pb2 as pb
from trimtab_protos.errors import PermissionDenied

# --- what a Hello commits ------------------------------------------------------------------------------------------------------


@ON_BOTH_DATABASES
async def test_a_hello_is_committed_before_the_welcome(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    seen = inventory(unmanaged_vcpus=2, unmanaged_memory_mib=512, unmanaged_macs=["52:54:00:AA:00:01"])
    _stream, welcome = await machine.open(inventory=seen)
    host = fleet.host(machine.host_id)
    assert (host.connectivity, host.lease_number) == (HostConnectivity.UP, 1)
    assert (host.incarnation, host.boot_id, host.agent_address) == ("inc-1", "boot-1", "127.0.0.1:8446")
    # Default class: four vcpus per cpu, 1024 MiB kept for the host.
    assert (host.vcpus_limit, host.memory_limit_mib) == (32, 16384 - 1024)
    assert (host.unmanaged_vcpus, host.unmanaged_memory_mib) == (2, 512)
    assert host.inventory is not None
    assert host.inventory.cpu_model == "qemu64"
    macs = fleet.database.read(
        lambda session: set(session.scalars(schema.unmanaged_mac.select().with_only_columns(schema.unmanaged_mac.c.mac)))
    )
    assert macs == {"52:54:00:aa:00:01"}
    assert welcome.lease_ttl_ms == 15_000
    assert welcome.heartbeat_every_ms == 3_000
    assert welcome.ca_bundle_sha256 == fleet.pki.bundle_sha256()
    assert list(welcome.gateway_addresses) == ["127.0.0.1:8444"]


@ON_BOTH_DATABASES
async def test_every_session_has_a_higher_number_and_the_newest_one_wins(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    first, _welcome = await machine.open()
    second, _welcome = await machine.open()
    code, details = await first.end()
    assert code is grpc.StatusCode.ABORTED
    assert "newer session" in details
    ack = await second.beat()
    assert (ack.lease_number, ack.is_granted) == (2, True)


async def test_a_newer_session_on_another_gateway_ends_ours(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    stream, _welcome = await machine.open()
    fleet.database.write(
        lambda session: hosts.open_session(
            session, machine.host_id, incarnation="inc-1", boot_id="boot-1", agent_address="", now=fleet.clock.now()
        )
    )
    await fleet.process.watch.check_members()
    code, _details = await stream.end()
    assert code is grpc.StatusCode.ABORTED
    assert machine.host_id not in fleet.process.gateway.states


async def test_a_session_that_is_ended_while_a_message_is_under_way_ends_nevertheless(fleet: Fleet) -> None:
    """gRPC takes no status while a write is out: one that was cut off left the host on a stream that nobody served, granted nothing."""
    machine = await fleet.member("node1")
    present = fleet.process.gateway.sessions
    for _attempt in range(5):
        saying = asyncio.create_task(machine.say_hello())
        while machine.host_id not in present:
            await asyncio.sleep(0)  # it enters and is welcomed in one stretch of work: gRPC has the Welcome at hand now
        present[machine.host_id].end(superseded(machine.host_id))
        code, _details = await (await saying).end()
        assert code is grpc.StatusCode.ABORTED
        await eventually(lambda: machine.host_id not in present)


async def test_an_agent_that_lost_its_journal_is_told(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    await machine.open()
    await machine.open()
    assert "host.agent_restored" not in fleet.kinds_of_events(machine.host_id)
    await machine.open(incarnation="inc-2")
    assert fleet.kinds_of_events(machine.host_id)[-1] == "host.agent_restored"
    await machine.open(incarnation="inc-3", boot_id="boot-2")
    assert fleet.kinds_of_events(machine.host_id)[-1] == "host.booted"  # a new incarnation is what a boot brings


async def test_a_boot_is_told(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    await machine.open()
    await machine.open(boot_id="boot-2", incarnation="inc-2")
    assert fleet.kinds_of_events(machine.host_id).count("host.booted") == 1


@ON_BOTH_DATABASES
async def test_a_changed_inventory_in_a_heartbeat_is_stored_and_an_equal_one_is_not(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    first = inventory()
    stream, _welcome = await machine.open(inventory=first)
    version = fleet.host(machine.host_id).version
    await stream.beat(inventory=first)
    grown = inventory_pb2.Inventory()
    grown.CopyFrom(first)
    grown.cpus, grown.digest = 16, "another"
    await stream.beat(inventory=grown)
    await eventually(lambda: fleet.host(machine.host_id).vcpus_limit == 64)
    assert fleet.host(machine.host_id).version == version + 1


@ON_BOTH_DATABASES
async def test_limits_never_fall_below_what_is_claimed(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    await machine.open()
    fleet.database.write(lambda session: session.execute(schema.host.update().values(vcpus_claimed=20, memory_claimed_mib=8000)))
    await machine.open(inventory=inventory(cpus=1, memory_mib=2048))
    host = fleet.host(machine.host_id)
    assert (host.vcpus_limit, host.memory_limit_mib) == (20, 8000)


# --- pools, certificates, floods -----------------------------------------------------------------------------------------------------


def insert_pools(fleet: Fleet) -> None:
    now = fleet.clock.now()

    def insert(session: Any) -> None:
        for pool_id, is_shared in (("pool-local", False), ("pool-shared", True)):
            values = {"id": pool_id, "name": pool_id, "kind": "dir", "path": f"/srv/{pool_id}", "is_shared": is_shared}
            session.execute(schema.pool.insert().values(**values, settings={}, created_at=now))

    fleet.database.write(insert)


def set_pool_states(fleet: Fleet, state: str, problem: str = "") -> None:
    fleet.database.write(lambda session: session.execute(schema.pool_host.update().values(state=state, problem=problem)))


def pool_states(fleet: Fleet) -> dict[str, tuple[str, str]]:
    rows = fleet.database.read(lambda session: session.execute(schema.pool_host.select()).all())
    return {row.pool_id: (row.state, row.problem) for row in rows}


def pool(pool_id: str, **fields: Any) -> storage_pb2.PoolObservation:
    return storage_pb2.PoolObservation(**{"pool_id": pool_id, "is_responsive": True, **fields})


@ON_BOTH_DATABASES
async def test_pool_figures_are_stored_for_pools_of_this_host_only(fleet: Fleet) -> None:
    insert_pools(fleet)
    machine = await fleet.member("node1")  # its mappings are made at the join
    set_pool_states(fleet, "ready")
    stream, welcome = await machine.open()
    assert {one.pool_id for one in welcome.pools} == {"pool-local", "pool-shared"}
    local = pool("pool-local", capacity_bytes=100, available_bytes=60)
    shared = pool("pool-shared", capacity_bytes=900, available_bytes=500)
    await stream.beat(pools=[local, shared, pool("pool-of-others", capacity_bytes=1)])

    def spaces() -> dict[tuple[str, str], int]:
        rows = fleet.database.read(lambda session: session.execute(schema.pool_space.select()).all())
        return {(row.pool_id, row.host_id): row.available_bytes for row in rows}

    await eventually(lambda: spaces() == {("pool-local", machine.host_id): 60, ("pool-shared", ""): 500})
    await stream.beat(pools=[pool("pool-local", problem="not mounted")])
    await eventually(lambda: pool_states(fleet) == {"pool-local": ("failed", "not mounted"), "pool-shared": ("ready", "")})
    await stream.beat(pools=[local])
    await eventually(lambda: pool_states(fleet)["pool-local"] == ("ready", ""))


async def test_a_heartbeat_makes_no_unprepared_pool_ready(fleet: Fleet) -> None:
    insert_pools(fleet)
    machine = await fleet.member("node1")
    stream, _welcome = await machine.open()
    await stream.beat(pools=[pool("pool-local", problem="no such folder"), pool("pool-shared")])
    await eventually(lambda: pool_states(fleet)["pool-local"] == ("unknown", "no such folder"))
    assert pool_states(fleet)["pool-shared"] == ("unknown", "")


async def test_a_heartbeat_does_not_prove_that_a_pool_is_shared(fleet: Fleet) -> None:
    insert_pools(fleet)
    machine = await fleet.member("node1")
    stream, _welcome = await machine.open()
    problem = f"{host_reports.NOT_SHARED}: it does not see what node2 wrote"
    set_pool_states(fleet, "failed", problem)
    fleet.database.write(
        lambda session: session.execute(
            schema.pool_host.update().where(schema.pool_host.c.pool_id == "pool-local").values(problem="gone")
        )
    )
    await stream.beat(pools=[pool("pool-local"), pool("pool-shared")])
    await eventually(lambda: pool_states(fleet)["pool-local"] == ("ready", ""))
    assert pool_states(fleet)["pool-shared"] == ("failed", problem)


async def test_certificates_are_renewed_for_the_caller_and_nobody_else(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    stream, _welcome = await machine.open()
    fresh = ec.generate_private_key(ec.SECP256R1())
    response = await machine.stub().RenewCertificates(
        pb.RenewCertificatesRequest(
            agent_csr_pem=certificate_request(fresh, name="host-of-somebody-else"),
            libvirt_csr_pem=certificate_request(host_libvirt_key()),
        ),
        timeout=10,
    )
    machine.certificate_pem, machine.key = response.agent_certificate_pem.encode(), fresh
    second, _welcome = await machine.open()
    assert (await second.beat()).is_granted
    assert (await stream.end())[0] is grpc.StatusCode.ABORTED
    known = fleet.database.read(lambda session: certificates.latest_of(session, [machine.host_id]))[machine.host_id]
    assert set(known) == {"agent", "libvirt"}


async def test_a_flood_of_messages_ends_the_session_of_the_flooder_alone(fleet: Fleet) -> None:
    flooder, other = await fleet.member("node1"), await fleet.member("node2")
    stream, _welcome = await flooder.open()
    calm, _welcome = await other.open()
    for number in range(1, 600):
        try:
            await stream.send(pb.SessionRequest(heartbeat=pb.Heartbeat(sequence=number)))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            break
    # What the flooder gets depends on how much of it was unread; that it is out does not.
    assert (await stream.end())[0] in {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL}
    assert flooder.host_id not in fleet.process.gateway.sessions
    assert (await calm.beat()).is_granted


async def test_a_message_beyond_the_limit_is_refused(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    stream = await machine.say_hello(incarnation="x" * (17 << 20))
    code, _details = await stream.end()
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_draining_gateway_asks_hosts_to_go_elsewhere(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    stream, _welcome = await machine.open()
    stopping = asyncio.create_task(fleet.process.stop())
    response = await stream.receive()
    assert response.reconnect.within_ms > 0
    stream.cancel()
    await stopping
    assert fleet.database.read(lambda session: leases.named(session, leases.GATEWAY_PREFIX)) == ()


async def test_an_unrecorded_renewal_is_refused_for_a_removed_host(fleet: Fleet) -> None:
    machine: Machine = await fleet.member("node1")
    fleet.database.write(lambda session: hosts.mark_deleted(session, machine.host_id, now=fleet.clock.now()))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await machine.stub().RenewCertificates(
            pb.RenewCertificatesRequest(
                agent_csr_pem=certificate_request(machine.key), libvirt_csr_pem=certificate_request(host_libvirt_key())
            ),
            timeout=10,
        )
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_sessions_survive_a_rotation_of_the_ca(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    stream, _welcome = await machine.open()
    fleet.pki.begin_rotation(now=fleet.clock.now())
    await fleet.process.watch.announce_bundle()
    assert (await stream.receive()).reconnect.within_ms > 0
    again, welcome = await machine.open()
    assert welcome.ca_bundle_sha256 == fleet.pki.bundle_sha256()
    response = await machine.stub().RenewCertificates(
        pb.RenewCertificatesRequest(
            agent_csr_pem=certificate_request(machine.key), libvirt_csr_pem=certificate_request(host_libvirt_key())
        ),
        timeout=10,
    )
    assert response.ca_bundle_pem.count("BEGIN CERTIFICATE") == 2
    machine.certificate_pem, machine.ca_pem = response.agent_certificate_pem.encode(), response.ca_bundle_pem.encode()
    fleet.pki.switch_rotation()
    fleet.pki.ensure_controller_certificate(["127.0.0.1"], now=fleet.clock.now(), life=timedelta(days=30))
    final, _welcome = await machine.open()  # the gateway's new certificate is of the new CA, ours of the old one
    assert (await final.beat()).is_granted
    del again
    assert key_pem(machine.key)


def test_a_previous_certificate_of_another_host_proves_nothing(fleet: Fleet) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    other = fleet.pki.signing().sign_agent(certificate_request(key), "host-other", now=fleet.clock.now(), life=timedelta(hours=1))
    with pytest.raises(PermissionDenied, match="another host"):
        host_service.verify_rejoin(fleet.pki.authorities(), "host-mine", other.pem, b"proof", token="jt-1.2", agent_csr_pem="csr")
