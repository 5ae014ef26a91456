"""The session against a real gateway: leases, reconnects, the outbox; with a hypervisor that may hang."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio

from tests.unit.agent.factories import (
    NETWORK,
    SHARED,
    command_key,
    domain_spec,
    host_credentials,
    new_fleet_authority,
    volume_spec,
)
from tests.unit.agent.gateway_double import GatewayDouble
from tests.unit.agent.waiting import until
from trimtab_agent.agent import Agent
from trimtab_agent.hypervisor.base import Stamp
from trimtab_agent.hypervisor.simulated import SimulatedHost, SimulatedHypervisor
from trimtab_agent.hypervisor.simulation import Fault, FaultKind, SimulatedFleet
from trimtab_agent.jobs import JobKind
from trimtab_agent.simulated_agents import SharedResources, start_simulated_agent, stop_simulated_agent
from trimtab_protos.agent.v1 import agent_service_pb2, command_pb2, domain_pb2, storage_pb2
from trimtab_protos.codec import to_proto
from trimtab_protos.controller.v1 import gateway_service_pb2 as pb
from trimtab_protos.errors import Unavailable
from trimtab_protos.messages import PowerAction

HOST = SimulatedHost(host_id="host-1")


class World:
    def __init__(self) -> None:
        self.authority = new_fleet_authority()
        self.gateway = GatewayDouble(self.authority)
        self.fleet = SimulatedFleet()
        self.resources = SharedResources()
        self.agents: list[Agent] = []
        self.hypervisor = SimulatedHypervisor(self.fleet, HOST)

    async def start(self, *, gateways: list[str] | None = None) -> Agent:
        agent = await start_simulated_agent(
            self.fleet,
            HOST,
            resources=self.resources,
            credentials=host_credentials(self.authority, HOST.host_id),
            gateways=gateways if gateways is not None else [self.gateway.address],
            rng=random.Random(1),
        )
        self.agents.append(agent)
        return agent

    async def stop(self, agent: Agent) -> None:
        self.agents.remove(agent)
        await stop_simulated_agent(agent)

    @property
    def heard(self) -> Any:
        return self.gateway.heard

    def run_vm(self) -> None:
        self.hypervisor.ensure_volume(volume_spec(), SHARED)
        self.hypervisor.define_domain(domain_spec(), Stamp(1, 1))
        self.hypervisor.change_power("vm-1", PowerAction.START, Stamp(1, 1))


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    await world.gateway.start()
    yield world
    for agent in list(world.agents):
        await world.stop(agent)
    await world.gateway.stop()
    world.resources.close()
    world.fleet.close()


def is_live(agent: Agent) -> Callable[[], bool]:
    return lambda: agent.lease_state().is_live


async def test_a_hello_tells_who_what_and_every_domain(world: World) -> None:
    world.run_vm()
    agent = await world.start()
    await until(is_live(agent), what="the lease")
    (hello,) = world.heard.hellos
    assert (hello.host_id, hello.incarnation, hello.agent_address) == ("host-1", agent.incarnation, agent.address)
    assert hello.inventory.hostname == "host-1"
    assert [(domain.vm_id, domain.state) for domain in hello.domains] == [("vm-1", domain_pb2.DOMAIN_STATE_RUNNING)]
    assert world.heard.peers == [{"host-1"}]


async def test_the_lease_lives_on_acks_and_ends_without_them(world: World) -> None:
    agent = await world.start()
    await until(is_live(agent), what="the lease")
    beats = len(world.heard.heartbeats)
    await until(lambda: len(world.heard.heartbeats) > beats + 3, what="more heartbeats")
    assert world.heard.heartbeats[-1].lease_number == 1
    assert [beat.sequence for beat in world.heard.heartbeats] == sorted(beat.sequence for beat in world.heard.heartbeats)
    world.gateway.grants = False
    await until(lambda: not agent.lease_state().is_live, what="the lease's end")
    assert agent.session is not None
    assert agent.session.gateway
    world.gateway.grants, world.gateway.lease_number = True, 2
    await until(lambda: agent.lease_state().allows(2), what="the next lease")


async def test_a_gateway_that_stops_acknowledging_is_left_before_the_lease_ends(world: World) -> None:
    other = GatewayDouble(world.authority)
    await other.start()
    agent = await world.start(gateways=[world.gateway.address, other.address])
    await until(is_live(agent), what="the lease")
    first, second = (world.gateway, other) if world.heard.hellos else (other, world.gateway)
    first.acknowledges_heartbeats = False
    await until(lambda: bool(second.heard.heartbeats), what="the move to the other gateway")
    assert agent.lease_state().is_live
    await other.stop()


async def test_a_gateway_that_dies_is_come_back_to(world: World) -> None:
    agent = await world.start()
    await until(is_live(agent), what="the lease")
    port = int(world.gateway.address.rpartition(":")[2])
    await world.gateway.stop()
    assert agent.session is not None
    await until(lambda: agent.session is not None and not agent.session.gateway, what="the end of the session")
    world.gateway = GatewayDouble(world.authority)
    await world.gateway.start(port=port)
    await until(lambda: bool(world.heard.heartbeats), what="the next session")
    assert agent.session.reconnects >= 1


async def test_a_gateway_may_ask_to_move_and_tell_where(world: World) -> None:
    other = GatewayDouble(world.authority)
    await other.start()
    world.gateway.gateway_addresses = [world.gateway.address, other.address]
    agent = await world.start()
    await until(is_live(agent), what="the lease")
    world.gateway.send_to_all(pb.SessionResponse(reconnect=pb.Reconnect(within_ms=10)))
    await until(lambda: bool(other.heard.hellos), what="the move")
    await until(lambda: world.gateway.open_streams == 0, what="the old stream's end")
    assert agent.lease_state().is_live
    await other.stop()


async def test_a_hung_hypervisor_delays_no_heartbeat_and_takes_no_lease(world: World) -> None:
    agent = await world.start()
    await until(is_live(agent), what="the lease")
    faults = [world.fleet.plan_fault(verb, Fault(FaultKind.HANG)) for verb in ("inventory", "list_domains", "observe_pool")]
    agent.observer.refresh()
    beats = len(world.heard.heartbeats)
    await until(lambda: len(world.heard.heartbeats) > beats + 4, what="heartbeats beside the hang")
    assert agent.lease_state().is_live
    for fault in faults:
        fault.released.set()


async def test_a_hypervisor_that_is_down_is_told_as_unknown_and_told_again_when_it_is_back(world: World) -> None:
    world.run_vm()
    world.hypervisor.stop_answering()
    agent = await world.start()
    await until(lambda: bool(world.heard.heartbeats), what="heartbeats without a hypervisor")
    (hello,) = world.heard.hellos
    assert not hello.HasField("inventory")
    assert not hello.domains
    assert not world.heard.heartbeats[-1].is_hypervisor_up
    await until(is_live(agent), what="the lease")
    world.hypervisor.answer_again()
    await until(lambda: len(world.heard.hellos) == 2, what="the second Hello")
    assert world.heard.hellos[1].HasField("inventory")
    assert len(world.heard.hellos[1].domains) == 1
    await until(lambda: world.heard.heartbeats[-1].is_hypervisor_up)


async def test_domain_events_arrive_and_are_sent_again_until_acknowledged(world: World) -> None:
    world.gateway.acknowledges_outbox = False
    agent = await world.start()
    await until(is_live(agent), what="the lease")
    world.run_vm()
    await until(lambda: len(world.heard.durable_items) == 2, what="two events")
    assert [item.domain_event.kind for item in world.heard.durable_items] == ["defined", "started"]
    assert agent.session is not None
    world.gateway.acknowledges_outbox = True
    agent.session.resync()
    await until(lambda: len(world.heard.durable_items) == 4, what="the repetition in the next session")
    await until(lambda: agent.outbox.stored == 0, what="the acknowledgement")


async def test_events_of_while_nobody_listened_are_delivered_after_a_restart(world: World) -> None:
    agent = await world.start(gateways=[])
    world.run_vm()
    await until(lambda: agent.outbox.stored == 2)
    await world.stop(agent)
    await world.start()
    await until(lambda: len(world.heard.durable_items) == 2, what="the events of before")


async def test_progress_travels_beside_the_outbox_and_the_end_within_it(world: World) -> None:
    agent = await world.start()
    await until(is_live(agent), what="the lease")
    fault = world.fleet.plan_fault("import_image", Fault(FaultKind.HANG))
    request = agent_service_pb2.StartImageImportRequest(
        image=storage_pb2.ImageSpec(image_id="img-1", pool_id=SHARED.pool_id, format=storage_pb2.DISK_FORMAT_RAW),
        pool=to_proto(SHARED, storage_pb2.PoolSpec),
        host_file=storage_pb2.HostFileSource(file_name="x.raw"),
    )
    key = command_key(step="import", subject_id="img-1")
    agent.jobs.start(key, JobKind.IMPORT, request.SerializeToString()).result()
    await until(lambda: any(item.job.step == "import" for item in world.heard.items), what="progress")
    progress = [item for item in world.heard.items if item.job.step == "import"]
    assert {item.sequence for item in progress} == {0}
    fault.released.set()
    await until(lambda: bool(world.heard.durable_items), what="the end")
    (end,) = world.heard.durable_items
    assert end.job.state == command_pb2.JOB_STATE_SUCCEEDED
    assert end.job.sequence > progress[-1].job.sequence


async def test_pools_and_networks_of_a_welcome_are_made_usable_and_reported(world: World) -> None:
    world.gateway.pools = [to_proto(SHARED, storage_pb2.PoolSpec)]
    world.gateway.networks = [to_proto(NETWORK, domain_pb2.NetworkSpec)]
    await world.start()
    await until(lambda: "pool-shared" in world.hypervisor.pools and "net-1" in world.hypervisor.networks)
    await until(lambda: any(beat.pools for beat in world.heard.heartbeats), what="the pool's space in a heartbeat")
    seen = next(beat for beat in world.heard.heartbeats if beat.pools).pools[0]
    assert (seen.pool_id, seen.is_responsive) == ("pool-shared", True)


async def test_a_changed_inventory_is_sent_once(world: World) -> None:
    agent = await world.start()
    await until(is_live(agent), what="the lease")
    world.hypervisor.host = SimulatedHost(host_id="host-1", memory_mib=4096)
    await asyncio.to_thread(agent.observer.refresh_inventory)
    beats = len(world.heard.heartbeats)
    await until(lambda: len(world.heard.heartbeats) > beats + 3)
    changed = [beat for beat in world.heard.heartbeats if beat.HasField("inventory")]
    assert [beat.inventory.memory_mib for beat in changed] == [4096]


async def test_a_renewed_certificate_is_used_for_the_next_session(world: World) -> None:
    agent = await world.start()
    await until(is_live(agent), what="the lease")
    assert agent.session is not None
    assert agent.parts.credentials is not None
    agent.parts.credentials.replace(host_credentials(world.authority, "host-1"))
    agent.session.resync()
    await until(lambda: len(world.heard.hellos) == 2, what="the next session")
    assert agent.lease_state().is_live


async def test_the_gateway_learns_at_once_that_an_agent_stops(world: World) -> None:
    agent = await world.start()
    await until(is_live(agent), what="the lease")
    await world.stop(agent)
    await until(lambda: world.gateway.open_streams == 0, what="the stream's end", deadline_s=2.0)


async def test_a_broken_outbox_does_not_stop_the_heartbeats(world: World) -> None:
    agent = await world.start()
    await until(is_live(agent), what="the lease")
    world.resources.journal.close()
    beats = len(world.heard.heartbeats)
    await until(lambda: len(world.heard.heartbeats) > beats + 4, what="heartbeats without a journal")
    assert agent.lease_state().is_live
    with pytest.raises(Unavailable):
        agent.outbox.read(after=0, limit=1).result()


async def test_a_hello_tells_the_highest_numbers_that_were_given_though_agent_and_process_are_new(world: World) -> None:
    world.gateway.lease_number, world.gateway.database_mark = 41, 7
    agent = await world.start()
    await until(lambda: agent.lease_state().allows(41), what="the lease")
    assert [(one.lease_number, one.database_mark) for one in world.heard.hellos] == [(0, 0)], "it knew of nothing"
    await world.stop(agent)
    # A controller of yesterday gives lower ones.
    world.gateway.lease_number, world.gateway.database_mark = 37, 3
    agent = await world.start()
    await until(lambda: len(world.heard.heartbeats) > 0 and len(world.heard.hellos) == 2, what="the second Hello")
    assert (world.heard.hellos[1].lease_number, world.heard.hellos[1].database_mark) == (41, 7)
    await until(is_live(agent), what="a lease of the new process")
    await world.stop(agent)
    await world.start()
    await until(lambda: len(world.heard.hellos) == 3, what="the third Hello")
    assert (world.heard.hellos[2].lease_number, world.heard.hellos[2].database_mark) == (41, 7), "lower ones are not taken"
