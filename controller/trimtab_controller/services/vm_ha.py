"""Says whether vms go on elsewhere when their host dies, and how early: what may be recorded at once, and the operation."""

from typing import Any

from sqlalchemy.orm import Session

from trimtab_controller.core.model import Operation, Vm
from trimtab_controller.services.vm_power import Caller, accept_on_vm
from trimtab_controller.store import claims, describe, lookup, schema
from trimtab_protos.errors import Conflict, InvalidRequest


def change(
    session: Session, vm: Vm, caller: Caller, *, ha: str | None, priority: int | None, start_delay_s: int | None
) -> Operation:
    """Accept another `ha` (restart, none), order and delay of the restart; None leaves as it is.

    Conflict while its disks are being filled from a backup, or where two hosts may hold it.
    """
    if ha is None and priority is None and start_delay_s is None:
        raise InvalidRequest("ha-empty", "ha: give ha, priority, start_delay_s or several of them", field="ha")
    if ha == "restart":
        _refuse_keeping(session, vm)
    wished: dict[str, Any] = {"priority": priority, "start_delay_s": start_delay_s}
    # That it is kept is recorded last: the host's warden has to know before.
    wished |= {"ha": ha} if ha == "none" else {}
    lookup.update_version(
        session,
        schema.vm,
        f"vm {vm.name}",
        vm.id,
        expected_version=caller.expected_version,
        **{name: value for name, value in wished.items() if value is not None},
    )
    before = {"before_ha": vm.ha, "before_priority": vm.priority, "before_start_delay_s": vm.start_delay_s}
    return accept_on_vm(session, vm, caller, "vm.set_ha", {"ha": ha or vm.ha, **before})


def _refuse_keeping(session: Session, vm: Vm) -> None:
    if vm.has_tpm:
        raise InvalidRequest(
            "tpm-keeps-home",
            f"ha: vm {vm.name} has a TPM, whose state is on its host only, so it cannot restart elsewhere; leave it at `--ha none`",
            field="ha",
        )
    if any(one.fill_backup_id for one in describe.volumes_of(session, vm.id)):
        raise Conflict(
            "vm-filling",
            f"vm {vm.name} still runs on a backup, which only its host serves; it gets its ha once its disks are whole: "
            "`trimtab op list --live --filter kind=vm.fill`",
            vm=vm.name,
        )
    if claims.migration_of(session, vm.id) is not None:
        raise Conflict(
            "vm-moving",
            f"a migration of vm {vm.name} is not settled: two hosts may hold it; see `trimtab vm get {vm.name}`",
            vm=vm.name,
        )
