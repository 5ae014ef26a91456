"""Changes a vm's shape: the wish, its quota and the operation in one transaction."""

from sqlalchemy.orm import Session

from trimtab_controller.core.model import Operation, Vm
from trimtab_controller.core.resize import OFF, Beyond, When, beyond_of, charged_for, left_of, next_of, shape_of, wanted_of
from trimtab_controller.operations.accept import accept
from trimtab_controller.services import quota, vm_cells
from trimtab_controller.services.vm_power import Caller
from trimtab_controller.store import lookup, schema
from trimtab_protos.errors import InvalidRequest


def resize(session: Session, vm: Vm, caller: Caller, *, vcpus: int, memory_mib: int, when: When) -> Operation:
    """Accept other vcpus and memory (0: as they are). InvalidRequest beyond what a running guest can be given."""
    if not (vcpus or memory_mib):
        raise InvalidRequest("resize-empty", "vcpus: give vcpus, memory_mib or both", field="vcpus")
    wanted = wanted_of(vm, vcpus=vcpus, memory_mib=memory_mib)
    vm_cells.check_resize(vm, wanted, when)
    if vm.observed_state not in OFF and when is not When.NEXT_STOP:
        beyond = beyond_of(vm, wanted)
        if beyond is not None:
            raise _too_much(vm, beyond)
    elif when is When.LIVE:
        raise InvalidRequest(
            "vm-is-off",
            f"when: vm {vm.name} is {vm.observed_state.value}; leave `live` out and it is resized at once",
            field="when",
        )
    before = next_of(vm)
    left = left_of(wanted, shape_of(vm))
    more = shape_of(vm).at_least(left).minus(charged_for(vm))
    # A smaller wish than before frees quota at once; a greater one takes it within its bounds.
    grown = quota.Charge(vcpus=max(more.vcpus, 0), memory_mib=max(more.memory_mib, 0))
    quota.charge(session, vm.project_id, grown)
    lookup.update_version(
        session,
        schema.vm,
        f"vm {vm.name}",
        vm.id,
        expected_version=caller.expected_version,
        next_vcpus=left.vcpus,
        next_memory_mib=left.memory_mib,
    )
    quota.give_back(session, vm.project_id, vcpus=max(-more.vcpus, 0), memory_mib=max(-more.memory_mib, 0))
    return accept(
        session,
        "vm.resize",
        subject_id=vm.id,
        subject_name=vm.name,
        project_id=vm.project_id,
        params={
            "vm_id": vm.id,
            "vcpus": wanted.vcpus,
            "memory_mib": wanted.memory_mib,
            "when": when.value,
            "before_vcpus": before.vcpus,
            "before_memory_mib": before.memory_mib,
        },
        actor=caller.actor,
        now=caller.now,
    )


def _too_much(vm: Vm, beyond: Beyond) -> InvalidRequest:
    unit = " MiB" if beyond.field == "memory_mib" else ""
    return InvalidRequest(
        "beyond-maximum",
        f"{beyond.field}: vm {vm.name} can be given {beyond.bound}{unit} at most while it runs, not {beyond.asked}{unit}; "
        f"`trimtab vm resize {vm.name} --at next-stop` gives it more when it is stopped",
        field=beyond.field,
        bound=beyond.bound,
    )
