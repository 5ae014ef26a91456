"""Moves a running domain to another host: readies the target, moves and follows, settles each side.

    target: prepare ──────────────────────────────▶ INCOMING ─▶ RUNNING ─▶ settle(KEEP)
    source:           migrate (RUNNING, is_migrating) ────────▶ STOPPED/MIGRATED ─▶ settle(REMOVE)

libvirtd of the source drives it (peer-to-peer), so an agent may die and attach again. What `migrate` returns or raises is never
proof of where the domain is: the controller observes both hosts, then settles. Hence no UNDEFINE_SOURCE: the source's definition is
evidence until it is settled.

Disks on local storage are copied into files that `prepare` made: a clone of an image onto an overlay of the same image, so that only what
the guest wrote travels (NON_SHARED_INC copies the top layer); a linked clone of another volume, whose base stays behind, as a whole into a
file that lies over nothing (NON_SHARED_DISK; `is_flattened`). A copy that an earlier attempt left is made anew: clusters that the source
no longer has would otherwise stay in it.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import libvirt
import structlog

from trimtab_agent.hypervisor.base import JobControl, Stamp
from trimtab_agent.hypervisor.kvm import (
    block_pools,
    copy_connections,
    domain_facts,
    domain_xml,
    errors,
    layer_files,
    state_files,
    volumes,
)
from trimtab_agent.hypervisor.kvm.config import KvmConfig
from trimtab_agent.hypervisor.kvm.connection import Connection
from trimtab_agent.hypervisor.kvm.console import ConsoleLogs
from trimtab_agent.hypervisor.kvm.domain_xml import HostTraits
from trimtab_agent.hypervisor.kvm.domains import Domains, find, is_adopted, require, require_volumes
from trimtab_agent.hypervisor.kvm.firewall import INCOMING_GRACE_S, RECEIVED_GRACE_S, Firewall
from trimtab_agent.hypervisor.kvm.inventory import InventoryReader
from trimtab_agent.hypervisor.kvm.migration_xml import disk_targets, retarget
from trimtab_agent.hypervisor.kvm.networks import Networks
from trimtab_agent.hypervisor.kvm.observe import Observer, absent, migration_operation, process_id_of
from trimtab_agent.hypervisor.kvm.pool_layout import PoolLayout
from trimtab_agent.hypervisor.kvm.pools import Pools
from trimtab_agent.hypervisor.kvm.torn_migration import (
    Step,
    TornMigration,
    end_connection,
    end_connection_there,
    progress,
)
from trimtab_agent.hypervisor.kvm.volume_keys import Need, VolumeKeys, secret_uuid, take_from_libvirt
from trimtab_protos.errors import Conflict, DeadlineExceeded, Internal, TrimtabError
from trimtab_protos.messages import (
    DomainObservation,
    DomainSpec,
    DomainState,
    JobProgress,
    MigrationOptions,
    MigrationResult,
    MigrationSide,
    PoolKind,
    VolumeSpec,
)

log = structlog.get_logger(__name__)

REPORT_EVERY_S = 1.0
RESUME_FOR_S = 90.0
"""Memory that did not move for so long after a post-copy broke is given up; until then the guest may stand still. On hosts that are very
busy half a minute was not enough, though both sides were there (seen with libvirt 9.0)."""
RESUME_EVERY_S = 2.0
TRIES_AT_LEAST = 6
"""However late it is: libvirt on a target that has not seen its connection die refuses for half a minute (seen with 9.0), so that one
refused try would be all that fits into the time."""
_POLL_S = 0.2
_POSTCOPY_AFTER_ITERATIONS = 2
"""Memory that a second pass did not catch up with will not converge by itself; then post-copy, where it is allowed."""
_FLAGS = libvirt.VIR_MIGRATE_LIVE | libvirt.VIR_MIGRATE_PEER2PEER | libvirt.VIR_MIGRATE_PERSIST_DEST
_LIVE_XML = libvirt.VIR_DOMAIN_XML_SECURE | libvirt.VIR_DOMAIN_XML_MIGRATABLE
_LOST_PEER_TEXTS = ("client socket is closed", "keepalive timeout", "end of file while reading")


@dataclass(slots=True)
class _Move:
    """One `migrateToURI3` on its own thread and its own connection: a connection serves one thread."""

    ended: threading.Event = field(default_factory=threading.Event)
    error: libvirt.libvirtError | None = None
    is_connection_lost: bool = False
    refusal: TrimtabError | None = None
    """Why it never began."""


class Migrations:
    """Prepares, drives and settles migrations. Thread-safe."""

    def __init__(
        self,
        config: KvmConfig,
        connection: Connection,
        domains: Domains,
        observer: Observer,
        networks: Networks,
        firewall: Firewall,
        pools: Pools,
        logs: ConsoleLogs,
        inventory: InventoryReader,
        keys: VolumeKeys,
        *,
        boot_id: str,
    ) -> None:
        self._config = config
        self._connection = connection
        self._domains = domains
        self._observer = observer
        self._networks = networks
        self._firewall = firewall
        self._pools = pools
        self._logs = logs
        self._inventory = inventory
        self._keys = keys
        self._boot_id = boot_id

    # --- target ----------------------------------------------------------------------------------------------------------

    def prepare(self, domain: DomainSpec, copied_volumes: Sequence[VolumeSpec], *, source_host_id: str) -> tuple[str, str]:
        """See `Hypervisor.prepare_migration`."""
        log.info("preparing to receive a domain", vm_id=domain.vm_id, source_host_id=source_host_id)
        with self._domains.locks.hold(domain.vm_id):
            self._inventory.refuse_unfit(domain)
            self._keys.require(_owners(domain))
            _refuse_unsafe(domain, frozenset(volume.volume_id for volume in copied_volumes))
            self._drop_stale_definition(domain.vm_id)
            layouts = PoolLayout.of_files(domain.pools)
            for pool in domain.pools:
                self._pools.ensure(pool)
            self._networks.ensure_for(domain)
            for volume in copied_volumes:
                if volume.pool_id not in layouts:
                    raise Conflict(
                        "migration-unsafe", f"volume {volume.volume_id} is a block device of its host and is not copied"
                    )
                layout = layouts[volume.pool_id]
                self._domains.refuse_if_used(volumes.names_of(volume.volume_id, layout), f"volume {volume.volume_id}")
                volumes.delete(volume.volume_id, layout)
                volumes.ensure(volume, layout, key=self._keys.of_volume(volume))
            require_volumes(domain)
            state_files.ensure(domain)
            self._firewall.ensure(domain, grace_s=INCOMING_GRACE_S)
            self._logs.prepare(domain.vm_id, max_bytes=domain.serial_log_max_bytes)
            self._domains.console_sockets.prepare()
            with self._connection.use(f"keep keys for {domain.vm_id}", changes=True) as connection:
                # Until the guest is here or is not: libvirt asks for them when the source begins.
                self._keys.put_into_libvirt(connection, _needs(domain))
        address = self._config.migration_address
        transport = "tls" if self._config.has_tls else "tcp"
        return f"qemu+{transport}://{_bracketed(address)}/system", f"tcp://{_bracketed(address)}"

    def _drop_stale_definition(self, vm_id: str) -> None:
        with self._connection.use(f"look for an earlier {vm_id}", changes=True) as connection:
            existing = find(connection, vm_id)
            if existing is None:
                return
            if existing.isActive():
                seen = self._observer.observe(existing)
                raise Conflict("domain-runs-here", f"{vm_id} is {seen.state.value} on the target already", state=seen.state.value)
        self._domains.undefine_locked(vm_id, (), kill_if_running=False, keep_state_files=True)

    # --- source ----------------------------------------------------------------------------------------------------------

    def migrate(
        self,
        vm_id: str,
        target: DomainSpec,
        stamp: Stamp,
        *,
        libvirt_uri: str,
        migration_uri: str,
        copied_volume_ids: Sequence[str],
        options: MigrationOptions,
        control: JobControl,
    ) -> MigrationResult:
        """See `Hypervisor.migrate`."""
        started_at = time.monotonic()
        with self._connection.use(f"migrate {vm_id}", changes=True) as connection:
            domain = require(connection, vm_id)
            move = None
            if _is_leaving(domain):
                log.info("attaching to a migration under way", vm_id=vm_id)
            else:
                self._refuse_immovable(domain, vm_id, target, frozenset(copied_volume_ids))
                parameters, flags = self._parameters(domain, target, stamp, migration_uri, copied_volume_ids, options)
                move = self._start(vm_id, libvirt_uri, parameters, flags)
            is_late = _follow(domain, move, options, control)
            if move is not None and move.refusal is not None:
                raise move.refusal
            if move is not None and move.error is not None and _is_torn(domain):

                def again() -> _Move:
                    resumed = self._start(vm_id, libvirt_uri, parameters, flags | libvirt.VIR_MIGRATE_POSTCOPY_RESUME)
                    _follow(domain, resumed, options, control)
                    return resumed

                move = _resume(domain, move, again, vm_id=vm_id, libvirt_uri=libvirt_uri)
            if move is not None and not move.ended.is_set():
                raise Conflict("migration-torn", f"memory of {vm_id} was on its way when its connection broke, and never went on")
            if move is not None and move.error is not None:
                if move.is_connection_lost:
                    raise DeadlineExceeded("hypervisor-lost", f"libvirt went away while {vm_id} migrated; look at both hosts")
                _raise_outcome(move.error, vm_id, is_cancelled=control.cancelled.is_set(), is_late=is_late)
            if domain.isActive():
                code = "job-cancelled" if control.cancelled.is_set() else "migration-failed"
                raise Conflict(code, f"the migration of {vm_id} ended and the domain is still here", is_late=is_late)
            return _result(domain, started_at)

    def _start(self, vm_id: str, libvirt_uri: str, parameters: dict[str, Any], flags: int) -> _Move:
        move = _Move()

        def run() -> None:
            try:
                with self._connection.use(f"migrate {vm_id}", changes=True) as connection:
                    try:
                        require(connection, vm_id).migrateToURI3(libvirt_uri, parameters, flags)
                    except libvirt.libvirtError as error:
                        move.error, move.is_connection_lost = error, not connection.isAlive()
            except TrimtabError as error:
                move.refusal = error
            finally:
                move.ended.set()

        threading.Thread(target=run, name=f"migrate-{vm_id}", daemon=True).start()
        return move

    def _refuse_immovable(self, domain: Any, vm_id: str, target: DomainSpec, copied: frozenset[str]) -> None:
        seen = self._observer.observe(domain)
        if seen.state not in (DomainState.RUNNING, DomainState.PAUSED):
            raise Conflict("wrong-domain-state", f"{vm_id} is {seen.state.value}; only a running domain migrates")
        _refuse_unsafe(target, copied)

    def _parameters(
        self,
        domain: Any,
        target: DomainSpec,
        stamp: Stamp,
        migration_uri: str,
        copied_volume_ids: Sequence[str],
        options: MigrationOptions,
    ) -> tuple[dict[str, Any], int]:
        live_xml = domain.XMLDesc(_LIVE_XML)
        target = layer_files.resolve(target)
        # A running guest keeps its acceleration, whatever a probe would say today.
        facts = domain_facts.read(live_xml)
        host = self._domains.traits(target.vm_id, facts.accelerator)
        parameters: dict[str, Any] = {
            libvirt.VIR_MIGRATE_PARAM_URI: migration_uri,
            libvirt.VIR_MIGRATE_PARAM_DEST_XML: retarget(live_xml, target, stamp, cpu_shares=host.cpu_shares),
            libvirt.VIR_MIGRATE_PARAM_PERSIST_XML: self._stored_xml(domain, target, stamp, host),
        }
        flags = _FLAGS
        if self._config.has_tls:
            flags |= libvirt.VIR_MIGRATE_TLS
        if copied_volume_ids:
            flags |= libvirt.VIR_MIGRATE_NON_SHARED_DISK if options.is_flattened else libvirt.VIR_MIGRATE_NON_SHARED_INC
            parameters[libvirt.VIR_MIGRATE_PARAM_MIGRATE_DISKS] = disk_targets(
                target, frozenset(copied_volume_ids), adopted=facts.adopted_disks
            )
        if options.bandwidth_mib_s:
            parameters[libvirt.VIR_MIGRATE_PARAM_BANDWIDTH] = options.bandwidth_mib_s
        if options.has_auto_converge:
            flags |= libvirt.VIR_MIGRATE_AUTO_CONVERGE
        if options.allow_postcopy:
            flags |= libvirt.VIR_MIGRATE_POSTCOPY
        return parameters, flags

    def _stored_xml(self, domain: Any, target: DomainSpec, stamp: Stamp, host: HostTraits) -> str:
        """Return what the target stores: our definition, or the one that an adopted domain keeps until its next stop."""
        if not is_adopted(domain):
            return domain_xml.build(target, stamp, host)
        return retarget(domain.XMLDesc(_LIVE_XML | libvirt.VIR_DOMAIN_XML_INACTIVE), target, stamp, cpu_shares=host.cpu_shares)

    # --- both sides --------------------------------------------------------------------------------------------------------

    def settle(
        self, vm_id: str, side: MigrationSide, domain: DomainSpec, removed_volumes: Sequence[VolumeSpec], stamp: Stamp
    ) -> DomainObservation:
        """See `Hypervisor.settle_migration`."""
        with self._domains.locks.hold(vm_id):
            seen = self._domains.observe(vm_id)
            if seen.state is DomainState.INCOMING or seen.is_migrating:
                raise Conflict("migration-under-way", f"the migration of {vm_id} has not ended on this host")
            with self._connection.use(f"forget keys of {vm_id}", changes=True) as connection:
                take_from_libvirt(connection, _needs(domain))
            self._keys.forget(disk.volume_id for disk in domain.disks if disk.is_encrypted)
            if side is MigrationSide.KEEP:
                return self._keep(vm_id, seen, domain, stamp)
            if seen.state not in (DomainState.ABSENT, DomainState.STOPPED, DomainState.CRASHED):
                raise Conflict("domain-runs-here", f"{vm_id} is {seen.state.value} on this host", state=seen.state.value)
            local_pools = [pool for pool in domain.pools if not pool.is_shared]
            self._domains.drop_former_names(domain)  # this definition is the last that tells them
            self._domains.undefine_locked(vm_id, local_pools, kill_if_running=False, keep_state_files=False)
            # Never from a shared pool, whoever asks: there the other side uses the very same file.
            layouts = PoolLayout.of_files(local_pools)
            for volume in removed_volumes:
                layout = layouts.get(volume.pool_id)
                if layout is None:
                    continue
                self._domains.refuse_if_used(volumes.names_of(volume.volume_id, layout), f"volume {volume.volume_id}")
                volumes.delete(volume.volume_id, layout)
            return absent(vm_id)

    def _keep(self, vm_id: str, seen: DomainObservation, domain: DomainSpec, stamp: Stamp) -> DomainObservation:
        if seen.state is DomainState.ABSENT:
            raise Conflict("domain-absent", f"{vm_id} is not on this host and cannot be kept here")
        is_here = seen.state not in (DomainState.STOPPED, DomainState.CRASHED)
        boot_id = self._boot_id if is_here else ""
        return self._domains.define_locked(domain, stamp, grace_s=RECEIVED_GRACE_S, received_in_boot=boot_id)


def _owners(domain: DomainSpec) -> tuple[str, ...]:
    """Return the volumes and pools whose secrets the domain needs."""
    pools = (pool.pool_id for pool in domain.pools if block_pools.is_block(pool) and block_pools.needs_secret(pool))
    return (*(disk.volume_id for disk in domain.disks if disk.is_encrypted), *pools)


def _needs(domain: DomainSpec) -> tuple[Need, ...]:
    usages = {PoolKind.ISCSI: "iscsi", PoolKind.RBD: "ceph"}
    kinds = {pool.pool_id: usages.get(pool.kind, "") for pool in domain.pools}
    return tuple(Need(secret_uuid(owner), kinds.get(owner, "") or "volume") for owner in _owners(domain))


def _refuse_unsafe(target: DomainSpec, copied: frozenset[str]) -> None:
    shared = {pool.pool_id for pool in target.pools if pool.is_shared}
    for disk in target.disks:
        if disk.pool_id not in shared and disk.volume_id not in copied:
            raise Conflict("migration-unsafe", f"volume {disk.volume_id} is neither on shared storage nor to be copied")


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _is_leaving(domain: Any) -> bool:
    return bool(domain.isActive()) and migration_operation(domain) == libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT


def _resume(domain: Any, broken: _Move, again: Callable[[], _Move], *, vm_id: str, libvirt_uri: str) -> _Move:
    """Go on with a post-copy whose connection broke; what is returned never went on where it has an error, or has not ended."""
    move, torn, tries = broken, TornMigration(moved_s=time.monotonic()), 0
    step = Step.RESUME
    while time.monotonic() < torn.moved_s + RESUME_FOR_S or (step is not Step.LET_GO_ON and tries < TRIES_AT_LEAST):
        step = torn.look(*progress(domain), time.monotonic())
        log.warning("a post-copy broke", vm_id=vm_id, step=step.value)
        tries += step is not Step.LET_GO_ON
        if step is Step.IS_OVER:
            return _Move(ended=move.ended)
        if step is Step.END_HERE:
            end_connection(domain)
        elif step is Step.RESUME:
            end_connection_there(libvirt_uri, vm_id)
            move = again()
            if not move.ended.is_set() or move.refusal is not None or move.error is None or move.is_connection_lost:
                return move
            log.info("it does not go on yet", vm_id=vm_id, error=move.error.get_error_message())
        time.sleep(RESUME_EVERY_S)  # nobody tells when the link is back
    return move


def _is_torn(domain: Any) -> bool:
    """Tell whether a post-copy broke: the guest's memory is on both hosts, and here it stands still for good."""
    state, reason = domain.state()
    return bool(state == libvirt.VIR_DOMAIN_PAUSED and reason == libvirt.VIR_DOMAIN_PAUSED_POSTCOPY_FAILED)


