"""vm.adopt: a domain of somebody's comes under control while it runs.

| step   | do                                                                                       | undo                                |
|--------|------------------------------------------------------------------------------------------|-------------------------------------|
| own    | (vm, volumes, cards, quota, claim and space were taken at acceptance, in one transaction) | give all of it back                 |
| adopt  | second names for its files, no autostart, our mark in its metadata                        | take the mark and the names off it  |
| finish | record what was observed                                                                  | - last                              |

The guest notices none of it. A death between two steps leaves a plain domain, or one that bears the mark of a vm that is there.
"""

from dataclasses import dataclass

from trimtab_controller.core.lifecycle import DesiredPower
from trimtab_controller.operations import adoption_steps, vm_steps
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, effect, transaction
from trimtab_controller.store import adoptions, events, vms
from trimtab_protos.adoption_messages import AdoptedDisk


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    vm_id: str


def _own(_context: Transaction[Params]) -> None:
    """All was taken when the request was accepted, so that two could not both take it."""


def _disown(context: Transaction[Params]) -> None:
    adoption_steps.give_up(context, context.params.vm_id)


def _adopt(context: Effect[Params]) -> Json:
    vm_id = context.params.vm_id
    host_id, epoch, spec = adoption_steps.spec_at_home(context, vm_id)
    adoption = context.read(lambda session: adoptions.find(session, vm_id))
    assert adoption is not None, "the row was inserted with the vm"
    disks = [AdoptedDisk(**disk) for disk in adoption.disks]
    seen = context.agents.adopt_domain(host_id, context.key(subject_id=vm_id, epoch=epoch), spec.uuid, spec, disks)
    return vm_steps.seen_json(host_id, seen)


def _unadopt(context: Effect[Params]) -> None:
    vm_id = context.params.vm_id
    host_id, epoch, spec = adoption_steps.spec_at_home(context, vm_id)
    adoption = context.read(lambda session: adoptions.find(session, vm_id))
    had_autostart = adoption is not None and adoption.had_autostart
    context.agents.release_domain(host_id, context.key(subject_id=vm_id, epoch=epoch), spec, has_autostart=had_autostart)


def _finish(context: Transaction[Params]) -> None:
    vm_steps.record_seen(context, "adopt")
    vm = vms.get(context.session, context.params.vm_id)
    if vm.desired_power is DesiredPower.STOPPED:
        vm_steps.give_back_compute(context)
    events.append(
        context.session,
        kind="vm.adopted",
        project_id=vm.project_id,
        subject_id=vm.id,
        operation_id=context.operation.id,
        actor=context.operation.actor,
        message=f"vm {vm.name} was adopted as it ran",
        now=context.now,
    )


SAGA = Saga(
    name="vm.adopt",
    version=1,
    params=Params,
    steps=(
        transaction("own", _own, _disown),
        effect("adopt", _adopt, _unadopt),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
