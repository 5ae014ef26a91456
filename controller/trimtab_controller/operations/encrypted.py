"""Refuses what does not go with encrypted volumes, of which copies in the clear are never made, nor with volumes that are no files."""

from collections.abc import Iterable

from trimtab_controller.core.model import Volume
from trimtab_controller.store import describe
from trimtab_controller.store.database import Session
from trimtab_protos.errors import Conflict
from trimtab_protos.messages import PoolKind


def refuse_any(volumes: Iterable[Volume], what: str) -> None:
    """Raise Conflict where one of the volumes is encrypted: `what` completes "there are no ... of encrypted volumes"."""
    found = next((volume for volume in volumes if volume.is_encrypted), None)
    if found is not None:
        raise Conflict(
            "volume-encrypted",
            f"volume {found.name} is encrypted, and there are no {what} of encrypted volumes: copy what is to be kept inside the guest, "
            f"or leave the volume out with `trimtab vm detach VM --volume {found.name}`",
            volume=found.name,
        )


def refuse_backup(session: Session, vm_id: str) -> None:
    """Raise Conflict where the vm has a disk that no backup reads."""
    disks = describe.read_disks(session, vm_id)
    refuse_any(disks.volumes, "backups")
    for volume in disks.volumes:
        refuse_block(volume, disks.pools[volume.pool_id].kind)


def refuse_block(volume: Volume, kind: PoolKind) -> None:
    if kind in describe.BLOCK_KINDS:
        raise Conflict(
            "pool-without-files",
            f"volume {volume.name} is in a pool of kind {kind.value}, of which no backups are made; back it up inside the guest, or by "
            f"the storage",
            volume=volume.name,
        )
