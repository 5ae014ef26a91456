"""What to do about a vm whose observed state is not the desired one and that nobody is working on. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from trimtab_controller.core.lifecycle import DesiredPower, ObservedState
from trimtab_controller.core.model import Vm
from trimtab_protos.messages import StateReason

RUNS_TWICE = "stray"
"""The vm's `attention` while a second domain of it is active: nobody starts it, failover neither, until that one is gone."""


class Cure(StrEnum):
    """What the loop may do by itself, by the operation's kind; everything else is shown and left to the operator."""

    NONE = "none"
    # The guest was paused by an I/O error and its pool has room again.
    RESUME = "vm.resume"
    # Its definition is gone from its home, which answers and holds its claim; vm.redefine proves the rest.
    DEFINE = "vm.redefine"


@dataclass(frozen=True, slots=True)
class Finding:
    problem: str
    cure: Cure = Cure.NONE
    # Hosts from which a definition that does not run may be removed: the vm is proven to be at its home.
    leftovers: tuple[str, ...] = ()
    runs_twice: bool = False


_GONE = frozenset({ObservedState.STOPPED, ObservedState.ABSENT, ObservedState.CRASHED})
_PROVES_NOTHING = frozenset({ObservedState.UNKNOWN, ObservedState.ABSENT, ObservedState.INCOMING})


@dataclass(frozen=True, slots=True)
class Stray:
    """A domain of the vm on a host that holds nothing of it."""

    host_name: str
    # Whether its guest has memory there: it may write to the vm's disks.
    is_active: bool
    host_id: str = ""
    epoch: int = 0


def judge(
    vm: Vm,
    *,
    host_name: str,
    has_space: bool,
    is_host_up: bool = True,
    is_transient: bool = False,
    is_filling: bool = False,
    strays: Sequence[Stray] = (),
) -> Finding | None:
    """Return what is wrong and what may be done; None where all is as wished. `is_transient`: it runs and has no definition.
    `is_filling`: it runs on a backup, which its disks are being filled from.

    A second domain goes before everything else: while one is active, nothing is done by itself, since two guests on one disk
    destroy it.
    """
    active = [stray for stray in strays if stray.is_active]
    if active:
        return Finding(_runs_twice(vm, host_name, active), runs_twice=True)
    at_home = _of_its_host(vm, host_name, has_space, is_filling=is_filling) or (_undefined(host_name) if is_transient else None)
    if at_home is not None and at_home.cure is Cure.DEFINE and (not is_host_up or vm.attention):
        at_home = replace(at_home, cure=Cure.NONE)
    if not strays:
        return at_home
    idle = ", ".join(stray.host_name for stray in strays)
    leftovers = tuple(stray.host_id for stray in strays if _may_go(vm, stray, is_host_up=is_host_up))
    left = f"a definition of it that is not running was left behind on {idle}; " + (
        "it is removed there" if len(leftovers) == len(strays) else "`virsh undefine` removes it there"
    )
    if at_home is None:
        return Finding(left, leftovers=leftovers)
    return replace(at_home, problem=f"{at_home.problem}; {left}", leftovers=leftovers)


def _runs_twice(vm: Vm, host_name: str, active: Sequence[Stray]) -> str:
    """Say what was seen where, under which epoch, and what to do: which guest is right is not for a loop to guess."""
    seen = ", ".join(f"{stray.host_name} (epoch {stray.epoch})" for stray in active)
    return (
        f"it also runs on {seen}, where it does not belong; at home on {host_name} (epoch {vm.epoch}) it is "
        f"{vm.observed_state.value}: two guests may write to its disks. Find out which one is right before you touch either, then "
        f"destroy the other there with `virsh destroy`; until then nothing starts it"
    )


def _may_go(vm: Vm, stray: Stray, *, is_host_up: bool) -> bool:
    """Tell whether an idle leftover may be removed: its home answers and has the domain, under no lower an epoch.

    A higher one means that the database is older than its hosts (it was restored): then that definition may be the right one.
    """
    is_proven_at_home = is_host_up and vm.observed_host_id == vm.host_id and vm.observed_state not in _PROVES_NOTHING
    return is_proven_at_home and stray.epoch <= vm.epoch and not vm.attention


def _of_its_host(vm: Vm, host_name: str, has_space: bool, *, is_filling: bool) -> Finding | None:
    """Return what is wrong on the host that the vm is on.

    A guest that is gone is never restarted here: whether it may start elsewhere is failover's to decide, and one that its owner
    powered off from the inside, or an operator destroyed by hand, was ended on purpose.
    """
    if vm.observed_state is ObservedState.UNKNOWN or vm.desired_power is DesiredPower.DELETED:
        return None
    if vm.desired_power is DesiredPower.RUNNING:
        return _of_running(vm, host_name, has_space, is_filling=is_filling)
    if vm.desired_power is DesiredPower.STOPPED and vm.observed_state in {ObservedState.RUNNING, ObservedState.PAUSED}:
        return Finding(
            f"it runs on {host_name} although it should be stopped; `trimtab vm stop {vm.name}` or `vm start {vm.name}`"
        )
    is_at_home = bool(vm.host_id) and vm.observed_host_id == vm.host_id
    if vm.desired_power is DesiredPower.STOPPED and vm.observed_state is ObservedState.ABSENT and is_at_home:
        return _undefined(host_name)
    return None


def _undefined(host_name: str) -> Finding:
    return Finding(
        f"its definition vanished from {host_name}; it is put back there while its disks are there, and nothing is started",
        Cure.DEFINE,
    )


def _of_running(vm: Vm, host_name: str, has_space: bool, *, is_filling: bool) -> Finding | None:
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
            if is_filling and has_space:
                # Its agent has the backup served again and lets it go on; this is for one whose agent could not tell why it stood.
                return Finding(
                    f"paused on {host_name}: nothing serves the backup that it runs on; it goes on when it is", Cure.RESUME
                )
            cure = Cure.RESUME if has_space else Cure.NONE
            return Finding(
                f"paused by an I/O error on {host_name}: its pool is full or failing; it resumes when there is room", cure
            )
        return Finding(f"it is paused on {host_name} although it should run; `trimtab vm resume {vm.name}`")
    return None
