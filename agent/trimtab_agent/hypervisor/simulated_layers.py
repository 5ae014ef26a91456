"""Layers of simulated volumes: the same promises as files that lie over each other, with sets of marks for content."""

from typing import TYPE_CHECKING

from trimtab_agent.hypervisor import simulated_domains
from trimtab_agent.hypervisor.base import JobControl, Stamp
from trimtab_agent.hypervisor.simulated_domains import ACTIVE, SimulatedDomain
from trimtab_agent.hypervisor.simulated_layer_files import LAYER_BYTES, active_layer, content, disks_of, layer_of, resolve
from trimtab_agent.hypervisor.simulation import FaultKind, PoolStore, StoredLayer, StoredVolume
from trimtab_protos.errors import Conflict, InvalidRequest, NoCapacity, NotFound, Unavailable
from trimtab_protos.messages import (
    DomainSpec,
    DomainState,
    JobProgress,
    LayerMerge,
    LayerResult,
    PoolKind,
    PoolSpec,
    StateReason,
)

if TYPE_CHECKING:
    from trimtab_agent.hypervisor.simulated import SimulatedHypervisor

MEMORY_BYTES = 1 << 20


def delete(host: "SimulatedHypervisor", volume_id: str, layer_id: str, pool: PoolSpec) -> None:
    if not layer_id:
        raise InvalidRequest("layer-missing", "the bottom layer of a volume goes with the volume", field="layer_id")
    store = host.open_store(pool)
    with host.fleet.lock:
        volume = store.volumes.get(volume_id)
        if volume is None or layer_id not in volume.layers:
            return
        is_below = any((volume_id, layer_id) == each.below for other in store.volumes.values() for each in other.layers.values())
        is_open = any(
            domain.open_layers.get(volume_id) == layer_id and domain.state in ACTIVE for domain in host.domains.values()
        )
        is_defined = any(
            disk.volume_id == volume_id and active_layer(store, disk) == layer_id
            for domain in host.domains.values()
            for disk in domain.spec.disks
        )
        if is_below or is_open or is_defined:
            raise Conflict("layer-in-use", f"layer {layer_id} of volume {volume_id} is in use")
        del volume.layers[layer_id]
        store.allocate(volume, -LAYER_BYTES)


# --- a guest's ---------------------------------------------------------------------------------------------------------------


def write(host: "SimulatedHypervisor", vm_id: str, mark: str) -> None:
    """For tests: the guest writes onto every disk."""
    with host.fleet.lock:
        domain = host.require_domain(vm_id)
        assert domain.state in ACTIVE, "only a guest that runs writes"
        for disk, volume, _layer_id in disks_of(host, domain.spec):
            volume.layers[domain.open_layers[disk.volume_id]].marks.add(mark)


def read(host: "SimulatedHypervisor", spec: DomainSpec) -> frozenset[str]:
    """For tests: what a guest that starts from this spec finds on its disks."""
    with host.fleet.lock:
        found: set[str] = set()
        pools = {pool.pool_id: pool for pool in spec.pools}
        for disk, _volume, layer_id in disks_of(host, spec):
            found |= content(host.fleet.store(host.host_id, pools[disk.pool_id]), disk.volume_id, layer_id)
        return frozenset(found)


def switch(host: "SimulatedHypervisor", spec: DomainSpec, stamp: Stamp, *, wants_freeze: bool) -> LayerResult:
    with host.fleet.changed:
        host.check_definition(spec)
        _make_layers_of_images(host, spec)
        domain = host.domains.get(spec.vm_id)
        if domain is None:
            domain = host.domains[spec.vm_id] = SimulatedDomain(spec, stamp)
        is_frozen = _switch_live(host, domain, spec) and wants_freeze
        domain.spec, domain.stamp, domain.is_persistent = resolve(host, spec), stamp, True
        host.emit("defined", domain)
        return LayerResult(consistency="filesystem" if is_frozen else "crash")


def _make_layers_of_images(host: "SimulatedHypervisor", spec: DomainSpec) -> None:
    """Make the layers of disks that are images of Ceph, which have none until their guest is switched."""
    pools = {pool.pool_id: pool for pool in spec.pools if pool.kind is PoolKind.RBD}
    for disk in spec.disks:
        if disk.pool_id not in pools:
            continue
        volume = host.fleet.store(host.host_id, pools[disk.pool_id]).volumes[disk.volume_id]
        if disk.layer_id not in volume.layers:
            volume.layers[disk.layer_id] = StoredLayer((disk.volume_id, disk.merge_layer_id))


def _switch_live(host: "SimulatedHypervisor", domain: SimulatedDomain, spec: DomainSpec) -> bool:
    if domain.state not in ACTIVE:
        return False
    new = {}
    for disk, volume, layer_id in disks_of(host, spec):
        present = domain.open_layers.get(disk.volume_id, layer_id)
        if layer_id != present:
            if volume.layers[layer_id].below != (disk.volume_id, present):
                raise Conflict("layer-unexpected", f"the guest is on another layer of volume {disk.volume_id} than was thought")
            new[disk.volume_id] = layer_id
    domain.open_layers.update(new)
    return domain.state is DomainState.RUNNING


