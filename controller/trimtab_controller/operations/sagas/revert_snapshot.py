"""snapshot.revert: the vm's disks, and its memory where that was kept and is wished, become what they were.

| step        | do                                                                     | undo                       |
|-------------|------------------------------------------------------------------------|----------------------------|
| own         | (the new layers were inserted at acceptance)                            | forget them                |
| make_layers | an empty file over what the snapshot keeps of each disk                 | delete it                  |
| off         | cut the guest's power: what it does now is given up (pivot)              | - off is off               |
| switch      | SQL: the vm is on these layers, its volumes a generation older           | -                          |
| define      | images of Ceph's are rolled back; so is its definition                  | -                          |
| run         | it runs again where it ran: from its memory, or by a start               | -                          |
| drop        | delete or merge the layers that nothing needs any more                   | -                          |
| finish      | record what was seen and which layers are left                           | - last                     |

The snapshot stays and may be gone back to again.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from trimtab_controller.operations import layer_steps, vm_steps
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, Wait, effect, transaction
from trimtab_controller.store import events, snapshots, vms
from trimtab_protos.errors import Conflict
from trimtab_protos.messages import DomainState, PowerAction

_OFF = frozenset({DomainState.STOPPED, DomainState.ABSENT, DomainState.CRASHED})


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    vm_id: str
    snapshot_id: str
    # Volume id → the layer that its guest writes to afterwards.
    layers: Mapping[str, str]
    # It runs now and shall again; with its memory, or from its disks.
    should_run: bool
    with_memory: bool = False


def _own(_context: Transaction[Params]) -> None:
    """The rows were inserted when the request was accepted."""


def _disown(context: Transaction[Params]) -> None:
    snapshots.delete_layers(context.session, context.params.layers.values())


def _make_layers(context: Effect[Params]) -> Json:
    snapshot = context.read(lambda session: snapshots.get(session, context.params.snapshot_id))
    return layer_steps.make_layers(context, {str(one["volume_id"]): str(one["layer_id"]) for one in snapshot.volumes})


def _off(context: Effect[Params]) -> Json:
    place = layer_steps.place_of(context)
    if place.domain is None:
        return {"host_id": ""}
    vm_id = context.params.vm_id
    if context.agents.get_domain(place.host_id, vm_id).state not in _OFF:
        key = layer_steps.job_key(context, place)
        seen = context.agents.change_power(place.host_id, key, vm_id, PowerAction.FORCE_OFF)
        if seen.state not in _OFF:
            raise Conflict("guest-still-on", f"the guest is {seen.state.value} although its power was cut")
    return {"host_id": place.host_id}


def _switch(context: Transaction[Params]) -> Json:
    for volume_id, layer_id in context.params.layers.items():
        snapshots.set_active(context.session, volume_id, layer_id, ages=True)
    vms.update(context.session, context.params.vm_id, current_snapshot_id=context.params.snapshot_id)
    return {"works": layer_steps.plan(context)}


def _define(context: Effect[Params]) -> Json | Wait:
    snapshot = context.read(lambda session: snapshots.get(session, context.params.snapshot_id))
    kept = {str(one["volume_id"]): str(one["layer_id"]) for one in snapshot.volumes}
    waiting = layer_steps.lay_images(context, kept, goes_back=True)
    if waiting is not None:
        return waiting
    place = layer_steps.place_of(context)
    if place.domain is not None:
        context.agents.switch_layers(place.host_id, layer_steps.job_key(context, place), place.domain, wants_freeze=False)
    return {}


def _run(context: Effect[Params]) -> Json | Wait:
    place = layer_steps.place_of(context)
    if place.domain is None:
        return {"host_id": ""}
    key = layer_steps.job_key(context, place)
    if not context.params.should_run:
        return vm_steps.seen_json(place.host_id, context.agents.get_domain(place.host_id, context.params.vm_id))
    if not context.params.with_memory:
        seen = context.agents.change_power(place.host_id, key, context.params.vm_id, PowerAction.START)
        return vm_steps.seen_json(place.host_id, seen)
    job = context.agents.start_memory_restore(place.host_id, key, place.domain, context.params.snapshot_id)
    waiting = layer_steps.follow(job, "the guest's memory to be restored")
    return waiting or vm_steps.seen_json(place.host_id, context.agents.get_domain(place.host_id, context.params.vm_id))


def _drop(context: Effect[Params]) -> Json | Wait:
    return layer_steps.do_works(context, context.results["switch"]["works"]) or {}


def _finish(context: Transaction[Params]) -> None:
    session, params = context.session, context.params
    layer_steps.record_works(context, context.results["switch"]["works"])
    if context.results["run"]["host_id"]:
        vm_steps.record_seen(context, "run")
    snapshot, vm = snapshots.get(session, params.snapshot_id), vms.get(session, params.vm_id)
    events.append(
        session,
        kind="snapshot.reverted",
        project_id=vm.project_id,
        subject_id=vm.id,
        operation_id=context.operation.id,
        actor=context.operation.actor,
        message=f"vm {vm.name} went back to snapshot {snapshot.name}{' with its memory' if params.with_memory else ''}",
        context={"snapshot_id": snapshot.id},
        now=context.now,
    )


SAGA = Saga(
    name="snapshot.revert",
    version=1,
    params=Params,
    steps=(
        transaction("own", _own, _disown),
        effect("make_layers", _make_layers, layer_steps.unmake_layers),
        effect("off", _off, None, because="off is off", pivot=True),
        transaction("switch", _switch, None, because="past the pivot"),
        effect("define", _define, None, because="past the pivot"),
        effect("run", _run, None, because="past the pivot"),
        effect("drop", _drop, None, because="past the pivot"),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
