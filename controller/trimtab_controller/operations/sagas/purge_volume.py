"""volume.purge: after the 24 h of grace a deleted volume's bytes, space and quota go; the row stays as a tombstone.

| step   | do                                                   | undo                          |
|--------|------------------------------------------------------|-------------------------------|
| own    | refuse if it was brought back meanwhile (pivot)       | - from here on only forward   |
| wipe   | delete its bytes                                      | - deleted bytes are gone      |
| erase  | free space and quota                                  | - last                        |
"""

from dataclasses import dataclass
from functools import partial

from trimtab_controller.core.model import Volume
from trimtab_controller.operations import move_steps
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, effect, transaction
from trimtab_controller.store import describe, fleet, hosts, volume_claims
from trimtab_protos.errors import Conflict, Unavailable


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    volume_id: str


def _own(context: Transaction[Params]) -> None:
    volume = describe.get_volume(context.session, context.params.volume_id)
    if volume.deleted_at is None:
        raise Conflict("volume-not-deleted", f"volume {volume.name} was brought back; nothing is purged")


def _wipe(context: Effect[Params]) -> Json:
    volume: Volume = context.read(partial(describe.get_volume, volume_id=context.params.volume_id))
    pool = context.read(partial(describe.get_pool, pool_id=volume.pool_id))
    if not pool.is_shared and not volume.host_id:
        return {"host_id": ""}  # its making never came that far
    if not pool.is_shared and not context.read(partial(hosts.is_live, host_id=volume.host_id)):
        return {"host_id": ""}  # its host left the fleet, and the bytes with it
    host_id = context.read(partial(fleet.host_for_volume, pool=pool, volume=volume))
    if not host_id:
        raise Unavailable("volume-unreachable", f"no host that is up reaches volume {volume.name} in pool {pool.name}")
    move_steps.wipe_other_place(context, volume)
    key = context.key(subject_id=volume.id)
    context.agents.delete_volume(host_id, key, volume.id, volume.format, describe.pool_spec(pool))
    return {"host_id": host_id}


def _erase(context: Transaction[Params]) -> None:
    volume = describe.get_volume(context.session, context.params.volume_id)
    if volume.purge_after is not None:  # else its host left the fleet meanwhile, and what it held was freed then
        volume_claims.free(context.session, volume, now=context.now)


SAGA = Saga(
    name="volume.purge",
    version=1,
    params=Params,
    steps=(
        transaction("own", _own, None, because="it only looks", pivot=True),
        effect("wipe", _wipe, None, because="deleted bytes are gone"),
        transaction("erase", _erase, None, because="nothing follows it"),
    ),
)
