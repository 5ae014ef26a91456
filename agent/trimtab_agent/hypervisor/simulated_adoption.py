"""Domains of others on a simulated host, how they become ours and plain again."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from trimtab_agent.hypervisor import simulated_domains
from trimtab_agent.hypervisor.base import Stamp
from trimtab_agent.hypervisor.kvm.identifiers import domain_name
from trimtab_agent.hypervisor.simulated_domains import ACTIVE, SimulatedDomain
from trimtab_agent.hypervisor.simulation import StoredVolume
from trimtab_protos.adoption_messages import AdoptedDisk, Described, DescribedDisk, DescribedNic, DomainDescription
from trimtab_protos.errors import Conflict, NotFound
from trimtab_protos.messages import DomainObservation, DomainSpec, DomainState, NetworkKind, VolumeSpec

if TYPE_CHECKING:
    from trimtab_agent.hypervisor.simulated import SimulatedHypervisor

_ADOPTED_BYTES = 1 << 20


def unmanaged(host: "SimulatedHypervisor") -> tuple[DomainObservation, ...]:
    """Return every domain of the host that is not ours."""
    now_ms = host.fleet.clock.now_ms()
    shown = (replace(domain, vm_id="", observed_at_ms=now_ms) for domain in host.host.unmanaged)
    return (*shown, *(observation(host, each) for each in list(host.foreign.values())))


def observation(host: "SimulatedHypervisor", described: DomainDescription) -> DomainObservation:
    """Return a plain domain as a listing shows it."""
    return DomainObservation(
        vm_id="",
        uuid=described.uuid,
        name=described.name,
        state=described.state,
        vcpus=described.vcpus,
        memory_mib=described.memory_mib,
        disk_bytes=_ADOPTED_BYTES * len(described.disks),
        macs=tuple(nic.mac for nic in described.nics),
        observed_at_ms=host.fleet.clock.now_ms(),
        is_persistent=described.is_persistent,
    )


def describe(host: "SimulatedHypervisor", name: str, vm_id: str) -> Described:
    with host.fleet.lock:
        if vm_id:
            stored = description_of(host.require_domain(vm_id))
            return Described(stored, stored)
        for plain in host.foreign.values():
            if name in (plain.name, plain.uuid):
                return Described(plain, plain)
        for domain in host.domains.values():
            if name in (_name(domain), domain.spec.uuid):
                stored = description_of(domain)
                return Described(stored, stored)
        raise NotFound("domain-not-found", f"this host has no domain {name}", domain=name)


def adopt(
    host: "SimulatedHypervisor", uuid: str, spec: DomainSpec, disks: Sequence[AdoptedDisk], stamp: Stamp
) -> DomainObservation:
    with host.fleet.changed:
        known = host.domains.get(spec.vm_id)
        if known is not None:
            known.stamp = stamp
            return simulated_domains.observation(host, known)
        plain = host.foreign.get(uuid)
        if plain is None:
            raise NotFound("domain-not-found", f"this host has no domain {uuid}", domain=uuid)
        if plain.obstacles:
            raise Conflict("domain-not-adoptable", f"domain {plain.name} changed since it was looked at: {plain.obstacles[0]}")
        there = {(disk.target, disk.path): disk for disk in plain.disks}
        for disk in disks:
            if (disk.target, disk.path) not in there:
                raise Conflict("disk-changed", f"disk {disk.target} is not {disk.path} any more; look at the domain again")
        _give_names(host, spec, {disk.volume_id: there[disk.target, disk.path].size_bytes for disk in disks})
        domain = SimulatedDomain(spec, stamp, state=plain.state, own_name=plain.name, original=plain)
        if domain.state in ACTIVE:
            _continue_process(host, domain, host.released.pop(uuid, None))
        host.domains[spec.vm_id] = domain
        del host.foreign[uuid]
        host.emit("defined", domain)
        return simulated_domains.observation(host, domain)


def _give_names(host: "SimulatedHypervisor", spec: DomainSpec, sizes: dict[str, int]) -> None:
    pools = {pool.pool_id: pool for pool in spec.pools}
    for disk in spec.disks:
        volume = VolumeSpec(volume_id=disk.volume_id, pool_id=disk.pool_id, format=disk.format, size_bytes=sizes[disk.volume_id])
        store = host.open_store(pools[disk.pool_id])
        if disk.volume_id not in store.volumes:
            store.put_volume(StoredVolume(volume, _ADOPTED_BYTES))


def _continue_process(host: "SimulatedHypervisor", domain: SimulatedDomain, former: SimulatedDomain | None) -> None:
    """Count a process that runs already as the vm's."""
    for volume in simulated_domains.writable_volumes(host, domain.spec):
        volume.writer = (host.host_id, domain.spec.vm_id)
    domain.open_layers = {disk.volume_id: "" for disk in domain.spec.disks}
    domain.starts, domain.started_at_s = 1, host.fleet.clock.boottime_s()
    if former is not None:
        domain.starts, domain.cpu_time_s = former.starts, former.cpu_time_s
    host.fleet.note_start(domain.spec.vm_id, host.host_id, domain.stamp.epoch)


