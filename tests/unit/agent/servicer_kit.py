"""Agents with simulated hosts that answer over real gRPC, for the tests of the servicer."""

from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc
import pytest
import pytest_asyncio

from tests.unit.agent.factories import (
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
from trimtab_agent.hypervisor.simulation import SimulatedFleet
from trimtab_agent.simulated_agents import SharedResources, start_simulated_agent, stop_simulated_agent
from trimtab_controller.pki import SigningAuthority
from trimtab_protos import status, tls
from trimtab_protos.agent.v1 import agent_service_pb2 as pb
from trimtab_protos.agent.v1 import command_pb2, domain_pb2, storage_pb2
from trimtab_protos.agent.v1.agent_service_pb2_grpc import AgentServiceStub
from trimtab_protos.codec import to_proto
from trimtab_protos.errors import (
    TrimtabError,
)
from trimtab_protos.messages import DomainSpec, PoolSpec, VolumeSpec

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
