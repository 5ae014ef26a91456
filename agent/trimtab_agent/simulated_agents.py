"""Agents over simulated hosts inside one process: the real servicer, journal and session on a hypervisor in memory.

For tests of whatever drives agents:

    fleet = SimulatedFleet()
    agent = await start_simulated_agent(fleet, SimulatedHost(host_id="host-1"), resources=SharedResources(), ...)

An agent may be stopped and another started on the same hypervisor, as when the daemon restarts and libvirtd does not.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from trimtab_agent.agent import Agent, AgentParts
from trimtab_agent.backup.source import BackupSource
from trimtab_agent.certificates import PURPOSE_AGENT, FixedCredentials, report
from trimtab_agent.hypervisor.base import SourceReader
from trimtab_agent.hypervisor.simulated import SimulatedHost, SimulatedHypervisor
from trimtab_agent.hypervisor.simulated_backups import SimulatedBackups
from trimtab_agent.hypervisor.simulation import SimulatedFleet
from trimtab_agent.journal import JournalFile
from trimtab_agent.servicer import Pools
from trimtab_agent.workers import InlinePool, WorkerPool
from trimtab_protos.messages import Certificate
from trimtab_protos.tls import Credentials

SHARED_THREADS = 64
"""Simulated verbs with a latency hold a thread while they sleep."""
SHARED_JOB_THREADS = 128


def shared_pools(*, threads: int = SHARED_THREADS, job_threads: int = SHARED_JOB_THREADS) -> Pools:
    """Return thread pools for many hosts; threads start when needed."""
    return Pools(
        query=WorkerPool("query", threads=threads, max_queued=100_000),
        storage=WorkerPool("storage", threads=threads, max_queued=100_000),
        mutate=WorkerPool("mutate", threads=threads, max_queued=100_000),
        jobs=WorkerPool("jobs", threads=job_threads, max_queued=100_000),
    )


def inline_pools(*, job_threads: int = SHARED_JOB_THREADS) -> Pools:
    """Return pools for hosts whose verbs take no time: only jobs get threads."""
    return Pools(
        query=InlinePool("query"),
        storage=InlinePool("storage"),
        mutate=InlinePool("mutate"),
        jobs=WorkerPool("jobs", threads=job_threads, max_queued=100_000),
    )


@dataclass(slots=True)
class SharedResources:
    """What the simulated agents of a process share."""

    journal: JournalFile = field(default_factory=lambda: JournalFile(":memory:"))
    pools: Pools = field(default_factory=shared_pools)
    watch: WorkerPool = field(default_factory=lambda: WorkerPool("watch", threads=4, max_queued=100_000))

    def close(self) -> None:
        self.journal.close()
        self.pools.close()
        self.watch.close()


async def start_simulated_agent(
    fleet: SimulatedFleet,
    host: SimulatedHost,
    *,
    resources: SharedResources,
    credentials: Credentials | None,
    listen_address: str = "127.0.0.1:0",
    gateways: Sequence[str] = (),
    reader: SourceReader | None = None,
    rng: random.Random | None = None,
    backups: BackupSource | None = None,
    reboot: Callable[[], None] = lambda: None,
) -> Agent:
    """Start an agent on a simulated host, a new one or one that is in the fleet already (an agent's restart).

    `credentials=None` listens without TLS; `listen_address` must then be `unix:/path`. Without `gateways` the host holds no
    lease until `Agent.grant_lease`.
    """
    hypervisor = fleet.hosts.get(host.host_id) or SimulatedHypervisor(fleet, host, reader=reader)
    source = FixedCredentials(credentials) if credentials is not None else None

    def certificates() -> Sequence[Certificate]:
        return (report(PURPOSE_AGENT, source.current().certificate_pem),) if source is not None else ()

    agent = Agent(
        AgentParts(
            host_id=host.host_id,
            hypervisor=hypervisor,
            journal=resources.journal,
            pools=resources.pools,
            watch=resources.watch,
            listen_address=listen_address,
            migration_address=host.migration_address,
            gateways=gateways,
            credentials=source,
            boot_id=hypervisor.boot_id,
            clock=fleet.clock,
            rng=rng or random.Random(host.host_id),
            certificates=certificates,
            backups=backups or SimulatedBackups(fleet.clock, auto_disk_bytes=1 << 20, hypervisor=hypervisor),
            reboot=reboot,
            look_at_peer=lambda peer, _rate_bytes: fleet.look(host.host_id, peer.host_id),
            is_load_free=True,
            has_own_connections=True,
        )
    )
    await agent.start()
    return agent


async def stop_simulated_agent(agent: Agent) -> None:
    """Stop the agent and leave its simulated host as it is."""
    await agent.stop()
    hypervisor = agent.parts.hypervisor
    if isinstance(hypervisor, SimulatedHypervisor):
        hypervisor.unsubscribe(agent.on_change)
