"""How a simulated guest takes changes while it runs: at once, or not at all where it is one of the fleet's `stubborn_vms`."""

from dataclasses import replace
from typing import TYPE_CHECKING

from trimtab_agent.hypervisor import simulated_domains, simulated_layer_files, simulated_storage
from trimtab_agent.hypervisor.base import Applied, Stamp
from trimtab_agent.hypervisor.simulated_domains import ACTIVE, SimulatedDomain
from trimtab_protos.errors import Conflict, InvalidRequest, NoCapacity, NotFound
from trimtab_protos.messages import ChangedPart, ChangeLeft, DomainSpec, PoolSpec, VolumeObservation, VolumeSpec

if TYPE_CHECKING:
    from trimtab_agent.hypervisor.simulated import SimulatedHypervisor


def apply(host: "SimulatedHypervisor", spec: DomainSpec, stamp: Stamp) -> Applied:
    with host.fleet.changed:
        host.check_definition(spec)
        spec = simulated_layer_files.resolve(host, spec)
        domain = host.domains.get(spec.vm_id)
        if domain is None:
            domain = host.domains[spec.vm_id] = SimulatedDomain(spec, stamp)
        if domain.own_name and domain.state in ACTIVE:
            raise Conflict("adopted-definition", "it keeps the definition it was adopted with; stop and start it first")
        domain.stamp, domain.is_persistent = stamp, True
        taken, left = (spec, ()) if domain.state not in ACTIVE else _ask_guest(host, domain, spec)
        if domain.state in ACTIVE:
            _change_process(host, domain, taken)
        domain.spec, domain.asked_for = taken, spec
        host.emit("defined", domain)
        return Applied(simulated_domains.observation(host, domain), left)


def _ask_guest(
    host: "SimulatedHypervisor", domain: SimulatedDomain, spec: DomainSpec
) -> tuple[DomainSpec, tuple[ChangeLeft, ...]]:
    """Return what the guest makes of the spec: a stubborn one gives nothing back."""
    has = domain.spec
    if spec.vm_id not in host.fleet.stubborn_vms:
        return spec, ()
    left = []
    vcpus, memory_mib = max(spec.vcpus, has.vcpus), max(spec.memory_mib, has.memory_mib)
    if vcpus != spec.vcpus:
        left.append(ChangeLeft(part=ChangedPart.VCPUS, reason=f"the guest keeps {vcpus} vcpus"))
    if memory_mib != spec.memory_mib:
        left.append(ChangeLeft(part=ChangedPart.MEMORY, reason=f"the guest keeps {memory_mib} MiB"))
    disks = [disk for disk in has.disks if disk.volume_id not in {each.volume_id for each in spec.disks}]
    nics = [nic for nic in has.nics if nic.nic_id not in {each.nic_id for each in spec.nics}]
    left += [ChangeLeft(part=ChangedPart.DISK, device_id=disk.volume_id, reason="the guest keeps it") for disk in disks]
    left += [ChangeLeft(part=ChangedPart.NIC, device_id=nic.nic_id, reason="the guest keeps it") for nic in nics]
    kept_pools = tuple(pool for pool in has.pools if pool.pool_id not in {each.pool_id for each in spec.pools})
    kept_networks = tuple(net for net in has.networks if net.network_id not in {each.network_id for each in spec.networks})
    taken = replace(
        spec,
        vcpus=vcpus,
        vcpus_max=max(vcpus, spec.vcpus_max),
        memory_mib=memory_mib,
        memory_max_mib=max(memory_mib, spec.memory_max_mib),
        disks=(*spec.disks, *disks),
        nics=(*spec.nics, *nics),
        pools=(*spec.pools, *kept_pools),
        networks=(*spec.networks, *kept_networks),
    )
    return taken, tuple(left)


def _change_process(host: "SimulatedHypervisor", domain: SimulatedDomain, spec: DomainSpec) -> None:
    """Give the running process the spec's memory and disks."""
    others_mib = sum(each.spec.memory_mib for each in host.domains.values() if each.state in ACTIVE and each is not domain)
    if others_mib + spec.memory_mib > host.host.memory_mib:
        raise NoCapacity("host-out-of-memory", "the host has no memory left for this vm")
    known = {disk.volume_id for disk in domain.spec.disks}
    simulated_storage.require_disk_keys(host, [disk for disk in spec.disks if disk.volume_id not in known])
    writer = (host.host_id, spec.vm_id)
    wanted = simulated_domains.writable_volumes(host, spec)
    for volume in wanted:
        if volume.writer not in {None, writer}:
            raise Conflict("image-locked", f"volume {volume.spec.volume_id} is in use by another QEMU")
    for volume in simulated_domains.writable_volumes(host, domain.spec):
        if volume not in wanted and volume.writer == writer:
            volume.writer = None
    for volume in wanted:
        volume.writer = writer


def grow_volume(host: "SimulatedHypervisor", volume: VolumeSpec, pool: PoolSpec, vm_id: str) -> VolumeObservation:
    store = host.open_store(pool)
    with host.fleet.lock:
        known = store.volumes.get(volume.volume_id)
        if known is None:
            raise NotFound("volume-not-found", f"pool {pool.pool_id} has no volume {volume.volume_id}")
        if known.writer not in {None, (host.host_id, vm_id)}:
            raise Conflict("image-locked", f"volume {volume.volume_id} is in use by another QEMU")
        if volume.size_bytes % simulated_storage.SECTOR:
            raise InvalidRequest("volume-size", f"size_bytes {volume.size_bytes} must be a multiple of 512", field="size_bytes")
        if volume.size_bytes < known.spec.size_bytes:
            raise InvalidRequest(
                "volume-shrink",
                f"volume {volume.volume_id} has {known.spec.size_bytes} bytes; it can grow, not shrink",
                field="size_bytes",
            )
        store.put_volume(replace(known, spec=replace(known.spec, size_bytes=volume.size_bytes)))
        return simulated_storage.observe_volume(volume.volume_id, store)
