"""volume.create: a volume that belongs to no vm yet.

| step          | do                                                             | undo                                  |
|---------------|----------------------------------------------------------------|---------------------------------------|
| own           | (row and quota were taken at acceptance)                        | free name, quota and space            |
| place         | choose a host, claim the space, say where the bytes will be     | give the space back                   |
| note_images   | note where a copy of its base image is about to be              | - says where a file may be            |
| bring_images  | copy the base image there                                       | - cache                               |
| record_images | record the replica                                              | - it exists                           |
| make          | create it                                                       | delete it                             |
| finish        | record that it is there                                         | - last                                |
"""

import secrets
from dataclasses import dataclass
from functools import partial

from trimtab_controller.core.model import Volume
from trimtab_controller.operations import layer_steps, vm_steps
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, Wait, effect, transaction
from trimtab_controller.store import describe, image_replicas, reach, volume_claims
from trimtab_controller.store.database import Session
from trimtab_protos.errors import Conflict, NoCapacity


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    volume_id: str
    # Of a volume on a local pool; '' chooses.
    to_host_id: str = ""


def _own(_context: Transaction[Params]) -> None:
    """The row was inserted when the request was accepted, so that the name was taken at once."""


def _disown(context: Transaction[Params]) -> None:
    volume_claims.release(context.session, describe.get_volume(context.session, context.params.volume_id), now=context.now)


def _place(context: Transaction[Params]) -> Json:
    session, params = context.session, context.params
    volume = describe.get_volume(session, params.volume_id)
    pool = describe.get_pool(session, volume.pool_id)
    if pool.is_shared and pool.sharing_proven_at is None:
        raise Conflict("pool-not-proven", f"pool {pool.name} is not proven to be shared; see `trimtab pool get {pool.name}`")
    reaching = reach.ready_hosts(session, pool.id) if pool.is_shared else reach.hosts_by_space(session, pool.id)
    for host in reaching:
        if params.to_host_id in {"", host.id} and volume_claims.take_place(session, volume, pool, host.id):
            # With the ticket the host may read the base image from another; journaled, so that every repeat presents the same one.
            return {"host_id": host.id, "ticket": secrets.token_hex(32)}
    if not reaching:
        raise NoCapacity("no-host-reaches-pool", f"no host that is up reaches pool {pool.name}")
    raise NoCapacity("pool-full", f"pool {pool.name} has no place with {volume.size_bytes} bytes left beside its reserve")


def _unplace(context: Transaction[Params]) -> None:
    volume_claims.leave_place(context.session, context.params.volume_id)


def _missing(session: Session, volume_id: str, host_id: str) -> tuple[image_replicas.Missing, ...]:
    return image_replicas.missing_for(session, [describe.get_volume(session, volume_id)], host_id)


def _note_images(context: Transaction[Params]) -> None:
    host_id = vm_steps.chosen_host(context.results)
    missing = _missing(context.session, context.params.volume_id, host_id)
    image_replicas.begin(context.session, missing, host_id, operation_id=context.operation.id, now=context.now)


def _bring_images(context: Effect[Params]) -> Json | Wait:
    host_id = vm_steps.chosen_host(context.results)
    missing = context.read(partial(_missing, volume_id=context.params.volume_id, host_id=host_id))
    return vm_steps.copy_missing(context, host_id, missing) or {"host_id": host_id}


def _record_images(context: Transaction[Params]) -> None:
    host_id = vm_steps.chosen_host(context.results)
    missing = _missing(context.session, context.params.volume_id, host_id)
    image_replicas.record(context.session, missing, host_id, now=context.now)


def _make(context: Effect[Params]) -> Json | Wait:
    volume = _volume(context)
    images = {}
    if volume.base_image_id:
        image = context.read(partial(describe.get_image, image_id=volume.base_image_id))
        images[image.id] = image
    pool = context.read(partial(describe.get_pool, pool_id=volume.pool_id))
    host_id = vm_steps.chosen_host(context.results)
    key, spec = context.key(subject_id=volume.id), describe.volume_spec(volume, images)
    if spec.copy_image_id:
        waiting = layer_steps.follow(
            context.agents.start_volume_copy(host_id, key, spec, describe.pool_spec(pool)), "a copy of its image"
        )
        if waiting is not None:
            return waiting
    else:
        context.agents.ensure_volume(host_id, key, spec, describe.pool_spec(pool))
    return {"host_id": host_id}


def _unmake(context: Effect[Params]) -> None:
    if "place" not in context.results:
        return
    volume = _volume(context)
    pool = context.read(partial(describe.get_pool, pool_id=volume.pool_id))
    host_id = vm_steps.chosen_host(context.results)
    key = context.key(subject_id=volume.id)
    context.agents.delete_volume(host_id, key, volume.id, volume.format, describe.pool_spec(pool))


def _volume(context: Effect[Params]) -> Volume:
    volume: Volume = context.read(partial(describe.get_volume, volume_id=context.params.volume_id))
    return volume


def _finish(context: Transaction[Params]) -> None:
    volume_claims.mark_present(context.session, [context.params.volume_id])


SAGA = Saga(
    name="volume.create",
    version=1,
    params=Params,
    result=lambda results: {"host_id": results["place"]["host_id"]},
    steps=(
        transaction("own", _own, _disown),
        transaction("place", _place, _unplace),
        transaction("note_images", _note_images, None, because="the row says where a file may be"),
        effect("bring_images", _bring_images, None, because="a replica is a cache entry"),
        transaction("record_images", _record_images, None, because="the replica exists"),
        effect("make", _make, _unmake),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
