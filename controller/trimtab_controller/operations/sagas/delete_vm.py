"""vm.delete: the guest ends everywhere it may be; the vm is hidden for 24 h, then purged (`vm.purge`).

| step   | do                                                                  | undo                               |
|--------|---------------------------------------------------------------------|------------------------------------|
| own    | (the wish was recorded at acceptance)                                | - delete goes only forward         |
| remove | kill and undefine on every holder, both sides of a migration too     | - a killed guest stays killed      |
| hide   | give compute back, set deleted_at and purge_after                    | - last                             |

Delete supersedes whatever was under way, so the holders are read from claims, home and migration row, not from a journal. A
holder that does not answer is waited for: a vm is not shown as gone while a guest may run.
"""

from dataclasses import dataclass
from datetime import timedelta

from trimtab_controller.core.lifecycle import ObservedState
from trimtab_controller.operations import vm_steps
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, effect, transaction
from trimtab_controller.store import claims, describe, events, vms, volume_claims

HIDDEN_FOR = timedelta(hours=24)


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    vm_id: str


def _own(_context: Transaction[Params]) -> None:
    """Journaled first so that delete is past its pivot from the start: it rolls only forward."""


def _remove(context: Effect[Params]) -> Json:
    holders, epoch = context.read(lambda session: vm_steps.holders_of(session, context.params.vm_id))
    for host_id in holders:
        vm_steps.remove_domain(context, host_id, epoch=epoch, keep_state_files=True, part=host_id)
    migration = context.read(lambda session: claims.migration_of(session, context.params.vm_id))
    if migration is not None and migration.copied_volume_ids:
        _delete_copies(context, migration.target_host_id, migration.target_epoch, migration.copied_volume_ids)
    return {"hosts": list(holders), "epoch": epoch}


def _delete_copies(context: Effect[Params], host_id: str, epoch: int, volume_ids: tuple[str, ...]) -> None:
    """Remove what a superseded migration had begun to copy; the originals stay for `undelete`."""
    parts = context.read(lambda session: describe.read_vm(session, context.params.vm_id))
    for volume in parts.volumes:
        if volume.id in volume_ids and volume.host_id != host_id:
            key = context.key(subject_id=parts.vm.id, epoch=epoch, part=f"{host_id}-{volume.id}")
            pool = describe.pool_spec(parts.pools[volume.pool_id])
            context.agents.delete_volume(host_id, key, volume.id, volume.format, pool)


def _hide(context: Transaction[Params]) -> None:
    session, vm_id = context.session, context.params.vm_id
    migration = claims.migration_of(session, vm_id)
    if migration is not None:
        volume_claims.give_back_copies(session, migration)
        claims.end_migration(session, vm_id)
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
    result=lambda results: {"hosts": results["remove"]["hosts"]},
    steps=(
        transaction("own", _own, None, because="delete rolls only forward", pivot=True),
        effect("remove", _remove, None, because="a killed guest stays killed"),
        transaction("hide", _hide, None, because="nothing follows it"),
    ),
)
