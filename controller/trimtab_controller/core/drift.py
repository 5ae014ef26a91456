"""What to do about a vm whose observed state is not the desired one and that nobody is working on. Pure."""

from collections.abc import Sequence
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


@dataclass(frozen=True, slots=True)
class Stray:
    """A domain of the vm on a host that holds nothing of it."""

    host_name: str
    # Whether its guest has memory there: it may write to the vm's disks.
    is_active: bool


def judge(vm: Vm, *, host_name: str, has_space: bool, strays: Sequence[Stray] = ()) -> Finding | None:
    """Return what is wrong and what may be done; None where all is as wished.

    A second domain goes before everything else: while one is active, nothing is done by itself, since two guests on one disk
    destroy it.
    """
    if not strays:
        return _of_its_host(vm, host_name, has_space)
    active = [stray.host_name for stray in strays if stray.is_active]
    if active:
        return Finding(
            f"it also runs on {', '.join(active)}, where it does not belong: two guests may write to its disks. "
            f"Find out which one is right before you touch either, then destroy the other there with `virsh destroy`"
        )
    idle = ", ".join(stray.host_name for stray in strays)
    rest = _of_its_host(vm, host_name, has_space)
    left = f"a definition of it that is not running was left behind on {idle}; `virsh undefine` removes it there"
    return Finding(f"{rest.problem}; {left}", rest.cure) if rest else Finding(left)


def _of_its_host(vm: Vm, host_name: str, has_space: bool) -> Finding | None:
    """Return what is wrong on the host that the vm is on.

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
            case _ if vm.observed_state is ObservedState.ABSENT:
                return Finding(
                    f"the guest and its definition vanished from {host_name}: look whether its disk was lost; "
                    f"{start} if its volumes are still there"
                )
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
