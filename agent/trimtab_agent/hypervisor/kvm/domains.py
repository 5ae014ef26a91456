"""Domains of this host: found, defined, undefined. Their power is `power.py`'s, their moving `migration.py`'s.

A domain is ours when its metadata says so and its name or its UUID agrees. Others are shown and never touched. An adopted domain
keeps its own name and its own definition until its next stop; the first definition after that is ours in all.
"""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import libvirt

from trimtab_agent.hypervisor.base import Stamp, restarts_elsewhere
from trimtab_agent.hypervisor.kvm import (
    adoption_files,
    console,
    consoles,
    domain_facts,
    domain_xml,
    errors,
    filling,
    layer_files,
    overlays,
    state_files,
    volumes,
    wires,
)
from trimtab_agent.hypervisor.kvm.connection import Connection
from trimtab_agent.hypervisor.kvm.domain_facts import DomainFacts
from trimtab_agent.hypervisor.kvm.domain_xml import METADATA_NAMESPACE, METADATA_PREFIX, HostTraits
from trimtab_agent.hypervisor.kvm.firewall import Firewall
from trimtab_agent.hypervisor.kvm.guarded import GuardedCalls, Hung
from trimtab_agent.hypervisor.kvm.identifiers import check_id, domain_name
from trimtab_agent.hypervisor.kvm.observe import Observer, absent
from trimtab_agent.hypervisor.kvm.pool_layout import PoolLayout
from trimtab_agent.hypervisor.kvm.stamp_xml import AdoptedMark, stamp_metadata
from trimtab_protos.console_messages import ConsoleKind
from trimtab_protos.errors import AlreadyExists, Conflict, NotFound, Unavailable
from trimtab_protos.messages import DomainObservation, DomainSpec, PoolSpec

_UNDEFINE_FLAGS = (
    libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
    | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
    # The file is ours to remove or to keep, like the seed.
    | libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM
)


STORAGE_TIMEOUT_S = 10.0
_UNIFIED_CONTROL_GROUPS = Path("/sys/fs/cgroup/cgroup.controllers")


