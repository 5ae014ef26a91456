"""vm.create: from an accepted request to a running guest.

| step          | do                                               | undo                                     |
|---------------|--------------------------------------------------|------------------------------------------|
| own           | (rows came with the acceptance); a clone waits for its snapshot | withdraw, erase names, MACs, space, quota |
| place         | wait for the leader's answer: host and epoch       | give the claims back                     |
| note_images   | note where copies of base images are about to be  | - the row says where a file may be       |
| bring_images  | copy base images to the host's pools              | - a replica is a cache entry             |
| make_volumes  | create each volume; those of a full clone are copied | delete each volume                    |
| define        | define domain, seed, NVRAM                        | kill and undefine                        |
| power_on      | start (unless `start` is false)                   | - define's undo kills                    |
| finish        | record what was seen and the images                              | - last                                   |

A crash leaves the journal's prefix; nothing else is half-made that a repeat or the undo does not know of.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from trimtab_controller.core.lifecycle import ENDED_STATES, ObservedState, OperationState
from trimtab_controller.operations import layer_steps, vm_steps
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, Wait, effect, transaction
from trimtab_controller.store import describe, events, operations, placements, vms, volume_claims
from trimtab_protos.errors import Conflict, NotFound
from trimtab_protos.messages import Direction, JobState

# The end of the snapshot wakes the row; this is the backstop.
SNAPSHOT_POLL_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    vm_id: str
    start: bool = True
    to_host_id: str = ""
    # A snapshot of another vm is taken first, by this operation; what the vm's disks are made of is kept by that snapshot.
    after_operation_id: str = ""
    snapshot_id: str = ""
    # Of a full clone: volume id → [volume id, layer id] that it is a copy of.
    copies: Mapping[str, Sequence[str]] = field(default_factory=dict)


def _own(context: Transaction[Params]) -> Wait | None:
    """The row was inserted with the operation, so that the name was taken at once; a clone waits for what it is made of."""
    return wait_for_snapshot(context, context.params.after_operation_id)


def wait_for_snapshot(context: Transaction[Any], operation_id: str) -> Wait | None:
    """Return a Wait while the operation that takes the snapshot is live. Conflict where it did not."""
    if not operation_id:
        return None
    found = operations.get(context.session, operation_id)
    if found.state is OperationState.DONE:
        return None
    if found.state in ENDED_STATES:
        why = found.error.message if found.error is not None else found.state.value
        raise Conflict("snapshot-failed", f"the snapshot that it is made of was not taken: {why}", operation_id=operation_id)
    return Wait(SNAPSHOT_POLL_S, "a snapshot of what it is made of")


def _disown(context: Transaction[Params]) -> None:
    placements.withdraw(context.session, context.operation.id)
    vm_steps.erase_vm(context)


def _make_volumes(context: Effect[Params]) -> Json | Wait:
    host_id, epoch = vm_steps.chosen_host(context.results), int(context.results["place"]["epoch"])
    disks = context.read(lambda session: describe.read_disks(session, context.params.vm_id))
    for volume in disks.volumes:
        key = context.key(subject_id=context.params.vm_id, epoch=epoch, part=volume.id)
        spec, pool = describe.volume_spec(volume, disks.images), describe.pool_spec(disks.pools[volume.pool_id])
        if volume.id in context.params.copies:
            source_id, layer_id = context.params.copies[volume.id]
            spec = replace(spec, copy_volume_id=source_id, copy_layer_id=layer_id)
        elif not spec.copy_image_id:
            context.agents.ensure_volume(host_id, key, spec, pool)
            continue
        waiting = layer_steps.follow(context.agents.start_volume_copy(host_id, key, spec, pool), "a copy of its disk")
        if waiting is not None:
            return waiting
    return {"volume_ids": [volume.id for volume in disks.volumes]}


def _delete_volumes(context: Effect[Params]) -> Wait | None:
    place = context.results.get("place")
    if place is None:
        return None
    parts = context.read(lambda session: describe.read_vm(session, context.params.vm_id))
    for volume_id in context.params.copies:
        if _is_being_copied(context, place, volume_id):
            return Wait(layer_steps.POLL_S, "a copy to be cancelled")
    for volume in parts.volumes:
        if not volume.is_deleted_with_vm:
            continue  # it was there before the vm and stays
        key = context.key(subject_id=parts.vm.id, epoch=int(place["epoch"]), part=volume.id)
        pool = describe.pool_spec(parts.pools[volume.pool_id])
        context.agents.delete_volume(str(place["host_id"]), key, volume.id, volume.format, pool)
    return None


def _is_being_copied(context: Effect[Params], place: Json, volume_id: str) -> bool:
    """Ask the copy to end; tell whether it still runs."""
    key = replace(context.key(subject_id=context.params.vm_id, epoch=int(place["epoch"]), part=volume_id), direction=Direction.DO)
    try:
        return context.agents.cancel_job(str(place["host_id"]), key).state is JobState.RUNNING
    except NotFound:
        return False


def _finish(context: Transaction[Params]) -> None:
    session, vm_id = context.session, context.params.vm_id
    volume_claims.mark_present(session, context.results["make_volumes"]["volume_ids"])
    vm_steps.record_images(context)
    vm_steps.record_seen(context, "power_on")
    vms.update(session, vm_id, problem="")
    if context.results["power_on"]["state"] == ObservedState.STOPPED.value:
        vm_steps.give_back_compute(context)
    vm = vms.get(session, vm_id)
    events.append(
        session,
        kind="vm.created",
        project_id=vm.project_id,
        subject_id=vm_id,
        operation_id=context.operation.id,
        actor=context.operation.actor,
        message=f"vm {vm.name} created",
        context={"host_id": vm.host_id},
        now=context.now,
    )


def _result(results: Any) -> Json:
    return {"host_id": results["place"]["host_id"], "decision_id": results["place"]["decision_id"]}


SAGA = Saga(
    name="vm.create",
    version=1,
    params=Params,
    result=_result,
    steps=(
        transaction("own", _own, _disown),
        vm_steps.place("create"),
        vm_steps.note_images(),
        vm_steps.bring_images(),
        effect("make_volumes", _make_volumes, _delete_volumes),
        effect("define", vm_steps.define, vm_steps.undefine_everywhere),
        effect("power_on", vm_steps.power_on_if_asked, None, because="the undo of `define` kills"),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
