"""When each step of a plan runs: as many at once as the migration slots of hosts and networks allow.

The forecast comes from rates measured on migrations that were done. It is a list schedule: each step, in order, at the first moment
at which the steps before it (`after`) are done and a slot is free at both ends and on the network.
"""

import heapq
import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from trimtab_controller.core.planning.plan import Step, StepKind

# What a migration on a quiet 10 Gbit/s network reaches with TLS; used until a fleet has measured its own.
DEFAULT_BYTES_PER_S = 400 * (1 << 20)
# What a copy between two storages of a host reaches.
DISK_BYTES_PER_S = 150 * (1 << 20)
# Preparing, switching over and settling, whatever the size.
DEFAULT_OVERHEAD_S = 5.0
# Stop, release, place, start; a guest that ignores its power button is not in it.
RESTART_S = 60.0
# Pages that are written while they are sent go again.
_RESENT = 1.25


NETWORK_LABEL = "migration-network"
# What is commonly one link's subnet; where it is not, the label says so.
_PREFIXES = {4: 24, 6: 64}


def migration_network(address: str, labels: Mapping[str, str]) -> str:
    """Return the name of the network over which a host sends and takes vms: its label's, else its migration address's subnet.

    '' is the one of all hosts of which nothing is known.
    """
    named = labels.get(NETWORK_LABEL, "")
    if named:
        return named
    try:
        number = ipaddress.ip_address(address)
    except ValueError:
        return ""
    return "" if number.is_loopback else str(ipaddress.ip_network((number, _PREFIXES[number.version]), strict=False))


@dataclass(frozen=True, slots=True, kw_only=True)
class Slots:
    """How many moves may be under way at once."""

    per_host: int = 2
    """At either end: more share one link, and each then takes longer while its guest runs throttled."""
    per_network: int = 8
    network_of: Mapping[str, str] = field(default_factory=dict)
    """The migration network of each host (`migration_network`); hosts that are not named share one."""

    def keys(self, step: Step) -> tuple[str, ...]:
        """Return the slots that a step takes, each once."""
        return self.between(step.host_id, step.target_host_id)

    def between(self, *hosts: str) -> tuple[str, ...]:
        """Return the slots that a move between these hosts takes; one between two networks takes one of each."""
        networks = [self.network_of.get(host_id, "") for host_id in hosts if host_id]
        return tuple(dict.fromkeys([*(f"host:{one}" for one in hosts if one), *(f"network:{one}" for one in networks)]))

    def count(self, key: str) -> int:
        return self.per_host if key.startswith("host:") else self.per_network


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    bytes_per_s: float = DEFAULT_BYTES_PER_S
    overhead_s: float = DEFAULT_OVERHEAD_S
    is_measured: bool = False

    @classmethod
    def measured(cls, samples: Sequence[tuple[int, float]]) -> "Rates":
        """Return the rates of past migrations, given as (bytes, seconds); the defaults where there are fewer than three."""
        usable = [(size, seconds) for size, seconds in samples if size > 0 and seconds > 0]
        if len(usable) < 3:
            return cls()
        overhead_s = min(DEFAULT_OVERHEAD_S, *(seconds for _, seconds in usable))
        rates = [size / max(0.1, seconds - overhead_s) for size, seconds in usable]
        return cls(bytes_per_s=median(rates), overhead_s=overhead_s, is_measured=True)

    def duration_s(self, step: Step) -> float:
        if step.kind is StepKind.MOVE_VOLUME:
            return DEFAULT_OVERHEAD_S + step.copied_bytes / DISK_BYTES_PER_S
        if not step.moves_vm:
            return 0.0
        if step.kind is not StepKind.MIGRATE:
            return RESTART_S
        resent = _RESENT if not self.is_measured else 1.0
        return self.overhead_s + step.copied_bytes * resent / self.bytes_per_s


def timed(steps: Sequence[Step], slots: Slots, rates: Rates) -> tuple[tuple[Step, ...], float]:
    """Return the steps with their forecast times, and when the last one ends, in seconds."""
    free_at: dict[str, list[float]] = {}
    ends: list[float] = []
    found = []
    for step in steps:
        ready_s = max((ends[position] for position in step.after), default=0.0)
        heaps = [free_at.setdefault(key, [0.0] * slots.count(key)) for key in slots.keys(step)] if step.takes_slot else []
        starts_s = max([ready_s, *(heap[0] for heap in heaps)])
        ends_s = starts_s + rates.duration_s(step)
        for heap in heaps:
            heapq.heapreplace(heap, ends_s)
        ends.append(ends_s)
        found.append(replace(step, starts_s=round(starts_s, 1), ends_s=round(ends_s, 1)))
    return tuple(found), round(max(ends, default=0.0), 1)