class VmLocks:
    """One lock per vm: verbs on one vm exclude each other, however many threads serve."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[str, tuple[threading.Lock, int]] = {}

    @contextlib.contextmanager
    def hold(self, vm_id: str) -> Iterator[None]:
        with self._lock:
            lock, users = self._held.get(vm_id, (threading.Lock(), 0))
            self._held[vm_id] = (lock, users + 1)
        try:
            with lock:
                yield
        finally:
            with self._lock:
                lock, users = self._held.pop(vm_id)
                if users > 1:
                    self._held[vm_id] = (lock, users - 1)


class Domains:
    """Ensures and observes domains. Thread-safe."""

    def __init__(
        self,
        connection: Connection,
        observer: Observer,
        logs: console.ConsoleLogs,
        sockets: consoles.ConsoleSockets,
        firewall: Firewall,
        *,
        accelerator: Callable[[], str],
        refuse_unfit: Callable[[DomainSpec], None],
    ) -> None:
        """`refuse_unfit` raises Conflict where this host cannot run such a domain at all."""
        self._connection = connection
        self._observer = observer
        self._logs = logs
        self.console_sockets = sockets
        self._firewall = firewall
        self._accelerator = accelerator
        self._refuse_unfit = refuse_unfit
        self.cpu_shares = 100 if _UNIFIED_CONTROL_GROUPS.exists() else 1024
        """What libvirt counts for a guest of which nothing is said."""
        self.locks = VmLocks()
        self._guarded = GuardedCalls()

    def list(self) -> tuple[DomainObservation, ...]:
        with self._connection.use("list domains") as connection:
            found = [self._observer.observe(domain) for domain in connection.listAllDomains()]
        # One that vanished between list and look is simply not listed.
        return tuple(sorted((each for each in found if each.uuid), key=lambda each: (each.vm_id, each.uuid)))

    def observe(self, vm_id: str) -> DomainObservation:
        check_id(vm_id, "vm_id")
        with self._connection.use(f"observe {vm_id}") as connection:
            domain = find(connection, vm_id)
            return self._observer.observe(domain) if domain is not None else absent(vm_id)

    def open_console(self, vm_id: str, kind: ConsoleKind) -> socket.socket:
        """See `Hypervisor.open_console`."""
        return consoles.join(self._live_xml(vm_id, "open a console"), vm_id, kind)

    def _live_xml(self, vm_id: str, doing: str) -> str:
        check_id(vm_id, "vm_id")
        with self._connection.use(f"{doing} of {vm_id}") as connection:
            domain = require(connection, vm_id)
            if not domain.isActive():
                raise Conflict("wrong-domain-state", f"{vm_id} does not run on this host", state="stopped")
            return str(domain.XMLDesc(0))

    def open_wire(self, vm_id: str, nic_id: str) -> socket.socket:
        """See `Hypervisor.open_wire`."""
        return wires.join(self._live_xml(vm_id, "join a card"), vm_id, nic_id)

    def define(self, domain: DomainSpec, stamp: Stamp) -> DomainObservation:
        """See `Hypervisor.define_domain`."""
        self.check(domain)
        with self.locks.hold(check_id(domain.vm_id, "vm_id")):
            return self.define_locked(domain, stamp)

    def check(self, domain: DomainSpec) -> None:
        """Raise Conflict where this host cannot run such a domain at all."""
        self._refuse_unfit(domain)

    def define_locked(
        self, domain: DomainSpec, stamp: Stamp, *, grace_s: int = 0, received_in_boot: str | None = None
    ) -> DomainObservation:
        """`define` for a caller that holds the vm's lock; `grace_s`: see `Firewall.ensure`.

        `received_in_boot`: of the host, where the domain was received from another one ("": it runs no more); None: it keeps the boot
        that it says.
        """
        domain = layer_files.resolve(domain)
        names: tuple[str, ...] = ()
        # Built first: a spec that cannot be expressed must leave no files.
        document = self._build(domain, stamp, boot_id="")
        state_files.ensure(domain)
        # Before the definition, and so before every start and every card that is plugged.
        self._firewall.ensure(domain, grace_s=grace_s)
        with self._connection.use(f"define {domain.vm_id}", changes=True) as connection:
            existing = find(connection, domain.vm_id)
            if existing is not None and is_adopted(existing):
                if existing.isActive():
                    return self._stamp_adopted(existing, stamp, received_in_boot)
                adoption_files.bring_nvram(existing.XMLDesc(0), domain)
                names = adoption_files.former_names(existing.XMLDesc(0), domain)
                existing.undefineFlags(_UNDEFINE_FLAGS | libvirt.VIR_DOMAIN_UNDEFINE_KEEP_TPM)
                existing = None
            boot_id = received_in_boot or ""
            if existing is not None and received_in_boot is None:
                boot_id = domain_facts.read(existing.XMLDesc(0)).boot_id
            defined = connection.defineXML(self._build(domain, stamp, boot_id=boot_id) if boot_id else document)
            if defined.isActive():
                # Of a running one libvirt tells what it was started with: whether it restarts elsewhere may be otherwise by now.
                facts = replace(domain_facts.read(defined.XMLDesc(0)), restarts_elsewhere=restarts_elsewhere(domain))
                write_stamp(defined, facts, stamp, boot_id=boot_id, is_stored=True)
            if defined.autostart():
                # Only the controller decides where a guest runs, also after this host boots.
                defined.setAutostart(0)
            self._logs.prepare(domain.vm_id, max_bytes=domain.serial_log_max_bytes)
            adoption_files.drop_names(names, domain)
            self.console_sockets.prepare()
            return self._observer.observe(defined)

    def _stamp_adopted(self, domain: Any, stamp: Stamp, received_in_boot: str | None) -> DomainObservation:
        facts = domain_facts.read(domain.XMLDesc(0))
        boot_id = facts.boot_id if received_in_boot is None else received_in_boot
        write_stamp(domain, facts, stamp, boot_id=boot_id)
        return self._observer.observe(domain)

    def drop_former_names(self, domain: DomainSpec) -> None:
        """Remove the names that the files of an adopted domain had before, where its definition here still tells them."""
        with self._connection.use(f"read the definition of {domain.vm_id}") as connection:
            existing = find(connection, domain.vm_id)
            names = adoption_files.former_names(existing.XMLDesc(0), domain) if existing is not None else ()
        adoption_files.drop_names(names, domain)

    def _build(self, domain: DomainSpec, stamp: Stamp, *, boot_id: str) -> str:
        host = self.traits(domain.vm_id, self._accelerator())
        return domain_xml.build(domain, stamp, host, boot_id=boot_id, exports=filling.exports_of(domain))

    def traits(self, vm_id: str, accelerator: str) -> HostTraits:
        """Return what of this host goes into the vm's definition."""
        return HostTraits(
            accelerator=accelerator,
            console_log=self._logs.path_of(vm_id),
            console_socket=self.console_sockets.serial_path(vm_id),
            cpu_shares=self.cpu_shares,
        )

    def undefine(self, vm_id: str, pools: Sequence[PoolSpec], *, kill_if_running: bool, keep_state_files: bool) -> None:
        """See `Hypervisor.undefine_domain`."""
        with self.locks.hold(check_id(vm_id, "vm_id")):
            self.undefine_locked(vm_id, pools, kill_if_running=kill_if_running, keep_state_files=keep_state_files)

    def undefine_locked(self, vm_id: str, pools: Sequence[PoolSpec], *, kill_if_running: bool, keep_state_files: bool) -> None:
        """`undefine` for a caller that holds the vm's lock."""
        with self._connection.use(f"undefine {vm_id}", changes=True) as connection:
            domain = find(connection, vm_id)
            if domain is not None:
                _remove(domain, vm_id, kill_if_running=kill_if_running, keep_state_files=keep_state_files)
                self._observer.forget(domain.UUIDString())
        self._firewall.drop(vm_id)
        overlays.drop_ports(vm_id)
        # After the domain, which must go even where its storage does not answer.
        if not keep_state_files:
            for pool in pools:
                self._remove_state_files(vm_id, pool)
        self._logs.remove(vm_id)
        self.console_sockets.remove(vm_id)

    def _remove_state_files(self, vm_id: str, pool: PoolSpec) -> None:
        try:
            self._guarded.run(pool.pool_id, lambda: state_files.remove(vm_id, pool), timeout_s=STORAGE_TIMEOUT_S)
        except Hung as error:
            raise Unavailable(
                "pool-hung", f"could not remove the files of {vm_id}: pool {pool.pool_id} does not answer"
            ) from error

    def refuse_if_plugged(self, volume_id: str) -> None:
        """Raise Conflict where a domain of ours on this host has the volume as a disk, which is no file."""
        with self._connection.use(f"see who uses volume {volume_id}") as connection:
            for domain in connection.listAllDomains():
                with _gone_is_fine():
                    if f"'ua-{volume_id}'" in domain.XMLDesc(0):
                        message = f"volume {volume_id} is a disk of domain {domain.name()} on this host"
                        raise Conflict("volume-in-use", message, domain=domain.name())

    def refuse_if_used(self, paths: Sequence[str], what: str) -> None:
        """Raise Conflict where a domain of this host, ours or not, has one of these files as a disk."""
        with self._connection.use(f"see who uses {what}") as connection:
            for domain in connection.listAllDomains():
                used = _disk_paths(domain)
                if used & set(paths):
                    raise Conflict(
                        "volume-in-use",
                        f"{what} is a disk of domain {domain.name()} on this host",
                        domain=domain.name(),
                    )


