"""Which hosts could run guests of an architecture at all. Pure.

Guests are defined for x86_64 so far: no agent reports machine types of another architecture. A host of one that does (`virt-8.2` of an
aarch64 host) is taken at its word here, and by placement.
"""

from collections.abc import Sequence
from dataclasses import dataclass

DEFAULT = "x86_64"
# Machine types of guests that boot as ours do, by their names' beginning.
_MACHINES = {"x86_64": "pc-", "aarch64": "virt-"}


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMachines:
    """What a host said that it can run; '' and nothing where it has not."""

    name: str
    arch: str
    machines: tuple[str, ...]


def can_run(host: HostMachines, arch: str) -> bool:
    prefix = _MACHINES.get(arch)
    return prefix is not None and host.arch == arch and any(machine.startswith(prefix) for machine in host.machines)


def tell(hosts: Sequence[HostMachines]) -> str:
    """Return how many hosts there are of each architecture, as `2 hosts of x86_64, 1 of aarch64`."""
    names = sorted({host.arch or "none told yet" for host in hosts})
    counts = [(name, sum((host.arch or "none told yet") == name for host in hosts)) for name in names]
    return ", ".join(f"{count} of {name}" for name, count in counts) or "none at all"
