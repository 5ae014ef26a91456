"""What stops a tour of maintenance before its next host: anything that was well when the tour began and is not any more.

The next host would be one less again, at a time when nobody knows yet what happens to the fleet. What was away before the tour began
says nothing new, and a host that somebody holds is meant to be away.
"""

from collections.abc import Collection, Iterable
from datetime import datetime

from trimtab_controller.core.lifecycle import DesiredPower, ObservedState
from trimtab_controller.core.model import Host, Vm


def surprise(silent: Iterable[Host], moved: Iterable[Vm], *, began_at: datetime, held: Collection[str], frozen: str) -> str:
    """Return the first surprise since a tour began, as a sentence without its end; '' where there is none.

    `silent`: hosts that are not heard from; `moved`: the vms that the tour has moved; `held`: ids of the hosts in maintenance;
    `frozen`: why failover stands still.
    """
    for host in silent:
        if host.connectivity_at >= began_at and host.id not in held:
            return f"{host.name} is {host.connectivity.value}"
    if frozen:
        return f"failover is frozen ({frozen})"
    for vm in moved:
        if vm.desired_power is DesiredPower.RUNNING and vm.observed_state is ObservedState.CRASHED:
            return f"vm {vm.name}, which this plan moved, has crashed"
    return ""
