"""Takes domains of others under control while they run, and gives ours back.

Nothing here talks to a guest or to its QEMU but for metadata, which libvirt keeps: no tick of a guest's clock is lost. What makes a
domain ours is written last, so that a cut anywhere before leaves a plain domain and second names of its files, which the repeat
finds and the reverse removes.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import libvirt

from trimtab_agent.hypervisor.base import Stamp, restarts_elsewhere
from trimtab_agent.hypervisor.kvm import adoption_files, description, domain_facts, errors
from trimtab_agent.hypervisor.kvm.connection import Connection
from trimtab_agent.hypervisor.kvm.domain_facts import DomainFacts
from trimtab_agent.hypervisor.kvm.domain_xml import METADATA_NAMESPACE, METADATA_PREFIX
from trimtab_agent.hypervisor.kvm.domains import Domains, find, require
from trimtab_agent.hypervisor.kvm.guarded import GuardedCalls, Hung
from trimtab_agent.hypervisor.kvm.identifiers import check_id, check_uuid, domain_name
from trimtab_agent.hypervisor.kvm.observe import Observer, absent, migration_operation
from trimtab_agent.hypervisor.kvm.pool_layout import PoolLayout
from trimtab_agent.hypervisor.kvm.stamp_xml import AdoptedMark, stamp_metadata
from trimtab_protos.adoption_messages import AdoptedDisk, Described, DescribedDisk, DomainDescription
from trimtab_protos.errors import AlreadyExists, Conflict, NotFound
from trimtab_protos.messages import DomainObservation, DomainSpec

_LOOK_TIMEOUT_S = 2.0
# Modes of a definition that names a CPU model, or leaves it to QEMU.
_NAMED_CPU = ("custom", "")
_VOLUME_FILE = re.compile(r"/volumes/(vol-[0-9a-z_-]+)(?:\.[0-9a-z_-]+)?\.(?:qcow2|raw)")


class Adoption:
    """Describes, adopts and releases. Thread-safe."""

    def __init__(self, connection: Connection, domains: Domains, observer: Observer, *, boot_id: str) -> None:
        self._connection = connection
        self._domains = domains
        self._observer = observer
        self._boot_id = boot_id
        self._guarded = GuardedCalls()

    def describe(self, name: str, vm_id: str) -> Described:
        """See `Hypervisor.describe_domain`."""
        with self._connection.use(f"describe {name or vm_id}") as connection:
            domain = require(connection, vm_id) if vm_id else _named(connection, name)
            live = self._describe(domain, 0)
            if not (domain.isActive() and domain.isPersistent()):
                return Described(live, live)
            stored = self._describe(domain, libvirt.VIR_DOMAIN_XML_INACTIVE)
            if stored.cpu_mode in _NAMED_CPU:
                # libvirt adds to the live definition what QEMU's model has beyond its own: nobody asked for that.
                live = replace(live, cpu_features=stored.cpu_features)
            return Described(live, stored)

    def _describe(self, domain: Any, flags: int) -> DomainDescription:
        xml = domain.XMLDesc(flags)
        facts = domain_facts.read(xml)
        seen = self._observer.observe(domain)
        described = description.describe(
            xml,
            state=seen.state,
            is_persistent=bool(domain.isPersistent()),
            has_autostart=bool(domain.isPersistent() and domain.autostart()),
            volumes=_volumes(facts),
            obstacles=obstacles(domain),
        )
        adopted = facts.adopted_disks or {}
        disks = [replace(disk, volume_id=adopted.get(disk.target, disk.volume_id)) for disk in described.disks]
        return replace(described, disks=tuple(self._look_at(disk) for disk in disks))

    def _look_at(self, disk: DescribedDisk) -> DescribedDisk:
        if disk.device != "disk" or disk.problem or not disk.path:
            return disk
        try:
            size_bytes, problem = self._guarded.run(
                os.path.dirname(disk.path), lambda: adoption_files.look_at(disk.path, disk.format), timeout_s=_LOOK_TIMEOUT_S
            )
        except Hung:
            size_bytes, problem = 0, "its storage does not answer"
        # A volume of ours may lie over an image or a layer, which is no problem of it.
        return replace(disk, size_bytes=size_bytes, problem="" if disk.volume_id else problem)

    def adopt(self, uuid: str, spec: DomainSpec, disks: Sequence[AdoptedDisk], stamp: Stamp) -> DomainObservation:
        """See `Hypervisor.adopt_domain`."""
        with (
            self._domains.locks.hold(check_id(spec.vm_id, "vm_id")),
            self._connection.use(f"adopt {spec.vm_id}", changes=True) as connection,
        ):
            domain = _with_uuid(connection, check_uuid(uuid))
            facts = domain_facts.read(domain.XMLDesc(0))
            if facts.vm_id not in ("", spec.vm_id):
                raise Conflict("domain-taken", f"domain {facts.libvirt_name} belongs to {facts.vm_id}", vm_id=facts.vm_id)
            if facts.vm_id and facts.adopted_disks is None:
                return self._observer.observe(domain)  # adopted, and stopped and defined as ours since
            found = obstacles(domain)
            if found and not facts.vm_id:
                raise Conflict("domain-not-adoptable", f"domain {facts.libvirt_name} changed since it was looked at: {found[0]}")
            self._link(domain, spec, disks)
            # A host that comes back must start nothing by itself: its vms may run elsewhere by then.
            if domain.autostart():
                domain.setAutostart(0)
            self._mark(domain, spec, disks, stamp)
            return self._observer.observe(domain)

    def _link(self, domain: Any, spec: DomainSpec, disks: Sequence[AdoptedDisk]) -> None:
        there = {(disk.target, disk.path) for disk in self._describe(domain, 0).disks}
        layouts = PoolLayout.of_files(spec.pools)
        volumes = {disk.volume_id: disk for disk in spec.disks}
        for disk in disks:
            if (disk.target, disk.path) not in there:
                raise Conflict("disk-changed", f"disk {disk.target} is not {disk.path} any more; look at the domain again")
            volume = volumes[disk.volume_id]
            layouts[volume.pool_id].create_subdirectories()
            adoption_files.link(disk.path, volume, layouts[volume.pool_id])

    def _mark(self, domain: Any, spec: DomainSpec, disks: Sequence[AdoptedDisk], stamp: Stamp) -> None:
        text = stamp_metadata(
            spec.vm_id,
            name=spec.name,
            project=spec.project,
            stamp=stamp,
            boot_id=self._boot_id if domain.isActive() else "",
            restarts_elsewhere=restarts_elsewhere(spec),
            adopted=AdoptedMark(domain.UUIDString(), {disk.target: disk.volume_id for disk in disks}),
        )
        _write_metadata(domain, text)

    def release(self, spec: DomainSpec, *, has_autostart: bool) -> DomainObservation:
        """See `Hypervisor.release_domain`."""
        with (
            self._domains.locks.hold(check_id(spec.vm_id, "vm_id")),
            self._connection.use(f"release {spec.vm_id}", changes=True) as connection,
        ):
            domain = _ours_or_released(connection, spec)
            if domain is None:
                adoption_files.drop_links(spec, frozenset())
                return absent(spec.vm_id)
            if domain.isPersistent() and bool(domain.autostart()) != has_autostart:
                domain.setAutostart(1 if has_autostart else 0)
            adoption_files.drop_links(spec, _used_paths(domain))
            _write_metadata(domain, None)
            return self._observer.observe(domain)


def _ours_or_released(connection: Any, spec: DomainSpec) -> Any:
    """Return the vm's domain, also where an earlier call took the mark off it; None where it has none."""
    try:
        domain = find(connection, spec.vm_id)
    except AlreadyExists:
        return connection.lookupByName(domain_name(spec.vm_id))
    if domain is not None:
        return domain
    try:
        plain = _with_uuid(connection, check_uuid(spec.uuid))
    except NotFound:
        return None
    # Its files' second names were given for this vm, whoever has the domain by now.
    return plain if not domain_facts.read(plain.XMLDesc(0)).vm_id else None


