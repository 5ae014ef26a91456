"""Pools and volumes of a simulated host."""

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from trimtab_agent.hypervisor import simulated_layer_files
from trimtab_agent.hypervisor.kvm import block_pools
from trimtab_agent.hypervisor.kvm.identifiers import check_id
from trimtab_agent.hypervisor.simulation import PoolStore, StoredImage, StoredVolume
from trimtab_protos.errors import Conflict, InvalidRequest, NoCapacity, NotFound, Unavailable
from trimtab_protos.messages import DiskSpec, PoolObservation, PoolSpec, VolumeObservation, VolumeSpec

if TYPE_CHECKING:
    from trimtab_agent.hypervisor.simulated import SimulatedHypervisor

NEW_VOLUME_BYTES = 196_624
"""What an empty qcow2 takes."""
SECTOR = 512
"""After this long a pool counts as hung."""


def make_volume(host: "SimulatedHypervisor", volume: VolumeSpec, pool: PoolSpec) -> VolumeObservation:
    check_id(volume.volume_id, "volume_id")
    store = host.open_store(pool)
    if volume.is_encrypted:
        with host.fleet.lock:
            require_keys(host, (volume.volume_id,))
    if volume.layer_id or volume.base_volume_id or volume.copy_volume_id:
        with host.fleet.lock:
            return simulated_layer_files.make(store, volume, pool)
    with host.fleet.lock:
        source_id = volume.base_image_id or volume.copy_image_id
        source = store.images.get(source_id)
        if source_id and source is None:
            raise NotFound("image-not-found", f"pool {pool.pool_id} has no image {source_id}", image_id=source_id)
        wanted = replace(volume, size_bytes=_size_over(source, volume.size_bytes))
        known = store.volumes.get(volume.volume_id)
        if known is not None:
            if _shape(known.spec) != _shape(wanted):
                raise Conflict("volume-differs", f"pool {pool.pool_id} has another volume {volume.volume_id}")
            return observe_volume(volume.volume_id, store)
        needed = source.result.file_size_bytes if source is not None and volume.copy_image_id else NEW_VOLUME_BYTES
        if store.capacity_bytes - store.used_bytes < needed:
            raise NoCapacity("pool-full", f"pool {pool.pool_id} has no room left", pool_id=pool.pool_id)
        store.put_volume(StoredVolume(wanted, needed))
        return observe_volume(volume.volume_id, store)


def require_keys(host: "SimulatedHypervisor", volume_ids: Iterable[str]) -> None:
    """Raise as a real host where the key of one is not here."""
    for volume_id in volume_ids:
        if volume_id not in host.volume_keys:
            raise Unavailable("volume-key-missing", f"the key of volume {volume_id} is not on this host; it is given again")


def require_pool_secrets(host: "SimulatedHypervisor", pools: Iterable[PoolSpec]) -> None:
    require_keys(host, [pool.pool_id for pool in pools if block_pools.is_block(pool) and block_pools.needs_secret(pool)])


def require_disk_keys(host: "SimulatedHypervisor", disks: Iterable[DiskSpec]) -> None:
    require_keys(host, [disk.volume_id for disk in disks if disk.is_encrypted])


def _size_over(source: StoredImage | None, size_bytes: int) -> int:
    """Return the volume's size: at least its image's, which is what 0 asks for."""
    image_bytes = source.result.virtual_size_bytes if source else 0
    if size_bytes % SECTOR or (size_bytes == 0 and source is None):
        raise InvalidRequest("volume-size", f"size_bytes {size_bytes} must be a multiple of {SECTOR}", field="size_bytes")
    if 0 < size_bytes < image_bytes:
        raise InvalidRequest(
            "volume-smaller-than-image", f"size_bytes {size_bytes} is less than the image's {image_bytes}", field="size_bytes"
        )
    return size_bytes or image_bytes


def _shape(volume: VolumeSpec) -> tuple[object, ...]:
    return volume.format, volume.size_bytes, volume.base_image_id, volume.is_encrypted


def drop_volume(host: "SimulatedHypervisor", volume_id: str, pool: PoolSpec) -> None:
    store = host.open_store(pool)
    with host.fleet.lock:
        users = [d.spec.vm_id for d in host.domains.values() if any(k.volume_id == volume_id for k in d.spec.disks)]
        if users:
            raise Conflict("volume-in-use", f"vm {users[0]} on this host uses volume {volume_id}", vm_id=users[0])
        clones = simulated_layer_files.clones_of(store, volume_id)
        if clones:
            raise Conflict("volume-in-use", f"volume {clones[0]} is a linked clone of volume {volume_id}", volume_id=clones[0])
        store.drop_volume(volume_id)


def observe_pool(host: "SimulatedHypervisor", pool: PoolSpec) -> PoolObservation:
    store = host.fleet.store(host.host_id, pool)
    with host.fleet.changed:
        is_responsive = host.fleet.changed.wait_for(lambda: not store.hangs_on(host.host_id), host.fleet.observe_hang_s)
        return PoolObservation(
            pool_id=pool.pool_id,
            capacity_bytes=store.capacity_bytes,
            available_bytes=max(0, store.capacity_bytes - store.used_bytes),
            promised_bytes=store.promised_bytes,
            written_bytes=store.written_bytes,
            is_responsive=is_responsive,
            is_hung=not is_responsive,
            problem="" if is_responsive else "the pool does not answer",
            observed_at_ms=host.fleet.clock.now_ms(),
        )


def observe_volume(volume_id: str, store: PoolStore) -> VolumeObservation:
    known = store.volumes.get(volume_id)
    if known is None:
        return VolumeObservation(volume_id=volume_id, is_present=False)
    return VolumeObservation(
        volume_id=volume_id, is_present=True, size_bytes=known.spec.size_bytes, allocated_bytes=known.allocated_bytes
    )
