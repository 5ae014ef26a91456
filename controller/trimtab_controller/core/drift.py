"""What to do about a vm whose observed state is not the desired one and that nobody is working on. Pure."""

from dataclasses import dataclass
from enum import StrEnum

from trimtab_controller.core.lifecycle import DesiredPower, ObservedState
from trimtab_controller.core.model import Vm
from trimtab_protos.messages import StateReason


class Cure(StrEnum):
    """What the loop may do by itself; everything else is shown and left to the operator."""

    NONE = "none"
    # The guest was paused by an I/O error and its pool has room again.
    RESUME = "resume"


@dataclass(frozen=True, slots=True)
class Finding:
    problem: str
    cure: Cure = Cure.NONE


_GONE = frozenset({ObservedState.STOPPED, ObservedState.ABSENT, ObservedState.CRASHED})


def judge(vm: Vm, *, host_name: str, has_space: bool) -> Finding | None:
    """Return what is wrong and what may be done; None where all is as wished.

    A guest that is gone is never restarted here: whether it may start elsewhere is failover's to decide, and one that its owner
    powered off from the inside, or an operator destroyed by hand, was ended on purpose.
    """
    if vm.observed_state is ObservedState.UNKNOWN or vm.desired_power is DesiredPower.DELETED:
        return None
    if vm.desired_power is DesiredPower.RUNNING:
        return _of_running(vm, host_name, has_space)
    if vm.desired_power is DesiredPower.STOPPED and vm.observed_state in {ObservedState.RUNNING, ObservedState.PAUSED}:
        return Finding(
            f"it runs on {host_name} although it should be stopped; `trimtab vm stop {vm.name}` or `vm start {vm.name}`"
        )
    return None


def _of_running(vm: Vm, host_name: str, has_space: bool) -> Finding | None:
    start = f"`trimtab vm start {vm.name}` starts it again"
    if vm.observed_state in _GONE:
        match vm.observed_reason:
            case StateReason.DESTROYED:
                return Finding(f"it was destroyed on {host_name} from outside Trimtab; {start}")
            case StateReason.GUEST_SHUTDOWN:
                return Finding(f"the guest shut itself down on {host_name}; {start}")
            case StateReason.CRASHED | StateReason.FAILED:
                return Finding(f"the guest crashed on {host_name}; see `trimtab vm console {vm.name} --log`; {start}")
            case StateReason.HOST_BOOTED:
                return Finding(f"{host_name} restarted and the guest with it ended; {start}")
            case _:
                return Finding(f"the guest vanished from {host_name}; {start}")
    if vm.observed_state is ObservedState.PAUSED:
        if vm.observed_reason == StateReason.IO_ERROR:
            cure = Cure.RESUME if has_space else Cure.NONE
            return Finding(
                f"paused by an I/O error on {host_name}: its pool is full or failing; it resumes when there is room", cure
            )
        return Finding(f"it is paused on {host_name} although it should run; `trimtab vm resume {vm.name}`")
    return None