def _write_metadata(domain: Any, text: str | None) -> None:
    flags = libvirt.VIR_DOMAIN_AFFECT_CONFIG if domain.isPersistent() else 0
    flags |= libvirt.VIR_DOMAIN_AFFECT_LIVE if domain.isActive() else 0
    domain.setMetadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, text, METADATA_PREFIX, METADATA_NAMESPACE, flags)


def _used_paths(domain: Any) -> frozenset[str]:
    paths = set(domain_facts.read(domain.XMLDesc(0)).disk_paths)
    paths.update(domain_facts.read(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)).disk_paths)
    return frozenset(paths)


def _named(connection: Any, name: str) -> Any:
    try:
        return connection.lookupByName(name)
    except libvirt.libvirtError as error:
        if not errors.is_gone(error):
            raise
    return _with_uuid(connection, name)


def _with_uuid(connection: Any, uuid: str) -> Any:
    try:
        return connection.lookupByUUIDString(uuid)
    except libvirt.libvirtError as error:
        if errors.is_gone(error) or error.get_error_code() == libvirt.VIR_ERR_INVALID_ARG:
            raise NotFound("domain-not-found", f"this host has no domain {uuid[:80]}", domain=uuid[:80]) from error
        raise


def _volumes(facts: DomainFacts) -> dict[str, str]:
    if not facts.vm_id:
        return {}
    found = {path: _VOLUME_FILE.search(path) for path in facts.disk_paths}
    return {path: match[1] for path, match in found.items() if match is not None}


def obstacles(domain: Any) -> tuple[str, ...]:
    """Return what of libvirt's state, beside the definition, forbids to adopt the domain."""
    found = []
    if not domain.isPersistent():
        found.append(
            "it is transient: it has no definition that outlives its guest; `virsh dumpxml` and `virsh define` give it one"
        )
    elif domain.hasManagedSaveImage(0):
        found.append("it has a saved memory image; start it, or drop that with `virsh managedsave-remove`")
    snapshots = domain.snapshotNum(0)
    if snapshots:
        found.append(f"it has {snapshots} snapshots; delete them with `virsh snapshot-delete`")
    if domain.isPersistent() and domain.listAllCheckpoints(0):
        found.append("it has checkpoints of another backup program; delete them with `virsh checkpoint-delete`")
    if domain.isActive() and migration_operation(domain) is not None:
        found.append("it is being migrated; wait for the end of that")
    return tuple(found)
