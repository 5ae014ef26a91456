"""volume.resize: a volume grows, under the running guest that has it.

| step   | do                                                          | undo                                                  |
|--------|-------------------------------------------------------------|-------------------------------------------------------|
| own    | (size, quota and space were recorded at acceptance)          | record the former ones                                |
| grow   | grow it where its vm is, else wherever it is reached (pivot) | ask for the former size: grown already, it stays so   |
| finish | tell                                                         | - last                                                |

The subject is the vm that has the volume, so that nothing moves or deletes it meanwhile; a volume apart is its own subject. A forced
stop or a deletion may supersede this: the row then says more than the file has, and the same resize again makes it so.
"""

from dataclasses import dataclass, replace
from typing import Any

from trimtab_controller.core.model import Pool, Volume
from trimtab_controller.operations.saga import Effect, Json, Saga, TookPlace, Transaction, effect, transaction
from trimtab_controller.store import describe, events, fleet, vms, volume_claims
from trimtab_protos.errors import InvalidRequest, Unavailable


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    volume_id: str
    size_bytes: int
    before_bytes: int
    # The vm that has it; '' for none.
    vm_id: str = ""


@dataclass(frozen=True, slots=True)
class _Place:
    volume: Volume
    pool: Pool
    host_id: str
    epoch: int


def _own(_context: Transaction[Params]) -> None:
    """Size, quota and space were taken when the request was accepted."""


def _disown(context: Transaction[Params]) -> None:
    volume = describe.get_volume(context.session, context.params.volume_id)
    if volume.size_bytes == context.params.size_bytes and volume.deleted_at is None:
        volume_claims.set_size(context.session, volume, context.params.before_bytes)


def _place(context: Effect[Params]) -> _Place:
    def read(session: Any) -> _Place:
        volume = describe.get_volume(session, context.params.volume_id)
        pool = describe.get_pool(session, volume.pool_id)
        vm = vms.get(session, context.params.vm_id) if context.params.vm_id else None
        home = vm.host_id if vm is not None else ""
        host_id = home or fleet.host_for_volume(session, pool=pool, volume=volume)
        return _Place(volume, pool, host_id, vm.epoch if vm is not None and home else 0)

    place: _Place = context.read(read)
    if not place.host_id:
        raise Unavailable(
            "volume-unreachable", f"no host that is up reaches volume {place.volume.name} in pool {place.pool.name}"
        )
    return place


def _resize(context: Effect[Params], place: _Place, size_bytes: int) -> Json:
    spec = replace(describe.volume_spec(place.volume, {}), size_bytes=size_bytes)
    key = context.key(subject_id=context.operation.subject_id, epoch=place.epoch)
    seen = context.agents.resize_volume(place.host_id, key, spec, describe.pool_spec(place.pool), context.params.vm_id)
    return {"host_id": place.host_id, "size_bytes": seen.size_bytes}


def _grow(context: Effect[Params]) -> Json:
    return _resize(context, _place(context), context.params.size_bytes)


def _ungrow(context: Effect[Params]) -> TookPlace | None:
    try:
        _resize(context, _place(context), context.params.before_bytes)
    except InvalidRequest as error:
        if error.code != "volume-shrink":
            raise
        return TookPlace({"host_id": "", "size_bytes": context.params.size_bytes})
    return None


def _finish(context: Transaction[Params]) -> None:
    volume = describe.get_volume(context.session, context.params.volume_id)
    events.append(
        context.session,
        kind="volume.resized",
        project_id=volume.project_id,
        subject_id=volume.id,
        operation_id=context.operation.id,
        actor=context.operation.actor,
        message=f"volume {volume.name} has {context.params.size_bytes} bytes",
        now=context.now,
    )


SAGA = Saga(
    name="volume.resize",
    version=1,
    params=Params,
    result=lambda results: {"size_bytes": results["grow"]["size_bytes"]},
    steps=(
        transaction("own", _own, _disown),
        effect("grow", _grow, _ungrow, pivot=True),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
