"""vm.settle_move: a migration lost one of its hosts for good; the guest goes on where it was seen, and that side becomes its home.

| step   | do                                                                             | undo                                  |
|--------|--------------------------------------------------------------------------------|---------------------------------------|
| own    | nothing: acceptance superseded the migration, whose other side is proven gone   | - nothing was done yet                  |
| find   | wait until libvirt gave the move up; the guest has to be there                  | - it only looks                       |
| settle | persist the domain there under the migration's epoch (pivot)                    | -                                     |
| resume | let it run on where the switch had paused it                                    | -                                     |
| finish | its home is here; give back what the other side held, forget the migration      | - last                                |

A crash anywhere leaves the guest where it is. The lost side is cleaned when its host comes back (`vm.clean_copy`).
"""

import dataclasses
from dataclasses import dataclass

from trimtab_controller.core.model import MigrationRow, Vm
from trimtab_controller.operations import superseded, vm_steps
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, Wait, effect, transaction
from trimtab_controller.store import claims, describe, vms
from trimtab_controller.store.database import Session
from trimtab_protos.errors import Conflict, NotFound
from trimtab_protos.messages import Direction, DomainState, JobState, MigrationSide, PowerAction

# libvirt notices a dead peer by its keepalive, some 30 s; then the job ends by itself.
PATIENCE_S = 60.0
POLL_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    vm_id: str
    host_id: str


def _own(_context: Transaction[Params]) -> None:
    """The transaction that accepted this superseded the migration; its record stays until `finish`."""


def _find(context: Effect[Params]) -> Json | Wait:
    params = context.params
    vm, row = context.read(lambda session: _vm_and_migration(session, params.vm_id))
    if row is None or params.host_id not in {row.source_host_id, row.target_host_id}:
        raise Conflict("migration-gone", f"vm {vm.name} has no migration that could be settled there")
    is_running = False
    if params.host_id == row.source_host_id:
        key = context.key(subject_id=vm.id, epoch=row.source_epoch, direction=Direction.DO)
        try:
            job = context.agents.cancel_job(params.host_id, dataclasses.replace(key, operation_id=row.operation_id, step="move"))
            is_running = job.state is JobState.RUNNING
        except NotFound:
            pass  # it never began
    seen = context.agents.get_domain(params.host_id, vm.id)
    if (is_running or seen.is_migrating) and context.waited_s < PATIENCE_S:
        return Wait(POLL_S, "the migration to be given up")
    if seen.state not in superseded.HAS_GUEST:
        raise Conflict("guest-not-there", f"the guest of vm {vm.name} is {seen.state.value} on the host that was left to it")
    return {
        "host_id": params.host_id,
        "epoch": max(vm.epoch, row.target_epoch),
        "was_moving": True,
        "has_moved": params.host_id == row.target_host_id,
        "is_paused": seen.state is DomainState.PAUSED,
    }


def _vm_and_migration(session: Session, vm_id: str) -> tuple[Vm, MigrationRow | None]:
    return vms.get(session, vm_id), claims.migration_of(session, vm_id)


def _settle(context: Effect[Params]) -> Json:
    found = context.results["find"]
    host_id, vm_id = str(found["host_id"]), context.params.vm_id

    def read(session: Session) -> object:
        return describe.domain_spec(session, describe.read_vm(session, vm_id), host_id)

    spec = context.read(read)
    key = context.key(subject_id=vm_id, epoch=int(found["epoch"]))
    context.agents.settle_migration(host_id, key, vm_id, MigrationSide.KEEP, spec, ())
    return {}


def _resume(context: Effect[Params]) -> Json:
    found, vm_id = context.results["find"], context.params.vm_id
    host_id = str(found["host_id"])
    if not found["is_paused"]:
        return vm_steps.seen_json(host_id, context.agents.get_domain(host_id, vm_id))
    key = context.key(subject_id=vm_id, epoch=int(found["epoch"]))
    return vm_steps.seen_json(host_id, context.agents.change_power(host_id, key, vm_id, PowerAction.RESUME))


def _finish(context: Transaction[Params]) -> None:
    superseded.forget_migration(context, context.results["find"])
    vm_steps.record_seen(context, "resume")
    vms.update(context.session, context.params.vm_id, problem="")


SAGA = Saga(
    name="vm.settle_move",
    version=1,
    params=Params,
    # The migration was superseded, and only this ends its record.
    is_forward_only=lambda _params: True,
    result=lambda results: {"host_id": results["find"]["host_id"]},
    steps=(
        transaction("own", _own, None, because="nothing was done yet"),
        effect("find", _find, None, because="it only looks"),
        effect("settle", _settle, None, because="the guest is there", pivot=True),
        effect("resume", _resume, None, because="past the pivot"),
        transaction("finish", _finish, None, because="past the pivot"),
    ),
)
