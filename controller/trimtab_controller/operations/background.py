"""Lets a vm's operations and its backup get along, in the transaction that accepts either: see `core.background`."""

from datetime import datetime

from trimtab_controller.core.background import BACKUP, BESIDE_FILL, BESIDE_HALF_WRITTEN, FILL, Beside, beside_backup
from trimtab_controller.store import operations, volumes
from trimtab_controller.store.database import Session
from trimtab_protos.errors import Conflict


def make_room(session: Session, kind: str, *, subject_id: str, subject_name: str, actor: str, now: datetime) -> None:
    """Cancel the subject's backup, or refuse, as the table says. Conflict `operation-in-progress` names the backup."""
    refuse_half_written(session, kind, vm_id=subject_id, vm_name=subject_name)
    if kind not in BESIDE_FILL:
        refuse_filling(session, vm_id=subject_id, vm_name=subject_name, what=kind)
    backup = operations.live_background(session, subject_id, BACKUP)
    if backup is None:
        return
    match beside_backup(kind):
        case Beside.RUNS:
            return
        case Beside.ENDS:
            if not backup.is_cancel_requested:
                operations.request_cancel(session, backup.id, actor=actor, now=now)
        case Beside.REFUSED:
            raise Conflict(
                "operation-in-progress",
                f"{subject_name} is being backed up ({backup.id}) and {kind} cannot run beside that; wait with "
                f"`trimtab op wait {backup.id}` or end it with `trimtab op cancel {backup.id}`",
                operation_id=backup.id,
                operation_kind=backup.kind,
            )


def refuse_filling(session: Session, *, vm_id: str, vm_name: str, what: str) -> None:
    """Raise Conflict `vm-filling` while disks of the vm still read from a backup."""
    filling = volumes.that_fill(session, vm_id=vm_id)
    if not filling:
        return
    live = operations.live_background(session, vm_id, FILL)
    wait = f"wait with `trimtab op wait {live.id}`" if live is not None else "it goes on within a minute"
    raise Conflict(
        "vm-filling",
        f"{what} is refused until the disks of {vm_name} stand alone: {len(filling)} of them still read from backup "
        f"{filling[0].fill_backup_id}, on this host only; {wait}",
        operation_id=live.id if live is not None else "",
        backup_id=filling[0].fill_backup_id,
    )


def refuse_half_written(session: Session, kind: str, *, vm_id: str, vm_name: str) -> None:
    """Raise Conflict `volume-half-restored` where a disk of the vm holds part of a backup and part of what was there before."""
    if kind in BESIDE_HALF_WRITTEN:
        return
    names = volumes.half_written(session, vm_id)
    if names:
        raise Conflict(
            "volume-half-restored",
            f"{kind} is refused: writing a backup over volume {', '.join(names)} of {vm_name} was cut off, and it holds half of either; "
            f"`trimtab backup restore BACKUP --replace {vm_name}` makes it whole, from that backup or any other of this vm",
            volume=names[0],
        )


def admit_backup(session: Session, *, vm_id: str, vm_name: str) -> None:
    """Refuse a backup beside another one, or beside what the table does not let it run with. Conflict `operation-in-progress`."""
    refuse_half_written(session, BACKUP, vm_id=vm_id, vm_name=vm_name)
    refuse_filling(session, vm_id=vm_id, vm_name=vm_name, what="a backup")
    live = operations.live_background(session, vm_id, BACKUP) or operations.live_exclusive(session, vm_id)
    if live is None or (live.kind != BACKUP and beside_backup(live.kind) is Beside.RUNS):
        return
    raise Conflict(
        "operation-in-progress",
        f"{vm_name} is busy: {live.kind} is {live.state.value} ({live.id}); a backup begins when it has ended: "
        f"`trimtab op wait {live.id}`",
        operation_id=live.id,
        operation_kind=live.kind,
    )
