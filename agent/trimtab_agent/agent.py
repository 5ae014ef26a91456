"""One host's agent, put together: journal, jobs, servicer, session. The real daemon makes one, a simulated fleet a thousand.

start: journal ─► jobs resumed ─► AgentService and ReplicaService served ─► session opened
stop:  stream closed, commands under way finished (bounded), server stopped; jobs are left to the next agent
"""

import asyncio
import contextlib
import random
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from trimtab_agent import edge
from trimtab_agent.adoption import AdoptionServicer
from trimtab_agent.backup.access import Repositories
from trimtab_agent.backup.export.exports import BackupFiles, Exports
from trimtab_agent.backup.holding import Holds
from trimtab_agent.backup.instant import InstantServicer, fill_runner
from trimtab_agent.backup.jobs import backup_runners
from trimtab_agent.backup.servicer import BackupServicer
from trimtab_agent.backup.source import BackupSource
from trimtab_agent.beacon_servicer import BeaconServicer
from trimtab_agent.certificates import CredentialSource
from trimtab_agent.clock import Clock, SystemClock
from trimtab_agent.commands import Commands
from trimtab_agent.consoles import ConsoleServicer
from trimtab_agent.given_numbers import GivenNumbers
from trimtab_agent.guard import NO_WARDEN, Warden
from trimtab_agent.host_servicer import HostServicer
from trimtab_agent.hypervisor.base import DomainChange, Hypervisor, Stamp
from trimtab_agent.inventory import InventoryReader
from trimtab_agent.jobs import DEFAULT_LIMITS, JobKind, Jobs
from trimtab_agent.journal import JournalFile
from trimtab_agent.layers import LayerServicer, layer_runners
from trimtab_agent.lease import Lease, LeaseState
from trimtab_agent.observer import KnownPools, Observer
from trimtab_agent.outbox import ItemKind, Outbox
from trimtab_agent.packets import LookAtPeer, NetworkServicer, ProbeServicer
from trimtab_agent.peer_check import PeerCheck
from trimtab_agent.proof.lines import Lines
from trimtab_agent.proof.servicer import ProofServicer
from trimtab_agent.replay import Replay
from trimtab_agent.replica import Offers, ReplicaServicer
from trimtab_agent.runners import job_runners
from trimtab_agent.secrets_servicer import SecretServicer
from trimtab_agent.servicer import AgentServicer, Pools
from trimtab_agent.session import Identity, Session
from trimtab_agent.workers import WorkerPool
from trimtab_protos import tls
from trimtab_protos.agent.v1 import domain_pb2
from trimtab_protos.agent.v1.adoption_service_pb2_grpc import add_AdoptionServiceServicer_to_server
from trimtab_protos.agent.v1.agent_service_pb2_grpc import (
    add_AgentServiceServicer_to_server,
    add_ReplicaServiceServicer_to_server,
)
from trimtab_protos.agent.v1.backup_service_pb2_grpc import add_BackupServiceServicer_to_server
from trimtab_protos.agent.v1.beacon_service_pb2_grpc import add_BeaconServiceServicer_to_server
from trimtab_protos.agent.v1.console_service_pb2_grpc import add_ConsoleServiceServicer_to_server
from trimtab_protos.agent.v1.host_service_pb2_grpc import add_HostServiceServicer_to_server
from trimtab_protos.agent.v1.instant_service_pb2_grpc import add_InstantServiceServicer_to_server
from trimtab_protos.agent.v1.layer_service_pb2_grpc import add_LayerServiceServicer_to_server
from trimtab_protos.agent.v1.network_service_pb2_grpc import (
    add_NetworkServiceServicer_to_server,
    add_ProbeServiceServicer_to_server,
)
from trimtab_protos.agent.v1.proof_service_pb2_grpc import add_ProofServiceServicer_to_server
from trimtab_protos.agent.v1.secret_service_pb2_grpc import add_SecretServiceServicer_to_server
from trimtab_protos.codec import to_proto
from trimtab_protos.controller.v1 import gateway_service_pb2
from trimtab_protos.errors import Internal, TrimtabError, Unavailable
from trimtab_protos.messages import Certificate, NetworkSpec, PoolObservation, PoolSpec

