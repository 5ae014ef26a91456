"""Refuses what snapshots and linked clones of a volume forbid, with the command that helps."""

from trimtab_controller.core.model import Volume
from trimtab_controller.store import lookup, schema, snapshots
from trimtab_controller.store.database import Session
from trimtab_protos.errors import Conflict


def refuse(session: Session, volume: Volume, *, verb: str) -> None:
    """Raise Conflict where the volume has snapshots or clones: `verb` completes "cannot be …"."""
    names = [
        one.name
        for one in (snapshots.of_vm(session, volume.vm_id) if volume.vm_id else ())
        if any(each["volume_id"] == volume.id for each in one.volumes)
    ]
    if names:
        vm = lookup.names(session, schema.vm, [volume.vm_id]).get(volume.vm_id or "", "")
        raise Conflict(
            "volume-has-snapshots",
            f"volume {volume.name} is kept by {'snapshots' if len(names) > 1 else 'snapshot'} {', '.join(names)} and cannot be "
            f"{verb}; `trimtab vm snapshot delete {vm} {names[0]}` first",
            snapshots=", ".join(names),
        )
    clones = snapshots.clones_over(session, [volume.id])
    if clones:
        raise Conflict(
            "volume-has-clones",
            f"volume {volume.name} is the base of linked clones and cannot be {verb}; see `trimtab vm get {clones[0].vm_name}`",
        )