def find(connection: Any, vm_id: str) -> Any:
    """Return the vm's domain, or None. AlreadyExists where its name belongs to a domain that is not ours."""
    try:
        domain = connection.lookupByName(domain_name(vm_id))
        facts = domain_facts.read(domain.XMLDesc(0))
    except libvirt.libvirtError as error:
        if errors.is_gone(error):
            return _find_adopted(connection, vm_id)
        raise
    if facts.vm_id and facts.vm_id != vm_id:
        return _find_adopted(connection, vm_id)
    if not facts.vm_id:
        raise AlreadyExists("domain-exists", f"a domain that is not Trimtab's is called {domain_name(vm_id)}", uuid=facts.uuid)
    return domain


def _find_adopted(connection: Any, vm_id: str) -> Any:
    """Return the domain that is the vm's by its metadata, whatever it is called: one released and adopted again is called after
    the vm it was.
    """
    for domain in connection.listAllDomains():
        with _gone_is_fine():
            if domain_facts.read(domain.XMLDesc(0)).vm_id == vm_id:
                return domain
    return None


def is_adopted(domain: Any) -> bool:
    """Tell whether a domain of ours keeps the definition that it was adopted with."""
    return domain_facts.read(domain.XMLDesc(0)).adopted_disks is not None


def require(connection: Any, vm_id: str) -> Any:
    """Return the vm's domain. NotFound where there is none."""
    domain = find(connection, vm_id)
    if domain is None:
        raise NotFound("domain-not-found", f"this host has no domain of {vm_id}", vm_id=vm_id)
    return domain


