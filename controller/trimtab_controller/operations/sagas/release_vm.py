"""vm.release: a vm becomes a plain libvirt domain, which goes on as it is; its files stay.

| step    | do                                                                    | undo                        |
|---------|-----------------------------------------------------------------------|-----------------------------|
| own     | refuse what would hang in the air                                      | - it only looks; no way back |
| release | take our mark off the domain; autostart as asked                       | - goes only forward         |
| erase   | free what SQL holds; vm and volumes stay as tombstones, files stay     | - last                      |

A death after `release` leaves a plain domain whose vm is still there: the repeat finds it plain and goes on.
"""

from dataclasses import dataclass

from trimtab_controller.operations import adoption_steps
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, effect, transaction
from trimtab_controller.store import claims, events, vms
from trimtab_protos.errors import Conflict


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    vm_id: str
    has_autostart: bool = False


def _own(context: Transaction[Params]) -> None:
    vm = vms.get(context.session, context.params.vm_id)
    if not vm.host_id or claims.migration_of(context.session, vm.id) is not None:
        raise Conflict("vm-not-settled", f"vm {vm.name} is not on one host for certain; see `trimtab vm get {vm.name}`")


def _release(context: Effect[Params]) -> Json:
    vm_id = context.params.vm_id
    host_id, epoch, spec = adoption_steps.spec_at_home(context, vm_id)
    seen = context.agents.release_domain(
        host_id, context.key(subject_id=vm_id, epoch=epoch), spec, has_autostart=context.params.has_autostart
    )
    return {"host_id": host_id, "domain": seen.name, "state": seen.state.value}


def _erase(context: Transaction[Params]) -> None:
    vm = vms.get(context.session, context.params.vm_id)
    adoption_steps.give_up(context, vm.id)
    released = context.results["release"]
    events.append(
        context.session,
        kind="vm.released",
        project_id=vm.project_id,
        subject_id=vm.id,
        operation_id=context.operation.id,
        actor=context.operation.actor,
        message=f"vm {vm.name} was released; it is the plain libvirt domain {released['domain']}",
        context={"host_id": released["host_id"], "domain": released["domain"]},
        now=context.now,
    )


SAGA = Saga(
    name="vm.release",
    version=1,
    params=Params,
    result=lambda results: results["release"],
    steps=(
        transaction("own", _own, None, because="it only looks", pivot=True),
        effect("release", _release, None, because="a released domain is somebody's"),
        transaction("erase", _erase, None, because="nothing follows it"),
    ),
)
