"""vm.delete: the guest ends everywhere it may be; the vm is hidden for 24 h, then purged (`vm.purge`).

| step   | do                                                                  | undo                               |
|--------|---------------------------------------------------------------------|------------------------------------|
| own    | (the wish was recorded at acceptance)                                | - delete goes only forward         |
| find   | a migration under way is aborted: on which side is the guest?        | - it only looks                    |
| remove | kill and undefine on every holder, both sides of a migration too     | - a killed guest stays killed      |
| hide   | give compute back, set deleted_at and purge_after                    | - last                             |

Delete supersedes whatever was under way, so the holders are read from claims, home and migration row, not from a journal. A
holder that does not answer is waited for: a vm is not shown as gone while a guest may run.
"""

from dataclasses import dataclass
from datetime import timedelta

from trimtab_controller.core.lifecycle import ObservedState
from trimtab_controller.operations import superseded, vm_steps
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, effect, transaction
from trimtab_controller.store import claims, events, vms

HIDDEN_FOR = timedelta(hours=24)


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    vm_id: str


def _own(_context: Transaction[Params]) -> None:
    """Journaled first so that delete is past its pivot from the start: it rolls only forward."""


def _remove(context: Effect[Params]) -> Json:
    found = context.results["find"]
    holders, epoch = context.read(lambda session: vm_steps.holders_of(session, context.params.vm_id))
    # Where the guest is comes first: the other way round it could still arrive on a side that was cleaned already.
    for host_id in sorted(holders, key=lambda host_id: host_id != found["host_id"]):
        vm_steps.remove_domain(context, host_id, epoch=epoch, keep_state_files=True, part=host_id)
    if found["was_moving"]:
        superseded.clean_other_side(context, found)
    return {"hosts": list(holders), "epoch": epoch}


def _hide(context: Transaction[Params]) -> None:
    session, vm_id = context.session, context.params.vm_id
    superseded.forget_migration(context, context.results["find"])
    claims.give_back(session, vm_id)
    vms.update(
        session,
        vm_id,
        deleted_at=context.now,
        purge_after=context.now + HIDDEN_FOR,
        host_id="",
        epoch=int(context.results["remove"]["epoch"]),
        observed_state=ObservedState.ABSENT.value,
        observed_reason="",
        observed_at=context.now,
        problem="",
    )
    vm = vms.get(session, vm_id)
    events.append(
        session,
        kind="vm.deleted",
        project_id=vm.project_id,
        subject_id=vm_id,
        operation_id=context.operation.id,
        actor=context.operation.actor,
        message=f"vm {vm.name} deleted; `trimtab vm undelete {vm.name}` brings it back within 24 h",
        now=context.now,
    )


SAGA = Saga(
    name="vm.delete",
    version=1,
    params=Params,
    # It superseded what was under way and has to clean up after that, whatever anybody wishes by now.
    is_forward_only=lambda _params: True,
    result=lambda results: {"hosts": results["remove"]["hosts"]},
    steps=(
        transaction("own", _own, None, because="delete rolls only forward", pivot=True),
        effect("find", superseded.find_guest, None, because="it only looks"),
        effect("remove", _remove, None, because="a killed guest stays killed"),
        transaction("hide", _hide, None, because="nothing follows it"),
    ),
)
