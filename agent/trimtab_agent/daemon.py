"""The agent's process: puts together what `agent.toml` says, runs until it is told to stop, and leaves guests and jobs alone."""

import asyncio
import fcntl
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import structlog

from trimtab_agent import config, leave, metrics
from trimtab_agent.agent import Agent, AgentParts, read_boot_id
from trimtab_agent.backup.source import BackupSource
from trimtab_agent.certificates import PURPOSE_AGENT, IdentityFiles, report
from trimtab_agent.clock import SystemClock
from trimtab_agent.config import Settings
from trimtab_agent.guard import NOT_ASKED_FOR, BeaconPlace, Guard
from trimtab_agent.hypervisor.base import Hypervisor
from trimtab_agent.hypervisor.kvm.pool_layout import FILE_KINDS
from trimtab_agent.jobs import DEFAULT_LIMITS, JobKind
from trimtab_agent.journal import open_or_replace
from trimtab_agent.libvirt_tls import LibvirtCertificates, reload_libvirtd
from trimtab_agent.renewal import Renewal
from trimtab_agent.servicer import host_pools
from trimtab_agent.sources import Sources
from trimtab_agent.supervised import notify, watchdog_limit_s
from trimtab_agent.systemd import RealSystemctl
from trimtab_agent.version import agent_version
from trimtab_agent.workers import WorkerPool
from trimtab_protos.errors import Conflict, NotFound

log = structlog.get_logger(__name__)

LIBVIRT_WAIT_S = 3.0
FEEDS_PER_WATCHDOG = 6
LEAVE_ANSWER_S = 1.0
"""Between undoing the join and ending: the answer must reach the controller first."""


def run(settings: Settings) -> None:
    """Run the agent until SIGTERM or SIGINT. Conflict where another agent runs on this state directory."""
    settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    settings.runtime_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.callback(os.close, _lock(settings.lock_path))
        asyncio.run(_serve(settings, stack))


async def _serve(settings: Settings, stack: ExitStack) -> None:
    loop, stopping = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    identity, libvirt = IdentityFiles(settings.certificate_dir), LibvirtCertificates()
    journal = open_or_replace(settings.journal_path)
    stack.callback(journal.close)
    sources = Sources(identity, gateways=lambda: config.known_gateways(settings))
    hypervisor, backups = _hypervisor(settings, sources, stack)

    guard = _guard(settings, lambda: agent)

    def undo_join(keep_certificates: bool) -> Sequence[str]:
        try:
            if guard is not None:
                guard.stand_down()
            undone = leave.leave(RealSystemctl(), keep_certificates=keep_certificates, release=lambda: _release_domains(settings))
        except NotFound:
            undone = ()  # an earlier call did it and its answer was lost
        loop.call_soon_threadsafe(loop.call_later, LEAVE_ANSWER_S, stopping.set)
        return undone

    def on_renewed() -> None:
        if agent.session is not None:
            agent.session.resync()

    renewal = Renewal(
        identity,
        gateways=lambda: config.known_gateways(settings),
        libvirt_certificate=libvirt.certificate_pem,
        install_libvirt=partial(_install_libvirt, libvirt),
        on_renewed=on_renewed,
    )
    agent = Agent(
        AgentParts(
            host_id=settings.host_id,
            hypervisor=hypervisor,
            backups=backups,
            warden=guard or NOT_ASKED_FOR,
            journal=journal,
            pools=host_pools(),
            watch=WorkerPool("watch", threads=4),
            listen_address=settings.listen_address,
            agent_address=settings.agent_address,
            migration_address=settings.migration_address,
            gateways=config.known_gateways(settings),
            credentials=identity,
            certificates=lambda: (report(PURPOSE_AGENT, identity.current().certificate_pem), *libvirt.report()),
            leave=undo_join,
            reboot=lambda: RealSystemctl().run("reboot", ""),
            job_limits=_job_limits(settings),
            on_gateways=lambda addresses: config.remember_gateways(settings, tuple(addresses)),
            on_ca_bundle=renewal.bundle_told,
        )
    )
    if settings.metrics_address:
        stack.callback(metrics.serve(agent, settings.metrics_address))
    watched = loop.create_task(_feed_watchdog())
    await agent.start()
    beside = [watched, *(loop.create_task(part) for part in (renewal.run(), *([guard.run()] if guard is not None else [])))]
    await stopping.wait()
    log.info("agent stops", host_id=settings.host_id)
    for task in beside:
        task.cancel()
    await agent.stop()


