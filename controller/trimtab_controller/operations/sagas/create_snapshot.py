"""snapshot.create: the vm's disks as they are at one instant are kept, and its memory where that is wished.

| step        | do                                                                       | undo                                |
|-------------|--------------------------------------------------------------------------|-------------------------------------|
| own         | (snapshot and layers were inserted at acceptance)                         | forget them                         |
| make_layers | an empty file over each disk                                              | delete it                           |
| switch      | SQL: the vm is on these layers                                             | on the former ones again            |
| freeze      | a running guest goes over to them at one instant, frozen or with its memory | merge them back, remove the memory |
| finish      | record how consistent it is                                               | - last                              |

A crash between any two of these leaves a vm that starts with its disks as they were: see `operations/layer_steps.py`. What a forced
stop, a deletion or a recovery cuts short stays as an unfinished snapshot, which the leader's upkeep deletes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from trimtab_controller.core.lifecycle import ObservedState
from trimtab_controller.operations import layer_steps
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, Wait, effect, transaction
from trimtab_controller.store import describe, events, operations, snapshots, vms
from trimtab_protos.errors import NotFound
from trimtab_protos.messages import Direction, JobState, LayerResult

OFF = frozenset({ObservedState.STOPPED, ObservedState.ABSENT, ObservedState.CRASHED})


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    vm_id: str
    snapshot_id: str
    # Volume id → the layer that its guest writes to from now on.
    layers: Mapping[str, str]
    has_memory: bool = False
    # An operation that waits for this one; woken at its end.
    wakes: str = ""


def _own(_context: Transaction[Params]) -> None:
    """The rows were inserted when the request was accepted."""


def _disown(context: Transaction[Params]) -> None:
    snapshot = snapshots.get(context.session, context.params.snapshot_id)
    snapshots.forget(context.session, snapshot, now=context.now)
    snapshots.delete_layers(context.session, context.params.layers.values())
    _wake(context)


def _make_layers(context: Effect[Params]) -> Json:
    snapshot = context.read(lambda session: snapshots.get(session, context.params.snapshot_id))
    return layer_steps.make_layers(context, {str(one["volume_id"]): str(one["layer_id"]) for one in snapshot.volumes})


def _switch(context: Transaction[Params]) -> Json:
    before = {}
    for volume in describe.volumes_of(context.session, context.params.vm_id):
        if volume.id in context.params.layers:
            before[volume.id] = volume.layer_id
            new = context.params.layers[volume.id]
            # Should this be undone, it is merged back: until that is recorded, whichever file is there counts.
            snapshots.set_active(context.session, volume.id, new, merges_into=volume.layer_id)
    return {"before": before}


def _unswitch(context: Transaction[Params]) -> None:
    for volume_id, layer_id in context.results.get("switch", {}).get("before", {}).items():
        snapshots.set_active(context.session, volume_id, layer_id)


def _freeze(context: Effect[Params]) -> Json | Wait:
    place = layer_steps.place_of(context)
    if place.domain is None:
        before = context.results["switch"]["before"]
        return layer_steps.lay_images(context, before) or _outcome(place, LayerResult())
    key = layer_steps.job_key(context, place)
    if not context.params.has_memory:
        return _outcome(place, context.agents.switch_layers(place.host_id, key, place.domain, wants_freeze=True))
    job = context.agents.start_memory_snapshot(place.host_id, key, place.domain, context.params.snapshot_id)
    return layer_steps.follow(job, "the guest's memory to be saved") or _outcome(place, job.layers or LayerResult())


def _outcome(place: layer_steps.Place, result: LayerResult) -> Json:
    is_off = place.parts.vm.observed_state in OFF
    return {
        "consistency": "stopped" if is_off else result.consistency,
        "note": "" if is_off else result.note,
        "memory_bytes": result.size_bytes,
        "paused_ms": result.paused_ms,
    }


def _unfreeze(context: Effect[Params]) -> Json | Wait:
    """Merge the new layers back, whichever the guest is on: nothing happens where it never left the old ones but their removal."""
    before = context.results.get("switch", {}).get("before", {})
    if not before:
        return {}
    place = layer_steps.place_of(context)
    if context.params.has_memory and place.domain is not None:
        waiting = _cancel_memory(context, place)
        if waiting is not None:
            return waiting
    for volume_id, old in sorted(before.items()):
        job = layer_steps.merge(context, place, place.volume(volume_id), context.params.layers[volume_id], str(old))
        waiting = layer_steps.follow(job, "the layers to be merged back")
        if waiting is not None:
            return waiting
    if context.params.has_memory:
        key = layer_steps.job_key(context, place, "memory")
        context.agents.delete_memory(place.host_id, key, context.params.vm_id, context.params.snapshot_id, place.state_pool)
    return {}


def _cancel_memory(context: Effect[Params], place: layer_steps.Place) -> Wait | None:
    key = context.key(subject_id=context.params.vm_id, epoch=place.epoch, direction=Direction.DO)
    try:
        job = context.agents.cancel_job(place.host_id, key)
    except NotFound:
        return None
    return Wait(layer_steps.POLL_S, "the saving of memory to be cancelled") if job.state is JobState.RUNNING else None


def _finish(context: Transaction[Params]) -> None:
    session, params, found = context.session, context.params, context.results["freeze"]
    for volume_id, layer_id in params.layers.items():
        snapshots.set_active(session, volume_id, layer_id)
    snapshots.update(
        session,
        params.snapshot_id,
        state="ready",
        consistency=found["consistency"],
        note=str(found["note"])[:500],
        memory_bytes=found["memory_bytes"],
    )
    vms.update(session, params.vm_id, current_snapshot_id=params.snapshot_id)
    vm, snapshot = vms.get(session, params.vm_id), snapshots.get(session, params.snapshot_id)
    _wake(context)
    events.append(
        session,
        kind="snapshot.created",
        project_id=vm.project_id,
        subject_id=vm.id,
        operation_id=context.operation.id,
        actor=context.operation.actor,
        message=f"snapshot {snapshot.name} of vm {vm.name} made ({snapshot.consistency})",
        context={"snapshot_id": snapshot.id, "consistency": snapshot.consistency},
        now=context.now,
    )


def _wake(context: Transaction[Params]) -> None:
    if context.params.wakes:
        operations.wake(context.session, context.params.wakes, context.now)


SAGA = Saga(
    name="snapshot.create",
    version=1,
    params=Params,
    result=lambda results: {"consistency": results["freeze"]["consistency"], "note": results["freeze"]["note"]},
    steps=(
        transaction("own", _own, _disown),
        effect("make_layers", _make_layers, layer_steps.unmake_layers),
        transaction("switch", _switch, _unswitch),
        effect("freeze", _freeze, _unfreeze),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