log = structlog.get_logger(__name__)

REBUILD_RETRY_S = 2.0
PRUNE_EVERY_S = 3600.0
DRAIN_S = 10.0
SERVER_GRACE_S = 2.0


def read_boot_id() -> str:
    """Return the kernel's id of this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def no_leave(_keep_certificates: bool) -> Sequence[str]:
    """What a simulated host undoes when it leaves its fleet: nothing."""
    return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentParts:
    """What the composition root decides about one agent."""

    host_id: str
    hypervisor: Hypervisor
    journal: JournalFile
    pools: Pools
    watch: WorkerPool
    """For observing pools; a hung one blocks its thread."""
    listen_address: str
    """`address:port` (port 0: any free one) or `unix:/path`."""
    agent_address: str = ""
    """What the controller dials; empty: the address listened on."""
    migration_address: str = ""
    gateways: Sequence[str] = ()
    """Empty: no session; the agent then never holds a lease by itself."""
    credentials: CredentialSource | None
    """None: no TLS and no check of callers; only on a unix socket, for tests."""
    boot_id: str = field(default_factory=read_boot_id)
    clock: Clock = field(default_factory=SystemClock)
    rng: random.Random = field(default_factory=random.SystemRandom)
    certificates: Callable[[], Sequence[Certificate]] = tuple
    leave: Callable[[bool], Sequence[str]] = no_leave
    reboot: Callable[[], None] = lambda: None
    """Has the operating system restart the machine, and returns."""
    backups: BackupSource | None = None
    """What backups copy from and restore into; None: this host offers none."""
    job_limits: dict[JobKind, int] = field(default_factory=lambda: dict(DEFAULT_LIMITS))
    on_gateways: Callable[[Sequence[str]], None] = lambda _addresses: None
    on_ca_bundle: Callable[[str], None] = lambda _sha256: None
    """Told the SHA-256 of the CA bundle in force at each Welcome."""
    warden: Warden = NO_WARDEN
    is_load_free: bool = False
    """See `Observer`."""
    look_at_peer: LookAtPeer | None = None
    """What tries the way to another host; None: over the links of this machine."""
    has_own_connections: bool = False
    """Set where one process plays several hosts: see `tls.channel_options`."""


class Agent:
    """Lives on one event loop. `lease_state` may be read from any thread."""

    def __init__(self, parts: AgentParts) -> None:
        self.parts = parts
        self.lease = Lease()
        self.given = GivenNumbers(parts.journal, parts.host_id)
        self.replay = Replay(
            parts.journal,
            parts.host_id,
            boot_id=parts.boot_id,
            clock=parts.clock,
            lease=self.lease_state,
            given_lease_number=lambda: self.given.highest.lease_number,
        )
        self.outbox = Outbox(parts.journal, parts.host_id)
        self.repositories = Repositories(parts.clock, holder=parts.host_id)
        self.holds = Holds(parts.clock)
        self.exports = Exports(self.repositories, holder=parts.host_id)
        self.lines = Lines(parts.hypervisor.open_wire)
        self.backup_files = BackupFiles(self.repositories, parts.clock)
        runners = {**job_runners(parts.hypervisor), **layer_runners(parts.hypervisor)}
        if parts.backups is not None:
            runners |= backup_runners(self.repositories, parts.backups, parts.clock, self.holds)
            runners[JobKind.FILL] = fill_runner(self.exports, parts.backups)
        self.jobs = Jobs(
            parts.journal,
            parts.host_id,
            incarnation=self.replay.incarnation,
            outbox=self.outbox,
            pool=parts.pools.jobs,
            runners=runners,
            lease=self.lease_state,
            clock=parts.clock,
            limits=parts.job_limits,
        )
        self.known_pools = KnownPools()
        self.inventory = InventoryReader(
            parts.hypervisor,
            pools=self._observed_pools,
            certificates=parts.certificates,
            migration_address=parts.migration_address,
        )
        self.observer = Observer(
            parts.hypervisor,
            inventory=self.inventory,
            known_pools=self.known_pools,
            query=parts.pools.query,
            watch=parts.watch,
            clock=parts.clock,
            is_load_free=parts.is_load_free,
            on_domains=parts.warden.listed,
        )
        self.commands = Commands(self.replay)
        self.offers = Offers(parts.clock)
        self.session: Session | None = None
        self.address = ""
        """Where the services are served, with the real port; empty before `start`."""
        self._server: grpc.aio.Server | None = None
        self._health: health.aio.HealthServicer | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def incarnation(self) -> str:
        return self.replay.incarnation

    def lease_state(self) -> LeaseState:
        return self.lease.current(now=self.parts.clock.boottime_s())

    def grant_lease(self, *, number: int, ttl_s: float) -> None:
        """Give the host a lease by hand, where there is no gateway: for tests of drivers that speak to the servicer alone."""
        self.lease.sent(-number, at_boottime=self.parts.clock.boottime_s())
        self.lease.acknowledged(-number, number=number, is_granted=True, ttl_s=ttl_s)

    async def start(self) -> None:
        """Serve, and keep a session open. Unavailable where the address cannot be listened on."""
        self.parts.hypervisor.subscribe(self.on_change)
        await edge.wait(self.jobs.resume())
        await self._serve()
        if not self.replay.is_rebuilt:
            self._begin(self._rebuild())
        self._begin(self._prune())
        if self.parts.gateways:
            self.session = self._new_session()
            self._begin(self.session.run())
        log.info("agent serves", host_id=self.parts.host_id, address=self.address, incarnation=self.incarnation)

    async def stop(self) -> None:
        """Tell the gateway, finish what is under way, stop serving. Guests, jobs and the journal file stay as they are."""
        if self.session is not None:
            await self.session.stop()
        if self._health is not None:
            await self._health.enter_graceful_shutdown()
        await self.commands.drain(DRAIN_S)
        self.jobs.detach()
        if self._server is not None:
            await self._server.stop(SERVER_GRACE_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        log.info("agent stopped", host_id=self.parts.host_id)

    # Serving.

    async def _serve(self) -> None:
        credentials = self.parts.credentials
        server = grpc.aio.server(options=tls.server_options())
        add_AgentServiceServicer_to_server(self._agent_servicer(), server)
        add_ReplicaServiceServicer_to_server(self._replica_servicer(), server)
        add_LayerServiceServicer_to_server(self._layer_servicer(), server)
        add_AdoptionServiceServicer_to_server(self._adoption_servicer(), server)
        add_ConsoleServiceServicer_to_server(self._console_servicer(), server)
        add_BeaconServiceServicer_to_server(self._beacon_servicer(), server)
        add_HostServiceServicer_to_server(self._host_servicer(), server)
        add_SecretServiceServicer_to_server(self._secret_servicer(), server)
        add_NetworkServiceServicer_to_server(self._network_servicer(), server)
        add_ProbeServiceServicer_to_server(ProbeServicer(identify=self._identify()), server)
        if self.parts.backups is not None:
            add_BackupServiceServicer_to_server(self._backup_servicer(), server)
            add_ProofServiceServicer_to_server(self._proof_servicer(), server)
            add_InstantServiceServicer_to_server(self._instant_servicer(self.parts.backups), server)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        address = self.parts.listen_address
        if credentials is None and not address.startswith("unix:"):
            raise Internal("tls-required", "an agent without certificates listens on a unix socket only")
        try:
            if credentials is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, tls.server_credentials(credentials.current))
        except RuntimeError as error:
            raise Unavailable("address-in-use", f"cannot listen on {address}: {error}", address=address) from error
        await server.start()
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        self._server = server
        self.address = address if credentials is None else f"{address.rpartition(':')[0]}:{port}"

    def _agent_servicer(self) -> AgentServicer:
        return AgentServicer(
            self.parts.hypervisor,
            commands=self.commands,
            jobs=self.jobs,
            offers=self.offers,
            pools=self.parts.pools,
            known_pools=self.known_pools,
            inventory=self.inventory,
            incarnation=self.incarnation,
            agent_address=lambda: self.parts.agent_address or self.address,
            leave=self.parts.leave,
            warden=self.parts.warden,
            authorise=tls.require_controller if self.parts.credentials else lambda _context: None,
        )

    def _layer_servicer(self) -> LayerServicer:
        return LayerServicer(
            self.parts.hypervisor,
            commands=self.commands,
            jobs=self.jobs,
            pools=self.parts.pools,
            authorise=tls.require_controller if self.parts.credentials else lambda _context: None,
        )

    def _adoption_servicer(self) -> AdoptionServicer:
        return AdoptionServicer(
            self.parts.hypervisor,
            commands=self.commands,
            pools=self.parts.pools,
            authorise=tls.require_controller if self.parts.credentials else lambda _context: None,
        )

    def _console_servicer(self) -> ConsoleServicer:
        return ConsoleServicer(
            self.parts.hypervisor,
            query=self.parts.pools.query,
            authorise=tls.require_controller if self.parts.credentials else lambda _context: None,
        )

    def _host_servicer(self) -> HostServicer:
        return HostServicer(
            self.parts.hypervisor,
            commands=self.commands,
            pool=self.parts.pools.mutate,
            boot_id=self.parts.boot_id,
            reboot=self.parts.reboot,
            authorise=tls.require_controller if self.parts.credentials else lambda _context: None,
        )

    def _secret_servicer(self) -> SecretServicer:
        return SecretServicer(
            self.parts.hypervisor,
            pool=self.parts.pools.query,
            authorise=tls.require_controller if self.parts.credentials else lambda _context: None,
        )

    def _beacon_servicer(self) -> BeaconServicer:
        return BeaconServicer(authorise=tls.require_controller if self.parts.credentials else lambda _context: None)

    def _backup_servicer(self) -> BackupServicer:
        return BackupServicer(
            self.repositories,
            self.holds,
            commands=self.commands,
            jobs=self.jobs,
            pool=self.parts.pools.storage,
            query=self.parts.pools.query,
            authorise=tls.require_controller if self.parts.credentials else lambda _context: None,
        )

    def _instant_servicer(self, source: BackupSource) -> InstantServicer:
        return InstantServicer(
            self.repositories,
            source,
            self.exports,
            self.backup_files,
            commands=self.commands,
            jobs=self.jobs,
            pool=self.parts.pools.storage,
            query=self.parts.pools.query,
            authorise=tls.require_controller if self.parts.credentials else lambda _context: None,
        )

    def _proof_servicer(self) -> ProofServicer:
        return ProofServicer(
            self.lines,
            pool=self.parts.pools.storage,
            authorise=tls.require_controller if self.parts.credentials else lambda _context: None,
        )

    def _network_servicer(self) -> NetworkServicer:
        return NetworkServicer(
            self.parts.hypervisor,
            self.parts.look_at_peer or PeerCheck(self.parts.credentials).run,
            commands=self.commands,
            pools=self.parts.pools,
            authorise=tls.require_controller if self.parts.credentials else lambda _context: None,
        )

    def _replica_servicer(self) -> ReplicaServicer:
        return ReplicaServicer(self.parts.hypervisor, self.offers, pool=self.parts.pools.storage, identify=self._identify())

    def _identify(self) -> Callable[[tls.AuthContext], str]:
        return tls.peer_host_id if self.parts.credentials else lambda _context: ""

    def _new_session(self) -> Session:
        identity = Identity(
            host_id=self.parts.host_id,
            incarnation=self.incarnation,
            boot_id=self.parts.boot_id,
            agent_address=self.parts.agent_address or self.address,
        )
        return Session(
            identity,
            gateways=self.parts.gateways,
            dial=self._dial,
            lease=self.lease,
            observer=self.observer,
            outbox=self.outbox,
            jobs=self.jobs,
            known_pools=self.known_pools,
            query=self.parts.pools.query,
            clock=self.parts.clock,
            rng=self.parts.rng,
            on_welcome=self._on_welcome,
            warden=self.parts.warden,
            given=self.given,
        )

    def _dial(self, address: str) -> grpc.aio.Channel:
        options = tls.channel_options(tls.CONTROLLER_NAME, is_own_connection=self.parts.has_own_connections)
        if self.parts.credentials is None:
            return grpc.aio.insecure_channel(address, options=options)
        return grpc.aio.secure_channel(address, self.parts.credentials.current().for_channel(), options=options)

    def _observed_pools(self) -> Sequence[PoolObservation]:
        return self.observer.pools()

    # What happens beside calls.

    def on_change(self, change: DomainChange) -> None:
        self.parts.warden.seen(change.domain)
        event = gateway_service_pb2.DomainEvent(domain=to_proto(change.domain, domain_pb2.DomainObservation), kind=change.kind)
        self.outbox.add(ItemKind.DOMAIN_EVENT, event.SerializeToString())

    async def tell_killed(self, vm_ids: Sequence[str]) -> None:
        """Report guests that the warden killed; returns when the report cannot be lost any more."""
        for vm_id in vm_ids:
            seen = await edge.in_pool(self.parts.pools.query, partial(self.parts.hypervisor.observe_domain, vm_id))
            event = gateway_service_pb2.DomainEvent(domain=to_proto(seen, domain_pb2.DomainObservation), kind="killed-by-warden")
            await edge.wait(self.outbox.add(ItemKind.DOMAIN_EVENT, event.SerializeToString()))

    def _on_welcome(
        self, pools: Sequence[PoolSpec], networks: Sequence[NetworkSpec], ca_bundle_sha256: str, gateways: Sequence[str]
    ) -> None:
        self.parts.on_gateways(gateways)
        self.parts.on_ca_bundle(ca_bundle_sha256)
        for pool in pools:
            self._ensure_later(self.parts.pools.storage, f"pool {pool.pool_id}", lambda pool=pool: self._ensure_pool(pool))  # type: ignore[misc]
        for network in networks:
            # After a boot nothing of ours is there: networks do not start by themselves.
            self._ensure_later(
                self.parts.pools.mutate,
                f"network {network.network_id}",
                lambda network=network: self.parts.hypervisor.ensure_network(network),  # type: ignore[misc]
            )

    def _ensure_pool(self, pool: PoolSpec) -> None:
        self.parts.hypervisor.ensure_pool(pool)

    def _ensure_later(self, pool: WorkerPool, what: str, call: Callable[[], None]) -> None:
        def ensure() -> None:
            try:
                call()
            except TrimtabError as error:
                log.warning("not usable on this host", what=what, code=error.code, message=error.message)

        with contextlib.suppress(Unavailable):  # busy: the next Welcome asks again
            pool.submit(ensure)

    async def _rebuild(self) -> None:
        """Read turns and epochs back from the domains' metadata; until then commands are refused."""
        while not self.replay.is_rebuilt:
            try:
                domains = await edge.in_pool(self.parts.pools.query, self.parts.hypervisor.list_domains)
                stamps = [(seen.vm_id, Stamp(epoch=seen.epoch, turn=seen.turn)) for seen in domains if seen.vm_id]
                await edge.wait(self.replay.rebuild(stamps))
                log.info("journal rebuilt", domains=len(stamps))
            except TrimtabError as error:
                log.warning("journal not rebuilt yet", code=error.code)
                await asyncio.sleep(REBUILD_RETRY_S)

    async def _prune(self) -> None:
        while True:
            await asyncio.sleep(PRUNE_EVERY_S)
            try:
                await edge.wait(self.replay.prune())
                await edge.wait(self.jobs.prune())
            except TrimtabError as error:
                log.warning("journal not pruned", code=error.code)

    def _begin(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(_log_death)
        self._tasks.append(task)


def _log_death(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("task of the agent died", task=task.get_name(), exc_info=task.exception())
