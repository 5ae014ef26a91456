"""vm.reconcile: what somebody changed by hand is put back as the vm shall be.

| step   | do                                                                            | undo                                   |
|--------|-------------------------------------------------------------------------------|----------------------------------------|
| revert | define the domain as SQL says; a running guest is asked for what it can follow | - to put back what is wrong helps none |
| finish | record what is left for its next stop                                          | - last                                 |

What somebody attached to the running guest is not pulled from under it: it is gone from the stored definition, and with the next stop.
"""

from dataclasses import dataclass

from trimtab_controller.core.resize import OFF
from trimtab_controller.operations import live_changes, vm_steps
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, Wait, effect, transaction
from trimtab_controller.store import describe, events, vms


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    vm_id: str


def _revert(context: Effect[Params]) -> Json | Wait:
    host_id, epoch = vm_steps.home_of(context)
    vm_id = context.params.vm_id
    vm = context.read(lambda session: vms.get(session, vm_id))
    if vm.observed_state in OFF:
        spec = context.read(lambda session: describe.domain_spec(session, describe.read_vm(session, vm_id), host_id))
        context.agents.define_domain(host_id, context.key(subject_id=vm_id, epoch=epoch), spec)
        return {"left": []}
    _seen, left = live_changes.ask_guest(context, host_id=host_id, epoch=epoch)
    if live_changes.may_follow(left) and context.waited_s < live_changes.PATIENCE_S:
        return Wait(live_changes.POLL_S, f"the guest: {left[0].reason}")
    return {"left": [each.reason for each in left]}


def _finish(context: Transaction[Params]) -> Json:
    vm = vms.get(context.session, context.params.vm_id)
    left = context.results["revert"]["left"]
    events.append(
        context.session,
        kind="vm.reconciled",
        project_id=vm.project_id,
        subject_id=vm.id,
        operation_id=context.operation.id,
        actor=context.operation.actor,
        message=f"what was changed by hand at vm {vm.name} was put back" + (", the rest at its next stop" if left else ""),
        context={"left": left},
        now=context.now,
    )
    return {"left": left}


SAGA = Saga(
    name="vm.reconcile",
    version=1,
    params=Params,
    result=lambda results: results["finish"],
    steps=(
        effect("revert", _revert, None, because="to put back what is wrong helps nobody"),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
