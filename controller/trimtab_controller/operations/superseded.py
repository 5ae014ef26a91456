"""What a delete or a forced stop does about the migration that it superseded: find the guest, clean the other side, forget.

    find_guest ──► (the successor ends the guest) ──► clean_other_side ──► forget_migration

The disks on the side where the guest is are the ones that count: the other side's are stale, or a copy that was never finished.
"""

import dataclasses
from typing import Any

from trimtab_controller.agents.client import Job
from trimtab_controller.core import migration
from trimtab_controller.core.model import MigrationRow
from trimtab_controller.operations.saga import Effect, Json, Transaction, Wait
from trimtab_controller.operations.vm_steps import remove_domain
from trimtab_controller.store import claims, describe, vms, volume_claims
from trimtab_protos.errors import NotFound
from trimtab_protos.messages import Direction, DomainState, JobState

# How long libvirt may take to abort the migration before the guest is ended on both sides all the same.
ABORT_PATIENCE_S = 20.0
ABORT_POLL_S = 2.0
# Whoever is in one of these has the guest's memory; one that is only incoming has nothing yet that its source lacks.
HAS_GUEST = frozenset({DomainState.RUNNING, DomainState.PAUSED, DomainState.STOPPING})


def find_guest(context: Effect[Any]) -> Json | Wait:
    """Tell on which host the vm is that somebody may have been moving: its disks there are the ones that count.

    {host_id, epoch, was_moving, has_moved}: asks both hosts, after the migration was asked to end. Nothing under way: its home.
    """
    vm, row = context.read(_vm_and_migration(context.params.vm_id))
    if row is None:
        return {"host_id": vm.host_id, "epoch": vm.epoch, "was_moving": False, "has_moved": False}
    epoch = max(vm.epoch, row.target_epoch)
    if vm.host_id == row.target_host_id:
        return {"host_id": row.target_host_id, "epoch": epoch, "was_moving": True, "has_moved": True}
    job = _abort_migration(context, row)
    source = context.agents.get_domain(row.source_host_id, vm.id)
    target = context.agents.get_domain(row.target_host_id, vm.id)
    is_under_way = job is not None and job.state is JobState.RUNNING
    if (is_under_way or migration.outcome(source=source, target=target) is migration.Outcome.UNSETTLED) and (
        context.waited_s < ABORT_PATIENCE_S
    ):
        return Wait(ABORT_POLL_S, "the migration to be aborted")
    has_moved = target.state in HAS_GUEST
    host_id = row.target_host_id if has_moved else row.source_host_id
    return {"host_id": host_id, "epoch": epoch, "was_moving": True, "has_moved": has_moved}


def _vm_and_migration(vm_id: str) -> Any:
    return lambda session: (vms.get(session, vm_id), claims.migration_of(session, vm_id))


def _abort_migration(context: Effect[Any], row: MigrationRow) -> Job | None:
    """Ask the superseded operation's job to end, under our own turn."""
    key = dataclasses.replace(
        context.key(subject_id=row.vm_id, epoch=row.source_epoch, direction=Direction.DO),
        operation_id=row.operation_id,
        step="move",
    )
    try:
        return context.agents.cancel_job(row.source_host_id, key)
    except NotFound:
        return None


def clean_other_side(context: Effect[Any], found: Json) -> Json:
    """End and remove what the superseded migration left on the side where the guest is not, copies of its disks included."""
    _vm, row = context.read(_vm_and_migration(context.params.vm_id))
    if row is None:
        return {"host_id": ""}
    other = row.source_host_id if found["has_moved"] else row.target_host_id
    remove_domain(context, other, epoch=int(found["epoch"]), keep_state_files=True, part=other)
    parts = context.read(lambda session: describe.read_vm(session, context.params.vm_id))
    for volume in parts.volumes:
        if volume.id in row.copied_volume_ids:
            key = context.key(subject_id=parts.vm.id, epoch=int(found["epoch"]), part=f"{other}-{volume.id}")
            pool = describe.pool_spec(parts.pools[volume.pool_id])
            context.agents.delete_volume(other, key, volume.id, volume.format, pool)
    return {"host_id": other}


def forget_migration(context: Transaction[Any], found: Json) -> None:
    """Give back what the migration held on the side where the guest is not; the other one is home, under the highest epoch given."""
    session, vm_id = context.session, context.params.vm_id
    row = claims.migration_of(session, vm_id)
    if row is None:
        return
    if found["has_moved"]:
        volume_claims.move_home(session, row)
        claims.promote_target(session, vm_id)
    else:
        volume_claims.give_back_copies(session, row)
        claims.give_back(session, vm_id, host_id=row.target_host_id)
    claims.end_migration(session, vm_id)
    vms.update(session, vm_id, host_id=str(found["host_id"]), epoch=int(found["epoch"]))