def release(host: "SimulatedHypervisor", spec: DomainSpec, *, has_autostart: bool) -> DomainObservation:
    with host.fleet.changed:
        domain = host.domains.pop(spec.vm_id, None)
        if domain is None:
            plain = host.foreign.get(spec.uuid)
            return observation(host, plain) if plain is not None else DomainObservation(vm_id=spec.vm_id)
        state = domain.state
        simulated_domains.end_process(host, domain)
        pools = {pool.pool_id: pool for pool in domain.spec.pools}
        host.state_store(domain.spec).state_files.discard(spec.vm_id)  # the plain domain's from now on
        for disk in domain.spec.disks:
            host.fleet.store(host.host_id, pools[disk.pool_id]).volumes.pop(disk.volume_id, None)
        plain = domain.original if domain.original is not None and domain.own_name else description_of(domain)
        disks = tuple(replace(disk, volume_id="") for disk in plain.disks)
        plain = replace(plain, vm_id="", state=state, has_autostart=has_autostart, disks=disks)
        host.foreign[plain.uuid] = plain
        host.released[plain.uuid] = domain
        return observation(host, plain)


def description_of(domain: SimulatedDomain) -> DomainDescription:
    spec = domain.spec
    networks = {network.network_id: network for network in spec.networks}
    pools = {pool.pool_id: pool for pool in spec.pools}
    disks = [
        DescribedDisk(
            target=f"vd{chr(ord('a') + disk.index)}",
            path=f"{pools[disk.pool_id].path}/volumes/{disk.volume_id}.{disk.format.value}",
            format=disk.format.value,
            bus=disk.bus.value,
            is_read_only=disk.is_read_only,
            size_bytes=_ADOPTED_BYTES,
            boot_order=disk.boot_order,
            volume_id=disk.volume_id,
            iops_limit=disk.iops_limit,
            bandwidth_limit_bytes_s=disk.bandwidth_limit_bytes_s,
        )
        for disk in spec.disks
    ]
    nics = []
    for nic in spec.nics:
        network = networks[nic.network_id]
        is_bridge = network.kind is NetworkKind.BRIDGE
        nics.append(
            DescribedNic(
                mac=nic.mac,
                model=nic.model,
                bridge=network.bridge if is_bridge else "",
                network="" if is_bridge else domain_name(network.network_id),
                kind="bridge" if is_bridge else "network",
            )
        )
    return DomainDescription(
        uuid=spec.uuid,
        name=_name(domain),
        vm_id=spec.vm_id,
        state=domain.state if domain.state is not DomainState.ABSENT else DomainState.STOPPED,
        machine=spec.machine,
        cpu_mode="custom",
        cpu_model=spec.cpu_model,
        cpu_features=spec.cpu_features,
        vcpus=spec.vcpus,
        vcpus_max=spec.vcpus_max,
        memory_mib=spec.memory_mib,
        memory_max_mib=spec.memory_max_mib,
        firmware=spec.firmware,
        has_secure_boot=spec.has_secure_boot,
        has_tpm=spec.has_tpm,
        disks=tuple(disks),
        nics=tuple(nics),
        original_xml=f"<domain><name>{_name(domain)}</name></domain>",
    )


def _name(domain: SimulatedDomain) -> str:
    return domain.own_name or domain_name(domain.spec.vm_id)
