"""Refuses what snapshots and linked clones of a volume forbid, with the command that helps."""

from collections.abc import Sequence

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


def refuse_to_copy(session: Session, volumes: Sequence[Volume], *, vm_name: str) -> None:
    """Raise Conflict where these volumes, all on local pools, cannot be copied to another host: their layers stay where they are.

    A linked clone can: the copy is whole (`core.layers.is_flattened`). What snapshots keep would be left behind, and so would a base.
    """
    ids = [one.id for one in volumes]
    clones = sorted({one.vm_name or one.volume_name for one in snapshots.clones_over(session, ids)} - {vm_name})
    if clones:
        raise Conflict(
            "vm-has-clones",
            f"vm {vm_name} is the base of linked clones on its host's own storage: {', '.join(clones)}; `trimtab vm migrate {clones[0]}` "
            "makes one independent while it runs, `trimtab vm delete` lets go of it after 24 h",
            clones=", ".join(clones),
        )
    layers = snapshots.layer_ids_of(session, ids)
    for volume in volumes:
        if not layers[volume.id]:
            continue
        named = [
            one.name
            for one in (snapshots.of_vm(session, volume.vm_id) if volume.vm_id else ())
            if not one.is_temporary and any(each["volume_id"] == volume.id for each in one.volumes)
        ]
        cure = (
            f"`trimtab vm snapshot delete {vm_name} {named[0]}` merges it while the vm runs" if named else "try again in a moment"
        )
        raise Conflict(
            "layers-are-local",
            f"volume {volume.name} "
            + (
                f"has snapshots on its host's own storage: {', '.join(named)}; "
                if named
                else "has layers that are being merged; "
            )
            + cure,
            snapshots=", ".join(named),
        )
