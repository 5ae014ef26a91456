"""Gives vms their class of cpu time and the floor of their balloon: the wish and the operation in one transaction."""

from sqlalchemy.orm import Session

from trimtab_controller.core.model import Operation, Vm
from trimtab_controller.services.vm_cells import check_balloon
from trimtab_controller.services.vm_power import Caller, accept_on_vm
from trimtab_controller.store import lookup, schema
from trimtab_protos.errors import InvalidRequest


def change(session: Session, vm: Vm, caller: Caller, *, balloon_min_mib: int | None, cpu_class: str | None) -> Operation:
    """Accept another floor of the balloon (0: none) and class of cpu time ('': none); None leaves as it is."""
    if balloon_min_mib is None and cpu_class is None:
        raise InvalidRequest("resources-empty", "cpu_class: give cpu_class, balloon_min_mib or both", field="cpu_class")
    if balloon_min_mib:
        has_pinned_pages = bool(vm.wishes.get("hugepages_kib") or vm.wishes.get("devices"))
        check_balloon(
            balloon_min_mib, memory_mib=vm.memory_mib, memory_max_mib=vm.memory_max_mib, has_pinned_pages=has_pinned_pages
        )
    wished = {"balloon_min_mib": balloon_min_mib, "cpu_class": cpu_class}
    lookup.update_version(
        session,
        schema.vm,
        f"vm {vm.name}",
        vm.id,
        expected_version=caller.expected_version,
        **{name: value for name, value in wished.items() if value is not None},
    )
    before = {"before_balloon_min_mib": vm.balloon_min_mib, "before_cpu_class": vm.cpu_class}
    return accept_on_vm(session, vm, caller, "vm.set_resources", before)
