"""Hosts that no living gateway has a session with: each gets a whole window to come back, then its silence counts."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.unit.controller_rpc.conftest import Fleet, eventually, silent_for
from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.rpc import server
from trimtab_controller.rpc.server import GatewayProcess
from trimtab_controller.store import hosts


async def test_a_host_that_never_connected_to_a_new_gateway_becomes_suspect_then_lost(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    fleet.database.write(
        lambda session: hosts.open_session(
            session, machine.host_id, incarnation="i", boot_id="b", agent_address="", now=fleet.clock.now()
        )
    )
    await silent_for(fleet, 16)
    await orphans_silent_for(fleet, 14)
    assert fleet.host(machine.host_id).connectivity is HostConnectivity.UP
    await orphans_silent_for(fleet, 3)
    assert fleet.host(machine.host_id).connectivity is HostConnectivity.SUSPECT
    await orphans_silent_for(fleet, 60)
    assert fleet.host(machine.host_id).connectivity is HostConnectivity.LOST


async def orphans_silent_for(fleet: Fleet, seconds: int) -> None:
    for _second in range(seconds):
        await silent_for(fleet, 1)
        await fleet.process.watch.judge_orphans()


@asynccontextmanager
async def second_gateway(fleet: Fleet) -> AsyncIterator[GatewayProcess]:
    """Another gateway of the same fleet, whose own clockwork the test turns: it renews nothing by itself."""
    process = await server.start(
        fleet.settings, fleet.database, clock=fleet.clock, host_address="127.0.0.1:0", join_address="127.0.0.1:0"
    )
    for task in process.tasks:
        task.cancel()
    process.tasks.append(asyncio.create_task(process.gateway.committer.run()))
    try:
        yield process
    finally:
        await process.stop()


async def test_hosts_of_a_dead_gateway_get_a_window_to_come_back_and_are_suspect_after_it(fleet: Fleet) -> None:
    stays_away, comes_back = await fleet.member("node1"), await fleet.member("node2")
    await silent_for(fleet, 16)
    async with second_gateway(fleet) as other:
        for machine in (stays_away, comes_back):
            await machine.say_hello(stub=machine.stub_at(other.host_port))
            await eventually(lambda machine=machine: machine.host_id in other.gateway.states)
        for _second in range(40):  # it lives: the hosts are its own to judge, however long
            await other.gateway.right.renew()
            await orphans_silent_for(fleet, 1)
        assert fleet.host(stays_away.host_id).connectivity is HostConnectivity.UP
        # Now it is dead: its row does not move any more. A ttl to see that, then each host has a whole window.
        await orphans_silent_for(fleet, 28)
        assert fleet.host(stays_away.host_id).connectivity is HostConnectivity.UP
        stream, _welcome = await comes_back.open()
        await orphans_silent_for(fleet, 5)
        assert fleet.host(stays_away.host_id).connectivity is HostConnectivity.SUSPECT
        await stream.beat()
        assert fleet.host(comes_back.host_id).connectivity is HostConnectivity.UP
        assert fleet.kinds_of_events(comes_back.host_id).count("host.suspect") == 0


async def test_hosts_that_a_draining_gateway_left_behind_are_judged_too(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    await silent_for(fleet, 16)
    async with second_gateway(fleet) as other:
        await machine.say_hello(stub=machine.stub_at(other.host_port))
        await eventually(lambda: machine.host_id in other.gateway.states)
        await other.gateway.right.give_up()
        await orphans_silent_for(fleet, 14)
        assert fleet.host(machine.host_id).connectivity is HostConnectivity.UP
        await orphans_silent_for(fleet, 3)
        assert fleet.host(machine.host_id).connectivity is HostConnectivity.SUSPECT


async def test_a_gateway_that_is_cut_off_from_the_database_sends_its_hosts_to_the_others_while_their_leases_last(
    fleet: Fleet,
) -> None:
    machine = await fleet.member("node1")
    await silent_for(fleet, 1)
    async with second_gateway(fleet) as other:
        stream = await machine.say_hello(stub=machine.stub_at(other.host_port))
        assert (await stream.receive()).WhichOneof("body") == "welcome"
        # Of its fifteen seconds some are left over for a busy machine: what passes here passes besides.
        for _second in range(9):
            await silent_for(fleet, 1)
            await other.watch.hand_over()
        assert (await stream.beat()).is_granted, "its right lasts for a while yet, and nobody was sent away before"
        await silent_for(fleet, 6)
        assert not (await stream.beat()).is_granted
        await other.watch.hand_over()
        asked = await stream.receive()
        assert asked.WhichOneof("body") == "reconnect"
        assert asked.reconnect.within_ms <= 2_000
        again, _welcome = await machine.open()
        assert (await again.beat()).is_granted


async def test_a_gateway_that_is_alone_keeps_its_hosts_while_the_database_is_away(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    stream, _welcome = await machine.open()
    fleet.clock.shift_s += 16
    await fleet.process.watch.hand_over()
    assert not (await stream.beat()).is_granted
    await fleet.process.gateway.right.renew()
    assert (await stream.beat()).is_granted, "it is the same session"
