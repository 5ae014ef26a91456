"""What snapshots and linked clones forbid, each refusal with the command that helps."""

from sqlalchemy.orm import Session

from trimtab_controller.core.model import Vm
from trimtab_controller.operations.layer_refusals import refuse, refuse_to_copy
from trimtab_controller.store import describe, snapshots
from trimtab_protos.errors import Conflict

__all__ = ["refuse", "refuse_base", "refuse_to_copy"]


def refuse_base(session: Session, vm: Vm) -> None:
    """Raise Conflict where vms that are there, or may come back, are linked clones of this one."""
    own = [volume.id for volume in describe.volumes_of(session, vm.id)]
    clones = [one for one in snapshots.clones_over(session, own) if one.vm_name != vm.name]
    if clones:
        names = ", ".join(sorted({one.vm_name or one.volume_name for one in clones}))
        raise Conflict(
            "vm-has-clones",
            f"vm {vm.name} is the base of linked clones: {names}; delete those first (they hold on for 24 h, or until `trimtab vm purge`)",
            clones=names,
        )