def snapshot_memory(
    host: "SimulatedHypervisor", spec: DomainSpec, stamp: Stamp, snapshot_id: str, control: JobControl
) -> LayerResult:
    control.report(JobProgress(phase="saving memory"))
    with host.fleet.changed:
        domain = host.require_domain(spec.vm_id)
        if domain.state not in ACTIVE:
            raise Conflict("wrong-domain-state", f"{spec.vm_id} does not run and has no memory to save")
        store = host.state_store(spec)
        if (spec.vm_id, snapshot_id) not in store.memories:
            if store.capacity_bytes - store.used_bytes < MEMORY_BYTES:
                raise NoCapacity("pool-full", "the pool has no room left for the memory")
            _switch_live(host, domain, spec)
            store.memories[(spec.vm_id, snapshot_id)] = domain.spec
        domain.spec, domain.stamp = resolve(host, spec), stamp
        return LayerResult(consistency="memory", size_bytes=MEMORY_BYTES)


def restore_memory(
    host: "SimulatedHypervisor", spec: DomainSpec, stamp: Stamp, snapshot_id: str, control: JobControl
) -> LayerResult:
    control.report(JobProgress(phase="restoring memory"))
    with host.fleet.changed:
        domain = host.require_domain(spec.vm_id)
        if domain.state in ACTIVE:
            return LayerResult(consistency="memory")
        if (spec.vm_id, snapshot_id) not in host.state_store(spec).memories:
            raise NotFound("memory-not-found", f"the memory of snapshot {snapshot_id} is not on this host")
        domain.spec, domain.stamp = resolve(host, spec), stamp
        simulated_domains.start_process(host, domain)
        domain.write_console("RESTORED\n")
        domain.state, domain.reason = DomainState.RUNNING, StateReason.NONE
        host.emit("started", domain)
        return LayerResult(consistency="memory")


def merge(
    host: "SimulatedHypervisor",
    asked: LayerMerge,
    pool: PoolSpec,
    spec: DomainSpec | None,
    stamp: Stamp,
    control: JobControl,
) -> LayerResult:
    store = host.open_store(pool)
    control.report(JobProgress(phase="merging"))
    with host.fleet.changed:
        volume = store.volumes.get(asked.volume_id)
        if volume is None:
            raise NotFound("volume-not-found", f"pool {pool.pool_id} has no volume {asked.volume_id}")
        domain = host.domains.get(asked.vm_id)
        is_here = domain is not None and domain.state in ACTIVE
        if volume.writer is not None and not (is_here and volume.writer == (host.host_id, asked.vm_id)):
            raise Conflict("image-locked", f"volume {asked.volume_id} is in use by another QEMU")
        top = volume.layers.get(asked.top_layer_id)
        if top is not None:
            _meet_full(host, store)
            _merge(store, volume, asked, top)
        if domain is not None and domain.open_layers.get(asked.volume_id) == asked.top_layer_id:
            domain.open_layers[asked.volume_id] = asked.base_layer_id
        if domain is not None and spec is not None:
            domain.spec, domain.stamp = resolve(host, spec), stamp
        host.fleet.changed.notify_all()
        return LayerResult()


def _merge(store: PoolStore, volume: StoredVolume, asked: LayerMerge, top: StoredLayer) -> None:
    base = layer_of(store, asked.volume_id, asked.base_layer_id)
    place = (asked.volume_id, asked.top_layer_id)
    over = {
        (other_id, layer_id)
        for other_id, other in store.volumes.items()
        for layer_id, layer in other.layers.items()
        if layer.below == place
    }
    told = {(child.volume_id, child.layer_id) for child in asked.children}
    siblings = sum(
        (asked.volume_id, asked.base_layer_id) == layer.below for o in store.volumes.values() for layer in o.layers.values()
    )
    if not over <= told or siblings != 1:
        raise Conflict("layer-in-use", f"other layers than was thought lie over {asked.top_layer_id} or {asked.base_layer_id}")
    base.marks |= top.marks
    for volume_id, layer_id in over:
        store.volumes[volume_id].layers[layer_id].below = (asked.volume_id, asked.base_layer_id)
    del volume.layers[asked.top_layer_id]
    store.allocate(volume, -LAYER_BYTES)


def _meet_full(host: "SimulatedHypervisor", store: PoolStore) -> None:
    """A planned fault `merge.full`: the file system has no room for what is merged."""
    fault = host.fleet.take_fault(host.host_id, "merge.full")
    if fault is not None and fault.kind is FaultKind.FAIL_BEFORE:
        raise Unavailable("pool-full", "the merge ran out of space; it goes on when there is room", used_bytes=store.used_bytes)


def delete_memory(host: "SimulatedHypervisor", vm_id: str, snapshot_id: str, pool: PoolSpec) -> None:
    store = host.open_store(pool)
    with host.fleet.lock:
        store.memories.pop((vm_id, snapshot_id), None)
