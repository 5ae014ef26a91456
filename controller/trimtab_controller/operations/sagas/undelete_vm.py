"""vm.undelete: a deleted vm is shown again, stopped, with its disks; `vm start` defines and starts it.

| step    | do                                                        | undo          |
|---------|-----------------------------------------------------------|---------------|
| restore | clear deleted_at; AlreadyExists where the name was reused  | hide it again |
"""

from dataclasses import dataclass

from trimtab_controller.core.lifecycle import DesiredPower, ObservedState
from trimtab_controller.operations.saga import Saga, Transaction, transaction
from trimtab_controller.store import events, vms
from trimtab_protos.errors import AlreadyExists, Conflict


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    vm_id: str


def _restore(context: Transaction[Params]) -> None:
    session = context.session
    vm = vms.get(session, context.params.vm_id)
    if vm.deleted_at is None:
        return
    if vm.purge_after is None or vm.purge_after <= context.now:
        raise Conflict("vm-purged", f"vm {vm.name} is past its 24 h; restore it from a backup")
    if vms.find(session, vm.project_id, vm.name) is not None:
        raise AlreadyExists("vm-exists", f"another vm is called {vm.name} now; rename or delete that one first", name=vm.name)
    vms.update(
        session,
        vm.id,
        deleted_at=None,
        purge_after=None,
        desired_power=DesiredPower.STOPPED.value,
        observed_state=ObservedState.STOPPED.value,
        observed_at=context.now,
    )
    events.append(
        session,
        kind="vm.undeleted",
        project_id=vm.project_id,
        subject_id=vm.id,
        operation_id=context.operation.id,
        actor=context.operation.actor,
        message=f"vm {vm.name} is back, stopped; `trimtab vm start {vm.name}`",
        now=context.now,
    )


SAGA = Saga(
    name="vm.undelete",
    version=1,
    params=Params,
    steps=(transaction("restore", _restore, None, because="it is the only step"),),
)
