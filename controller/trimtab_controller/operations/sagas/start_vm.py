"""vm.start: a stopped vm gets compute again, perhaps on another host, and runs.

| step          | do                                                          | undo                                |
|---------------|-------------------------------------------------------------|-------------------------------------|
| own           | take on the shape that waited for the stop                   | wish it stopped again               |
| place         | ask the leader (the previous host is preferred)              | give the compute back               |
| note_images   | note where copies of base images are about to be             | - says where a file may be          |
| bring_images  | copy base images where they are missing                      | - cache                             |
| leave_old     | undefine on the previous host when the vm moved              | - defined again by the next start   |
| define        | define under the new epoch                                   | kill and undefine; the disks stay   |
| power_on      | start                                                        | - define's undo kills               |
| finish        | record what was seen and the images                                         | - last                              |

A running vm stays running: the leader answers with its home and every step finds its work done.
"""

from dataclasses import dataclass

from trimtab_controller.core.lifecycle import DesiredPower
from trimtab_controller.core.resize import OFF, next_of, wanted_of
from trimtab_controller.operations import vm_steps
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, effect, transaction
from trimtab_controller.store import claims, vms


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    vm_id: str
    to_host_id: str = ""


def _leave_old(context: Effect[Params]) -> Json:
    """Make sure that no older definition can be started elsewhere. An unreachable old host blocks: unknown is not absent."""
    place = context.results["place"]
    previous = str(place.get("previous_host_id", ""))
    if previous and previous != place["host_id"]:
        vm_steps.remove_domain(context, previous, epoch=int(place["epoch"]), keep_state_files=True)
    return {"previous_host_id": previous}


def _undefine(context: Effect[Params]) -> None:
    place = context.results.get("place")
    if place is not None:
        vm_steps.remove_domain(context, str(place["host_id"]), epoch=int(place["epoch"]), keep_state_files=True)


def _finish(context: Transaction[Params]) -> None:
    vm_steps.record_images(context)
    vm_steps.record_seen(context, "power_on")
    vms.update(context.session, context.params.vm_id, problem="")


def _own(context: Transaction[Params]) -> None:
    """Give a vm that is off the shape that waited for that; the wish to run was recorded when the request was accepted."""
    vm = vms.get(context.session, context.params.vm_id)
    left = next_of(vm)
    if left.is_nothing or vm.observed_state not in OFF:
        return
    # One that ended by itself holds its compute still: it is placed anew with what it needs now.
    claims.give_back(context.session, vm.id)
    vms.set_shape(context.session, vm, wanted_of(vm, vcpus=0, memory_mib=0))


def _disown(context: Transaction[Params]) -> None:
    vms.set_desired(context.session, context.params.vm_id, DesiredPower.STOPPED)


SAGA = Saga(
    name="vm.start",
    version=1,
    params=Params,
    result=lambda results: {"host_id": results["place"]["host_id"], "decision_id": results["place"]["decision_id"]},
    steps=(
        transaction("own", _own, _disown),
        vm_steps.place("start"),
        vm_steps.note_images(),
        vm_steps.bring_images(),
        effect("leave_old", _leave_old, None, because="the next start defines it again"),
        effect("define", vm_steps.define, _undefine),
        effect("power_on", vm_steps.power_on, None, because="the undo of `define` kills"),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
