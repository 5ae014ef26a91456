"""From rows to the `PoolContents` that a pool is drained on."""

from trimtab_controller.core.model import Pool, Volume
from trimtab_controller.core.planning.pool_drain import PoolContents, PoolRoom, PoolVolume
from trimtab_controller.operations.move_accept import refuse_volume
from trimtab_controller.store import pools, reach, vms, volume_claims, volumes
from trimtab_controller.store.database import Session
from trimtab_protos.errors import Conflict, InvalidRequest


def read_contents(session: Session, pool_id: str) -> PoolContents:
    """Return what lies in the pool and where it could go, as of one snapshot."""
    rooms = {pool.id: _room(session, pool) for pool in pools.live(session)}
    found = volumes.in_pool(session, pool_id)
    return PoolContents(
        pool=rooms[pool_id],
        volumes=tuple(_volume(session, one, rooms[pool_id]) for one in found),
        others=tuple(room for room in rooms.values() if room.pool_id != pool_id),
        image_names=pools.dependants(session, pool_id, limit=100).get("image", ()),
    )


def _room(session: Session, pool: Pool) -> PoolRoom:
    free = {}
    for space in pools.spaces_of(session, [pool.id])[pool.id]:
        limit_bytes = volume_claims.limit_bytes_at(session, pool, space.host_id)
        free[space.host_id] = max(0, (limit_bytes or 0) - space.claimed_bytes)
    return PoolRoom(
        pool_id=pool.id,
        name=pool.name,
        is_shared=pool.is_shared,
        is_proven=not pool.is_shared or pool.sharing_proven_at is not None,
        hosts=frozenset(host.id for host in reach.ready_hosts(session, pool.id)),
        free_bytes=free,
    )


def _volume(session: Session, volume: Volume, own: PoolRoom) -> PoolVolume:
    vm = vms.get(session, volume.vm_id) if volume.vm_id is not None else None
    homes = (vm.host_id,) if vm is not None and vm.host_id else tuple(sorted(own.hosts))
    refusal = ""
    try:
        refuse_volume(session, volume)
    except (Conflict, InvalidRequest) as refused:
        refusal = refused.message
    return PoolVolume(
        volume_id=volume.id,
        name=volume.name,
        size_bytes=volume.size_bytes,
        version=volume.version,
        host_ids=tuple(host_id for host_id in homes if volume.host_id in {"", host_id}),
        vm_id=volume.vm_id or "",
        vm_name=vm.name if vm is not None else "",
        refusal=refusal,
    )
