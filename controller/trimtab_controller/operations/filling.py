"""Volumes that still read from a backup: it is served to them wherever their vm is about to be defined."""

from typing import Any

from trimtab_controller.agents.backups import BackupDisk
from trimtab_controller.core.model import Backup, BackupRepo, Volume
from trimtab_controller.operations.saga import Effect
from trimtab_controller.store import backup_repos, backups, describe, volumes
from trimtab_controller.store.database import Session
from trimtab_protos.messages import Direction


def serve(context: Effect[Any], host_id: str, *, epoch: int) -> None:
    """Have the backup served to each disk of the vm that does not stand alone. Idempotent."""
    vm_id = context.params.vm_id
    filling = context.read(lambda session: volumes.that_fill(session, vm_id=vm_id))
    pools = context.read(lambda session: describe.read_disks(session, vm_id)).pools
    for volume in filling:
        backup, repo = context.read(lambda session, volume=volume: _source(session, volume))  # type: ignore[misc]
        opening = context.key(
            subject_id=context.operation.id, part=f"open-{repo.id}-{host_id}-{repo.key_id}", direction=Direction.DO
        )
        context.agents.open_repository(host_id, opening, repo)
        context.agents.serve_backup(
            host_id,
            context.key(subject_id=vm_id, epoch=epoch, part=f"serve-{volume.id}"),
            BackupDisk(repo_id=repo.id, vm_id=backup.vm_id, backup_id=backup.id, disk=volume.fill_disk),
            volume=describe.volume_spec(volume, {}),
            pool=describe.pool_spec(pools[volume.pool_id]),
        )


def _source(session: Session, volume: Volume) -> tuple[Backup, BackupRepo]:
    backup = backups.get(session, volume.fill_backup_id)
    return backup, backup_repos.get(session, backup.repo_id)
