"""What an agent shows to Prometheus."""

import asyncio
import shutil
import socket
import subprocess
import urllib.request
from collections.abc import AsyncIterator

import pytest_asyncio

from tests.unit.agent.factories import LOCAL, domain_spec, host_credentials, new_fleet_authority, volume_spec
from tests.unit.agent.waiting import until
from trimtab_agent import metrics
from trimtab_agent.agent import Agent
from trimtab_agent.hypervisor.base import Stamp
from trimtab_agent.hypervisor.simulated import SimulatedHost, SimulatedHypervisor
from trimtab_agent.hypervisor.simulation import Fault, FaultKind, SimulatedFleet
from trimtab_agent.simulated_agents import SharedResources, start_simulated_agent, stop_simulated_agent
from trimtab_protos.messages import PowerAction


class World:
    agent: Agent
    hypervisor: SimulatedHypervisor
    fleet: SimulatedFleet
    url: str

    async def scrape(self) -> str:
        return await asyncio.to_thread(self._scrape)

    def _scrape(self) -> str:
        with urllib.request.urlopen(self.url, timeout=10) as answer:
            return str(answer.read().decode())


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    world, resources = World(), SharedResources()
    world.fleet = SimulatedFleet()
    world.agent = await start_simulated_agent(
        world.fleet,
        SimulatedHost(host_id="host-1"),
        resources=resources,
        credentials=host_credentials(new_fleet_authority(), "host-1"),
    )
    await until(lambda: world.agent.replay.is_rebuilt, what="the journal's rebuild")
    world.hypervisor = world.fleet.hosts["host-1"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    stop = metrics.serve(world.agent, f"127.0.0.1:{port}")
    world.url = f"http://127.0.0.1:{port}/metrics"
    yield world
    stop()
    await stop_simulated_agent(world.agent)
    resources.close()
    world.fleet.close()


async def test_the_host_and_each_vm_are_shown(world: World) -> None:
    world.hypervisor.ensure_pool(LOCAL)
    world.agent.known_pools.add(LOCAL)
    world.agent.observer.refresh()
    await until(lambda: bool(world.agent.observer.pools()))
    world.hypervisor.ensure_volume(volume_spec(), LOCAL)
    world.hypervisor.define_domain(domain_spec(pool=LOCAL), Stamp(1, 1))
    world.hypervisor.change_power("vm-1", PowerAction.START, Stamp(1, 1))
    world.agent.grant_lease(number=1, ttl_s=60)
    text = await world.scrape()
    for line in (
        "trimtab_agent_lease_live 1.0",
        "trimtab_agent_hypervisor_up 1.0",
        'trimtab_agent_domains{managed="true",state="running"} 1.0',
        'trimtab_vm_running{vm_id="vm-1"} 1.0',
        'trimtab_vm_vcpus{vm_id="vm-1"} 1.0',
        'trimtab_agent_pool_responsive{pool_id="pool-local"} 1.0',
        'trimtab_agent_jobs{kind="import",phase="running"} 0.0',
    ):
        assert line in text.splitlines(), line
    assert 'trimtab_vm_info{domain="trimtab-vm-1"' in text
    assert 'trimtab_vm_cpu_seconds_total{vm_id="vm-1"}' in text
    assert 'trimtab_vm_block_written_bytes_total{device="vda",vm_id="vm-1"}' in text
    assert 'trimtab_vm_network_receive_bytes_total{mac="52:54:00:' in text
    assert 'trimtab_agent_certificate_expiry_timestamp_seconds{purpose="agent"}' in text


async def test_a_hypervisor_that_hangs_costs_the_vm_series_only(world: World) -> None:
    fault = world.fleet.plan_fault("list_domains", Fault(FaultKind.HANG))
    text = await world.scrape()
    fault.released.set()
    assert "trimtab_agent_build_info" in text
    assert "trimtab_vm_" not in text


async def test_promtool_finds_nothing_wrong(world: World) -> None:
    world.hypervisor.define_domain(domain_spec(disks=()), Stamp(1, 1))
    text = await world.scrape()
    promtool = shutil.which("promtool")
    assert promtool is not None, "install the Debian package prometheus"
    done = await asyncio.to_thread(
        subprocess.run, [promtool, "check", "metrics"], input=text, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
