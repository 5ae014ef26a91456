"""The files of simulated layers: what lies over what, and what a guest that starts finds. See `simulated_layers` for the verbs."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from trimtab_agent.hypervisor.kvm.identifiers import check_id
from trimtab_agent.hypervisor.simulation import PoolStore, StoredLayer, StoredVolume
from trimtab_protos.errors import Conflict, NoCapacity, NotFound
from trimtab_protos.messages import DiskSpec, DomainSpec, PoolSpec, VolumeObservation, VolumeSource, VolumeSpec

if TYPE_CHECKING:
    from trimtab_agent.hypervisor.simulated import SimulatedHypervisor

LAYER_BYTES = 196_624
"""What an empty qcow2 takes."""
_CONTENT_BYTES = 1 << 20


def make(store: PoolStore, spec: VolumeSpec, pool: PoolSpec) -> VolumeObservation:
    """Make a layer, a linked clone's bottom, or a copy. The caller holds the fleet's lock."""
    below = (spec.base_volume_id, spec.base_layer_id) if spec.base_volume_id else None
    source = below or ((spec.copy_volume_id, spec.copy_layer_id) if spec.copy_volume_id else None)
    if source is not None:
        layer_of(store, *source)
    known = store.volumes.get(spec.volume_id)
    if known is not None and spec.layer_id in known.layers:
        if known.layers[spec.layer_id].below != below:
            raise Conflict("volume-differs", f"pool {pool.pool_id} has another layer {spec.layer_id} of {spec.volume_id}")
        return _seen(spec.volume_id, known)
    if store.capacity_bytes - store.used_bytes < LAYER_BYTES:
        raise NoCapacity("pool-full", f"pool {pool.pool_id} has no room left", pool_id=pool.pool_id)
    if spec.layer_id:
        check_id(spec.layer_id, "layer_id")
        if known is None:
            raise NotFound("volume-not-found", f"pool {pool.pool_id} has no volume {spec.volume_id}")
        known.layers[spec.layer_id] = StoredLayer(below)
        store.allocate(known, LAYER_BYTES)
        return _seen(spec.volume_id, known)
    marks = set(content(store, spec.copy_volume_id, spec.copy_layer_id)) if spec.copy_volume_id else set()
    made = StoredVolume(spec, LAYER_BYTES, layers={"": StoredLayer(below, marks)})
    store.put_volume(made)
    return _seen(spec.volume_id, made)


def _seen(volume_id: str, volume: StoredVolume) -> VolumeObservation:
    return VolumeObservation(
        volume_id=volume_id, is_present=True, size_bytes=volume.spec.size_bytes, allocated_bytes=volume.allocated_bytes
    )


def layer_of(store: PoolStore, volume_id: str, layer_id: str) -> StoredLayer:
    volume = store.volumes.get(volume_id)
    if volume is None or layer_id not in volume.layers:
        raise NotFound("layer-not-found", f"layer {layer_id or 'bottom'} of volume {volume_id} is not in this pool")
    return volume.layers[layer_id]


def content(store: PoolStore, volume_id: str, layer_id: str) -> frozenset[str]:
    """Return every mark that is read from the layer."""
    found: set[str] = set()
    place: tuple[str, str] | None = (volume_id, layer_id)
    while place is not None:
        layer = layer_of(store, *place)
        found |= layer.marks
        place = layer.below
    return frozenset(found)


def content_of(store: PoolStore, source: VolumeSource) -> Iterator[bytes]:
    """Yield bytes that are the same for the same content."""
    marks = sorted(content(store, source.volume_id, source.layer_id))
    yield "\n".join(marks).encode().ljust(_CONTENT_BYTES, b".")


def clones_of(store: PoolStore, volume_id: str) -> list[str]:
    """Return the volumes that are linked clones of this one."""
    return [
        other
        for other, volume in store.volumes.items()
        if other != volume_id and any(layer.below is not None and layer.below[0] == volume_id for layer in volume.layers.values())
    ]


def active_layer(store: PoolStore, disk: DiskSpec) -> str:
    """Return the layer that the disk is on: what a merge that ended has made of it."""
    volume = store.volumes.get(disk.volume_id)
    if disk.is_merging and volume is not None and disk.layer_id not in volume.layers:
        return disk.merge_layer_id
    return disk.layer_id


def disks_of(host: "SimulatedHypervisor", spec: DomainSpec) -> Iterator[tuple[DiskSpec, StoredVolume, str]]:
    """Yield each disk with its volume and the layer that a process of this spec writes to."""
    pools = {pool.pool_id: pool for pool in spec.pools}
    for disk in resolve(host, spec).disks:
        store = host.fleet.store(host.host_id, pools[disk.pool_id])
        volume = store.volumes.get(disk.volume_id)
        if volume is None:
            continue
        layer_id = active_layer(store, disk)
        layer_of(store, disk.volume_id, layer_id)
        yield disk, volume, layer_id


def resolve(host: "SimulatedHypervisor", spec: DomainSpec) -> DomainSpec:
    """Return the spec with the pools and layers that its disks are on now: what a move or merge that ended has made of them."""
    if not any(disk.is_merging or disk.move_pool_id for disk in spec.disks):
        return spec
    pools = {pool.pool_id: pool for pool in spec.pools}
    stores = {pool_id: host.fleet.store(host.host_id, pool) for pool_id, pool in pools.items()}
    moved = (_where_it_is(disk, stores) for disk in spec.disks)
    disks = (
        replace(disk, layer_id=active_layer(stores[disk.pool_id], disk), is_merging=False, merge_layer_id="") for disk in moved
    )
    return replace(spec, disks=tuple(disks))


def _where_it_is(disk: DiskSpec, stores: Mapping[str, PoolStore]) -> DiskSpec:
    here = replace(disk, move_pool_id="", move_format=None)
    if not disk.move_pool_id or disk.volume_id in stores[disk.pool_id].volumes:
        return here
    return replace(here, pool_id=disk.move_pool_id, format=disk.move_format or disk.format, layer_id="")
