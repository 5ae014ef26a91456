"""The transaction that takes a vm from holders that are proven gone: failover's, and that of disks that came back from a backup."""

from datetime import datetime

from trimtab_controller.core.model import Actor, Operation, Vm
from trimtab_controller.operations.accept import accept
from trimtab_controller.operations.superseding import supersede
from trimtab_controller.store import claims, vms, volume_claims
from trimtab_controller.store.database import Session


def recover(session: Session, vm: Vm, *, because: str, now: datetime, actor: Actor, to_host_id: str = "") -> Operation:
    """Supersede the vm's live operation, end its migration, raise its epoch, give its claims back, and accept vm.recover.

    `to_host_id`: only there.

    The caller has proof that no holder can write. From the commit on, commands of any older epoch or turn are refused.
    """
    supersede(session, vm.id, by="its recovery", now=now)
    row = claims.migration_of(session, vm.id)
    if row is not None:
        volume_claims.give_back_copies(session, row)
        claims.end_migration(session, vm.id)
    claims.give_back(session, vm.id)
    epoch = max(vm.epoch, row.target_epoch if row is not None else 0) + 1
    vms.update(session, vm.id, epoch=epoch, problem=f"it is being started elsewhere: {because}"[:1000])
    return accept(
        session,
        "vm.recover",
        subject_id=vm.id,
        subject_name=vm.name,
        project_id=vm.project_id,
        params={"vm_id": vm.id, "because": because, "previous_host_id": vm.host_id, "to_host_id": to_host_id},
        actor=actor,
        priority=1000 + vm.priority,
        now=now,
    )