def _follow(domain: Any, move: _Move | None, options: MigrationOptions, control: JobControl) -> bool:
    """Report until the move ended; abort it where that was asked for or the time is over. Return whether the time was.

    Nor is one waited for whose memory stands still for good: a target that misses memory of its own may answer nobody, libvirt included.
    """
    torn: TornMigration | None = None
    started_at = time.monotonic()
    next_report = 0.0
    is_aborted = is_late = has_downtime = is_postcopy = False
    ended = move.ended if move is not None else threading.Event()
    while not (move.ended.is_set() if move is not None else not _is_leaving(domain)):
        now = time.monotonic()
        # Once the guest runs on the target its memory is torn in two: nothing but going on helps.
        is_late = is_late or bool(options.timeout_s and now - started_at > options.timeout_s and not is_postcopy)
        if (control.cancelled.is_set() or is_late) and not is_aborted and not is_postcopy:
            is_aborted = _try(domain.abortJob)
        if now >= next_report:
            next_report = now + REPORT_EVERY_S
            torn = (torn or TornMigration(moved_s=now)) if _is_torn(domain) else None
            if torn is not None:
                torn.look(*progress(domain), now)
                if now > torn.moved_s + RESUME_FOR_S:
                    return is_late
            statistics = _statistics(domain)
            control.report(_progress(statistics))
            if statistics.get("disk_total") and not is_postcopy:
                copy_connections.bound(process_id_of(domain.name()))
            if options.max_downtime_ms and not has_downtime:
                has_downtime = _try(lambda: domain.migrateSetMaxDowntime(options.max_downtime_ms, 0))
            if options.allow_postcopy and not is_postcopy and _is_lagging(statistics):
                is_postcopy = _try(lambda: domain.migrateStartPostCopy(0))
        ended.wait(_POLL_S)
    return is_late


