"""vm.create: from an accepted request to a running guest.

| step          | do                                               | undo                                     |
|---------------|--------------------------------------------------|------------------------------------------|
| own           | (row and placement request came with the acceptance) | withdraw, erase the row's names, MACs, space, quota |
| place         | wait for the leader's answer: host and epoch       | give the claims back                     |
| note_images   | note where copies of base images are about to be  | - the row says where a file may be       |
| bring_images  | copy base images to the host's pools              | - a replica is a cache entry             |
| make_volumes  | create each volume                                | delete each volume                       |
| define        | define domain, seed, NVRAM                        | kill and undefine                        |
| power_on      | start (unless `start` is false)                   | - define's undo kills                    |
| finish        | record what was seen and the images                              | - last                                   |

A crash leaves the journal's prefix; nothing else is half-made that a repeat or the undo does not know of.
"""

from dataclasses import dataclass
from typing import Any

from trimtab_controller.core.lifecycle import ObservedState
from trimtab_controller.operations import vm_steps
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, effect, transaction
from trimtab_controller.store import describe, events, placements, vms, volume_claims


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    vm_id: str
    start: bool = True
    to_host_id: str = ""


def _own(_context: Transaction[Params]) -> None:
    """Nothing to do: the row was inserted with the operation, so that the name was taken at once."""


def _disown(context: Transaction[Params]) -> None:
    placements.withdraw(context.session, context.operation.id)
    vm_steps.erase_vm(context)


def _make_volumes(context: Effect[Params]) -> Json:
    host_id, epoch = vm_steps.chosen_host(context.results), int(context.results["place"]["epoch"])
    disks = context.read(lambda session: describe.read_disks(session, context.params.vm_id))
    for volume in disks.volumes:
        key = context.key(subject_id=context.params.vm_id, epoch=epoch, part=volume.id)
        spec = describe.volume_spec(volume, disks.images)
        context.agents.ensure_volume(host_id, key, spec, describe.pool_spec(disks.pools[volume.pool_id]))
    return {"volume_ids": [volume.id for volume in disks.volumes]}


def _delete_volumes(context: Effect[Params]) -> None:
    place = context.results.get("place")
    if place is None:
        return
    parts = context.read(lambda session: describe.read_vm(session, context.params.vm_id))
    for volume in parts.volumes:
        if not volume.is_deleted_with_vm:
            continue  # it was there before the vm and stays
        key = context.key(subject_id=parts.vm.id, epoch=int(place["epoch"]), part=volume.id)
        pool = describe.pool_spec(parts.pools[volume.pool_id])
        context.agents.delete_volume(str(place["host_id"]), key, volume.id, volume.format, pool)


def _power_on(context: Effect[Params]) -> Json:
    if context.params.start:
        return vm_steps.power_on(context)
    host_id = vm_steps.chosen_host(context.results)
    return vm_steps.seen_json(host_id, context.agents.get_domain(host_id, context.params.vm_id))


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
        effect("power_on", _power_on, None, because="the undo of `define` kills"),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
