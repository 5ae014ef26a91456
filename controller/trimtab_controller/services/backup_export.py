"""Disks of backups as files: who may read them from which host."""

from datetime import datetime

from sqlalchemy.orm import Session

from trimtab_controller.agents.backups import BackupDisk
from trimtab_controller.core.model import Actor, Operation, Project
from trimtab_controller.operations import backup_steps
from trimtab_controller.operations.accept import accept
from trimtab_controller.services import backups as backup_service
from trimtab_controller.services.backup_restore import disk_sizes
from trimtab_controller.store import operations
from trimtab_protos.errors import Conflict, NotFound

KIND = "backup.export"


def export(session: Session, backup_id: str, *, project: Project, actor: Actor, now: datetime) -> Operation:
    """Accept that a host hands out the backup's disks. Conflict where it is damaged or its repository cannot be used."""
    backup = backup_service.listed(session, backup_id, project=project)
    if backup.state == "damaged":
        raise Conflict("backup-damaged", f"backup {backup.id} cannot be read whole: {backup.problem}; take another one")
    backup_steps.require_ready(session, backup.repo_id)
    return accept(
        session,
        KIND,
        subject_id=backup.id,
        subject_name=backup.id,
        project_id=backup.project_id,
        params={"backup_id": backup.id, "repo_id": backup.repo_id},
        actor=actor,
        now=now,
    )


def place_of(session: Session, backup_id: str, disk: str, *, project: Project) -> tuple[str, BackupDisk]:
    """Return the host that hands the disk out, and the disk. Conflict `backup-not-exported` where none was asked to."""
    backup = backup_service.listed(session, backup_id, project=project)
    sizes = disk_sizes(backup)
    wanted = disk or min(sizes, default="")
    if wanted not in sizes:
        raise NotFound(
            "disk-not-found", f"disk: backup {backup.id} has no disk {disk}; it has {', '.join(sorted(sizes))}", field="disk"
        )
    ended = operations.page(session, limit=1, kind=KIND, subject_id=backup.id, state="done")
    if not ended or ended[0].result is None:
        raise Conflict(
            "backup-not-exported",
            f"no host hands out backup {backup.id} now: `trimtab backup export {backup.id} FILE` asks one to",
        )
    place = BackupDisk(repo_id=backup.repo_id, vm_id=backup.vm_id, backup_id=backup.id, disk=wanted)
    return str(ended[0].result["host_id"]), place
