"""What snapshots and linked clones forbid, each refusal with the command that helps."""

from collections.abc import Sequence

from sqlalchemy.orm import Session

from trimtab_controller.core.model import Vm, Volume
from trimtab_controller.operations.layer_refusals import refuse
from trimtab_controller.store import describe, snapshots
from trimtab_protos.errors import Conflict

__all__ = ["refuse", "refuse_base", "why_local"]


def refuse_base(session: Session, vm: Vm) -> None:
    """Raise Conflict where vms that are there, or may come back, are linked clones of this one."""
    own = [volume.id for volume in describe.volumes_of(session, vm.id)]
    clones = [one for one in snapshots.clones_over(session, own) if one.vm_name != vm.name]
    if clones:
        names = ", ".join(sorted({one.vm_name or one.volume_name for one in clones}))
        raise Conflict(
            "vm-has-clones",
            f"vm {vm.name} is the base of linked clones: {names}; delete those first (they hold on for 24 h, until they are purged)",
            clones=names,
        )


def why_local(session: Session, volumes: Sequence[Volume], *, vm_name: str) -> str:
    """Return why these volumes, all on local pools, cannot be copied to another host, '' where they can: layers stay where they are."""
    layers = snapshots.layer_ids_of(session, [one.id for one in volumes])
    for volume in volumes:
        if volume.parent_volume_id is not None:
            return f"volume {volume.name} is a linked clone of a volume on this host; a vm on a shared pool can move"
        if layers[volume.id]:
            return (
                f"volume {volume.name} has snapshots on its host's own storage; `trimtab vm snapshot list {vm_name}` shows them, "
                f"`trimtab vm snapshot delete` merges them while the vm runs"
            )
    return ""