def _try(act: Callable[[], object]) -> bool:
    """Do what may come too early or too late in a migration's life; tell whether libvirt took it."""
    try:
        act()
    except libvirt.libvirtError as error:
        log.info("migration does not take it now", error=error.get_error_message())
        return False
    return True


def _statistics(domain: Any, flags: int = 0) -> dict[str, Any]:
    try:
        return dict(domain.jobStats(flags))
    except libvirt.libvirtError as error:
        # The domain ended between two looks.
        if error.get_error_code() in (libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_ERR_NO_DOMAIN):
            return {}
        raise


def _progress(statistics: dict[str, Any]) -> JobProgress:
    done, total = int(statistics.get("data_processed", 0)), int(statistics.get("data_total", 0))
    remaining = int(statistics.get("data_remaining", 0))
    rate = int(statistics.get("memory_bps", 0)) + int(statistics.get("disk_bps", 0))
    iteration = statistics.get("memory_iteration", 0)
    phase = "disks" if statistics.get("disk_remaining") else f"memory, pass {iteration}" if iteration else "setup"
    return JobProgress(
        done_bytes=done,
        total_bytes=max(total, done),
        rate_bytes_s=rate,
        phase=phase,
        remaining_s=remaining // rate if rate else 0,
    )


def _is_lagging(statistics: dict[str, Any]) -> bool:
    return int(statistics.get("memory_iteration", 0)) > _POSTCOPY_AFTER_ITERATIONS


