"""Fleets of simulated hosts: many agents in one process, with a simulated hypervisor, against a real control plane."""

from trimtab_lab.errors import LabError
from trimtab_lab.hosts import Lab


def start_simulated_hosts(lab: Lab, *, count: int) -> None:
    raise LabError(
        f"lab {lab.spec.name}: {count} simulated hosts asked for, but this release cannot start simulated agents yet; "
        "use --hosts for real ones"
    )
