"""Says whether vms go on elsewhere when their host dies, and how early: what may be recorded at once, and the operation."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from trimtab_controller.core.model import Operation, Vm
from trimtab_controller.operations.sagas import set_ha
from trimtab_controller.services import start_groups
from trimtab_controller.services.vm_power import Caller, accept_on_vm
from trimtab_controller.store import claims, describe, lookup, schema
from trimtab_protos.errors import Conflict, InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class HaWish:
    """None leaves as it is; a `start_group` of '' takes the vm out of its group."""

    ha: str | None = None
    priority: int | None = None
    start_delay_s: int | None = None
    start_group: str | None = None
    start_order: int | None = None


def change(session: Session, vm: Vm, caller: Caller, wish: HaWish) -> Operation:
    """Accept another `ha` (restart, none), order and delay of the restart.

    Conflict while its disks are being filled from a backup, or where two hosts may hold it. InvalidRequest where nothing is wished, and
    for an order without a group.
    """
    ha = wish.ha
    if wish == HaWish():
        fields = ", ".join(one.name for one in dataclasses.fields(HaWish))
        raise InvalidRequest("ha-empty", f"ha: give one or several of {fields}", field="ha")
    if ha == "restart":
        _refuse_keeping(session, vm)
    group, order = start_groups.place(wish.start_group, wish.start_order, before=(vm.start_group, vm.start_order))
    wished: dict[str, Any] = {
        "priority": wish.priority,
        "start_delay_s": wish.start_delay_s,
        "start_group": group,
        "start_order": order,
    }
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
    return accept_on_vm(session, vm, caller, "vm.set_ha", {"ha": ha or vm.ha, **set_ha.before(vm)})


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