def write_stamp(domain: Any, facts: DomainFacts, stamp: Stamp, *, boot_id: str, is_stored: bool = False) -> None:
    """Keep the stamp in the domain's metadata, running and stored (`is_stored`: it is there already, by a definition just made)."""
    flags = libvirt.VIR_DOMAIN_AFFECT_CONFIG if domain.isPersistent() and not is_stored else 0
    flags |= libvirt.VIR_DOMAIN_AFFECT_LIVE if domain.isActive() else 0
    text = stamp_metadata(
        facts.vm_id,
        name=facts.name,
        project=facts.project,
        stamp=stamp,
        boot_id=boot_id,
        restarts_elsewhere=facts.restarts_elsewhere,
        adopted=AdoptedMark(facts.uuid, facts.adopted_disks) if facts.adopted_disks is not None else None,
    )
    domain.setMetadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, text, METADATA_PREFIX, METADATA_NAMESPACE, flags)


def require_volumes(domain: DomainSpec) -> None:
    """Make sure that every disk's volume is there. NotFound names the first that is not."""
    layouts = PoolLayout.of_files(domain.pools)
    for disk in domain.disks:
        if disk.pool_id not in layouts:
            continue  # QEMU says it when it opens what is in the network
        if not volumes.observe(disk.volume_id, layouts[disk.pool_id]).is_present:
            raise NotFound(
                "volume-not-found",
                f"volume {disk.volume_id} is not in pool {disk.pool_id} on this host",
                volume_id=disk.volume_id,
            )


def _remove(domain: Any, vm_id: str, *, kill_if_running: bool, keep_state_files: bool) -> None:
    if domain.isActive():
        if not kill_if_running:
            raise Conflict("domain-running", f"{vm_id} runs on this host; stop it first")
        with _gone_is_fine():
            domain.destroy()
    with _gone_is_fine():
        # A transient one ended with its QEMU.
        if domain.isPersistent():
            tpm = libvirt.VIR_DOMAIN_UNDEFINE_KEEP_TPM if keep_state_files else libvirt.VIR_DOMAIN_UNDEFINE_TPM
            domain.undefineFlags(_UNDEFINE_FLAGS | tpm)


def _disk_paths(domain: Any) -> set[str]:
    paths: set[str] = set()
    with _gone_is_fine():
        paths.update(domain_facts.read(domain.XMLDesc(0)).disk_paths)
        if domain.isActive() and domain.isPersistent():
            paths.update(domain_facts.read(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)).disk_paths)
    return paths


@contextlib.contextmanager
def _gone_is_fine() -> Iterator[None]:
    try:
        yield
    except libvirt.libvirtError as error:
        if not errors.is_gone(error):
            raise