def _raise_outcome(error: libvirt.libvirtError, vm_id: str, *, is_cancelled: bool, is_late: bool) -> NoReturn:
    """Raise what the failed migration means; where the guest is now is for the controller to observe."""
    detail = (error.get_error_message() or "")[:400]
    if error.get_error_code() == libvirt.VIR_ERR_OPERATION_ABORTED or is_cancelled:
        if is_late and not is_cancelled:
            raise Conflict("migration-timeout", f"the migration of {vm_id} did not end in its time and was aborted") from error
        raise Conflict("job-cancelled", f"the migration of {vm_id} was cancelled") from error
    if any(text in detail.lower() for text in _LOST_PEER_TEXTS):
        raise DeadlineExceeded(
            "migration-peer-lost", f"the other host went away while {vm_id} migrated; look at both", detail=detail
        ) from error
    translated = errors.translate(error, doing=f"migrate {vm_id}", changes=True, is_connection_lost=False)
    if isinstance(translated, Internal):
        raise Conflict("migration-failed", f"the migration of {vm_id} failed: {detail}") from error
    raise translated from error


def _result(domain: Any, started_at: float) -> MigrationResult:
    # Empty after post-copy: then only our own clock knows.
    statistics = _statistics(domain, libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED)
    elapsed_ms = int((time.monotonic() - started_at) * 1000)
    return MigrationResult(
        total_ms=int(statistics.get("time_elapsed", elapsed_ms)),
        downtime_ms=int(statistics.get("downtime", 0)),
        transferred_bytes=int(statistics.get("data_processed", 0)),
    )
