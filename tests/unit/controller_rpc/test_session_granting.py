"""The session of a host: when its heartbeats are granted, and what its silence comes to."""

from typing import Any

import grpc

from tests.unit.controller_rpc.conftest import (
    ON_BOTH_DATABASES,
    Fleet,
    eventually,
    silent_for,
)
from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.store import certificates, host_guards, hosts, leases, schema
from trimtab_controller.store.host_guards import HostGuard

# --- granting --------------------------------------------------------------------------------------------------------------------


async def test_heartbeats_are_granted_while_the_gateways_own_row_lives(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    stream, _welcome = await machine.open()
    assert (await stream.beat()).is_granted
    fleet.clock.shift_s += 15  # the gateway was frozen: it renewed nothing
    assert not (await stream.beat()).is_granted
    assert await fleet.process.gateway.right.renew()
    assert (await stream.beat()).is_granted


@ON_BOTH_DATABASES
async def test_a_removed_row_is_taken_again(fleet: Fleet) -> None:
    right = fleet.process.gateway.right
    name = leases.GATEWAY_PREFIX + right.gateway_id
    seen = fleet.database.read(lambda session: leases.read(session, name))
    assert seen is not None
    fleet.database.write(lambda session: leases.remove(session, seen))
    assert await right.renew()
    assert fleet.database.read(lambda session: leases.read(session, name)) is not None


async def test_a_gateway_whose_row_is_lost_to_another_stops_granting_when_its_time_is_over(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    stream, _welcome = await machine.open()
    fleet.database.write(lambda session: session.execute(schema.lease.update().values(owner="somebody-else", term=99)))
    assert not await fleet.process.gateway.right.renew()
    assert (await stream.beat()).is_granted  # what was granted to us until then, nobody may have taken yet
    fleet.clock.shift_s += 14.8
    assert not await fleet.process.gateway.right.renew()
    assert not (await stream.beat()).is_granted


@ON_BOTH_DATABASES
async def test_a_revocation_ends_granting_and_is_acknowledged_with_the_age_of_the_last_grant(fleet: Fleet) -> None:
    revoked, other = await fleet.member("node1"), await fleet.member("node2")
    first, _welcome = await revoked.open()
    second, _welcome = await other.open()
    assert (await first.beat()).is_granted
    fleet.clock.shift_s += 4.0
    fleet.database.write(lambda session: leases.revoke(session, revoked.host_id, term=1, now=fleet.clock.now()))
    await fleet.process.watch.learn()
    assert not (await first.beat()).is_granted
    assert (await second.beat()).is_granted
    (revocation,) = fleet.database.read(leases.revocations)
    (ago_ms,) = revocation.acknowledgements.values()
    assert set(revocation.acknowledgements) == {fleet.process.gateway.gateway_id}
    assert 4000 <= ago_ms < 6000
    fleet.database.write(lambda session: leases.lift_revocation(session, revoked.host_id))
    await fleet.process.watch.learn()
    assert (await first.beat()).is_granted


async def test_a_host_whose_certificate_is_revoked_while_connected_is_put_out(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    stream, _welcome = await machine.open()
    fleet.database.write(lambda session: certificates.revoke_all_of(session, machine.host_id, now=fleet.clock.now()))
    code, details = await stream.end()  # the gateway looks each second
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert "revoked" in details
    code, _details = await (await machine.say_hello()).end()
    assert code is grpc.StatusCode.PERMISSION_DENIED


async def test_a_host_removed_while_connected_is_put_out(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    stream, _welcome = await machine.open()
    fleet.database.write(lambda session: hosts.mark_deleted(session, machine.host_id, now=fleet.clock.now()))
    await fleet.process.watch.check_members()
    code, _details = await stream.end()
    assert code is grpc.StatusCode.NOT_FOUND


# --- silence -----------------------------------------------------------------------------------------------------------------------


@ON_BOTH_DATABASES
async def test_silence_makes_a_host_suspect_then_lost_and_a_heartbeat_brings_it_back(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    await silent_for(fleet, 16)  # a young gateway gives everybody a lease's length to connect
    stream, _welcome = await machine.open()
    await silent_for(fleet, 12)
    assert fleet.host(machine.host_id).connectivity is HostConnectivity.UP
    await silent_for(fleet, 6)
    await eventually(lambda: fleet.host(machine.host_id).connectivity is HostConnectivity.SUSPECT)
    await silent_for(fleet, 50)
    await eventually(lambda: fleet.host(machine.host_id).connectivity is HostConnectivity.LOST)
    await stream.beat()
    await eventually(lambda: fleet.host(machine.host_id).connectivity is HostConnectivity.UP)
    kinds = [kind for kind in fleet.kinds_of_events(machine.host_id) if kind in {"host.up", "host.suspect", "host.lost"}]
    assert kinds == ["host.up", "host.suspect", "host.lost", "host.up"]


async def test_a_gateway_that_was_paused_does_not_blame_its_hosts(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    await silent_for(fleet, 16)
    await machine.open()
    fleet.clock.shift_s += 40  # nothing ran meanwhile
    await fleet.process.gateway.right.renew()
    await fleet.process.watch.judge()
    await silent_for(fleet, 10)
    assert fleet.host(machine.host_id).connectivity is HostConnectivity.UP


# --- what is recorded before a renewal is granted


@ON_BOTH_DATABASES
async def test_a_renewal_whose_warden_is_not_armed_is_granted_only_once_that_is_recorded(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    stream, _welcome = await machine.open()

    def recorded() -> HostGuard:
        return fleet.database.read(lambda session: host_guards.read(session, machine.host_id))

    assert (await stream.beat()).is_granted  # nobody counts on a lease of which nothing is recorded
    assert (await stream.beat(is_warden_armed=True, kill_ms=1200)).is_granted
    await eventually(lambda: recorded().is_armed)
    assert recorded().kill_ms == host_guards.KILL_FLOOR_MS
    assert (await stream.beat(is_warden_armed=True, kill_ms=1300)).is_granted
    refused = await stream.beat(is_warden_armed=False)
    assert not refused.is_granted, "its lease would be counted on"
    await eventually(lambda: not recorded().is_armed)
    await eventually(lambda: is_granted(stream, is_warden_armed=False))


@ON_BOTH_DATABASES
async def test_a_slower_kill_and_a_beacon_are_recorded_before_the_renewal_is_granted(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    stream, _welcome = await machine.open()
    await stream.beat(is_warden_armed=True)
    assert not (await stream.beat(is_warden_armed=True, kill_ms=7400)).is_granted
    await eventually(lambda: is_granted(stream, is_warden_armed=True, kill_ms=7400))
    assert fleet.database.read(lambda session: host_guards.read(session, machine.host_id)).kill_ms == 8000
    assert not (await stream.beat(is_warden_armed=True, kill_ms=7400, beacon_pool_id="pool-a")).is_granted
    await eventually(lambda: is_granted(stream, is_warden_armed=True, kill_ms=7400, beacon_pool_id="pool-a"))
    assert fleet.database.read(lambda session: host_guards.read(session, machine.host_id)).beacon_pool_id == "pool-a"


async def is_granted(stream: Any, **said: Any) -> bool:
    return bool((await stream.beat(**said)).is_granted)
