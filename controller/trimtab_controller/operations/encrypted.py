"""Refuses what does not go with encrypted volumes, of which copies in the clear are never made, and finds what others need."""

from collections.abc import Iterable

from trimtab_controller.core.model import Volume
from trimtab_controller.store import describe, lookup, reach, schema, snapshots, vms
from trimtab_controller.store.database import Session
from trimtab_protos.errors import Conflict
from trimtab_protos.messages import DiskFormat


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
    disks, host_id = describe.read_disks(session, vm_id), vms.get(session, vm_id).host_id
    refuse_any(disks.volumes, "backups")
    raw = next((volume for volume in disks.volumes if volume.format is DiskFormat.RAW and not volume.is_read_only), None)
    if host_id and raw is not None and not snapshots.is_known_to(session, host_id, "backup-raw"):
        name = lookup.names(session, schema.host, [host_id]).get(host_id, host_id)
        raise Conflict(
            "agent-too-old", f"the agent of host {name} makes no backups of raw volumes such as {raw.name}; upgrade it first"
        )
    scratch_pool_id(session, vm_id)


def scratch_pool_id(session: Session, vm_id: str) -> str:
    """Return where the vm's host keeps, during a backup, what the guest overwrites of disks that are no files; "" where it has none such.

    Raises Conflict where its host reaches no pool of files.
    """
    disks, host_id = describe.read_disks(session, vm_id), vms.get(session, vm_id).host_id
    blocks = [volume for volume in disks.volumes if disks.pools[volume.pool_id].kind in describe.BLOCK_KINDS]
    if not blocks or not host_id:
        return ""
    found = reach.scratch_pool_id(session, host_id)
    if not found:
        host = lookup.names(session, schema.host, [host_id]).get(host_id, host_id)
        raise Conflict(
            "scratch-pool-missing",
            f"volume {blocks[0].name} is no file, and host {host} reaches no pool of files where what the guest overwrites during the "
            "backup can be kept; make one: `trimtab pool create scratch --path PATH`",
            volume=blocks[0].name,
        )
    return found