async def _feed_watchdog() -> None:
    """Feed the supervisor's watchdog from the loop that also renews the lease: one that stands still is killed and started anew."""
    limit_s = watchdog_limit_s()
    while limit_s:
        notify("WATCHDOG=1")
        await asyncio.sleep(limit_s / FEEDS_PER_WATCHDOG)


def _job_limits(settings: Settings) -> dict[JobKind, int]:
    return {**DEFAULT_LIMITS, JobKind.IMPORT: settings.imports_at_once, JobKind.MIGRATION: settings.migrations_at_once}


def _install_libvirt(libvirt: LibvirtCertificates, ca_pem: bytes, certificate_pem: bytes, key_pem: bytes) -> None:
    libvirt.install(ca_pem=ca_pem, certificate_pem=certificate_pem, key_pem=key_pem)
    reload_libvirtd()


def _guard(settings: Settings, agent: Callable[[], Agent]) -> Guard | None:
    """Return the warden's client; None where it was refused, or guests are simulated and there is nothing to kill."""
    if settings.hypervisor == "simulated" or settings.lease_fencing == "off":
        return None
    boot_id = read_boot_id()

    def beacon() -> BeaconPlace | None:
        """Return the place that was named, else the first shared pool: any host that reaches it can be asked to write there."""
        if not settings.beacon:
            return None
        # A slot is a file.
        shared = [one for one in agent().known_pools.specs() if one.is_shared and one.kind in FILE_KINDS]
        shared.sort(key=lambda one: one.pool_id)
        wanted = [one for one in shared if settings.beacon_pool_id in {"", one.pool_id}]
        if not wanted:
            return None
        return BeaconPlace(host_id=settings.host_id, boot_id=boot_id, pool_id=wanted[0].pool_id, pool_path=wanted[0].path)

    def reopen() -> None:
        session = agent().session
        if session is not None:
            session.resync()

    return Guard(
        runtime_dir=settings.runtime_dir,
        state_dir=settings.state_dir,
        clock=SystemClock(),
        on_killed=lambda vm_ids: agent().tell_killed(vm_ids),
        needs_beacon=settings.lease_fencing == "auto",
        beacon=beacon,
        on_forbidden=reopen,
    )


def _hypervisor(settings: Settings, sources: Sources, stack: ExitStack) -> tuple[Hypervisor, BackupSource]:
    if settings.hypervisor == "simulated":
        from trimtab_agent.hypervisor.simulated import SimulatedHost, SimulatedHypervisor
        from trimtab_agent.hypervisor.simulated_backups import SimulatedBackups
        from trimtab_agent.hypervisor.simulation import SimulatedFleet

        fleet = SimulatedFleet()
        stack.callback(fleet.close)
        host = SimulatedHost(host_id=settings.host_id, migration_address=settings.migration_address)
        simulated = SimulatedHypervisor(fleet, host, reader=sources)
        return simulated, SimulatedBackups(fleet.clock, auto_disk_bytes=1 << 20, hypervisor=simulated)
    # Only here: libvirt's bindings are not needed, nor perhaps installed, where hosts are simulated.
    from trimtab_agent.hypervisor.kvm.config import KvmConfig
    from trimtab_agent.hypervisor.kvm.hypervisor import KvmHypervisor

    kvm = KvmHypervisor(
        KvmConfig(
            migration_address=settings.migration_address,
            libvirt_uri=settings.libvirt_uri,
            runtime_dir=settings.runtime_dir,
            state_dir=settings.state_dir,
            agent_version=agent_version(),
            balloon_low_permille=settings.balloon_low_permille,
            balloon_high_permille=settings.balloon_high_permille,
        ),
        sources,
    )
    kvm.start()
    stack.callback(kvm.stop)
    # So that the first Hello knows the guests; where libvirt is down, the lease must not wait for it.
    kvm.wait_until_up(LIBVIRT_WAIT_S)
    return kvm, kvm.backups


def _release_domains(settings: Settings) -> Sequence[str]:
    if settings.hypervisor == "simulated":
        return ()
    from trimtab_agent.hypervisor.kvm.release import release

    return release(settings.libvirt_uri)


def _lock(path: Path) -> int:
    """Hold the state directory for this process; two agents would answer with two memories."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise Conflict("agent-running", f"another agent runs on {path.parent}", path=path) from error
    return descriptor
