"""Replays the fleet's own decisions under another policy: the same requests in the same order on the same hosts. Pure.

What is asked is what was asked then, with every rule of the request; what is free is counted from nothing, by what the replay
itself places. So the two histories differ in the policy alone: where each vm went, how many hosts were in use, what found no place.

Left out, since they would not have been the same: live migrations (a vm stays where the policy put it), cordons, hosts that were
lost, and the space of disks. A vm with a disk on a local pool starts again where the replay made that disk.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.core.placement.books import Books
from trimtab_controller.core.placement.engine import decide
from trimtab_controller.core.placement.fleet import FleetSnapshot, HostSnapshot
from trimtab_controller.core.placement.lifetimes import Lifetimes, Occupancy, family_of
from trimtab_controller.core.placement.policies import Policy, knows_lifetimes
from trimtab_controller.core.placement.request import PlacementRequest
from trimtab_controller.core.placement.snapshot import GroupSnapshot
from trimtab_controller.core.placement.verdict import KEPT_HOSTS


@dataclass(frozen=True, slots=True)
class JournalEvent:
    """A decision, or the end of what it gave."""

    at_s: float
    vm_id: str
    request: PlacementRequest | None
    """None: the vm gave its compute back."""
    host_id: str = ""
    """What was chosen then; '' for a refusal."""
    is_before: bool = False
    """It was there when the replay begins: it stays where it was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalReport:
    """What came of it, beside what did then. Hosts in use are averaged over time; times are CPU time of this process."""

    placements: int
    refused: int
    refused_then: int
    same_host: int
    """Of the vms that were placed both times."""
    peak_hosts: int
    peak_hosts_then: int
    time_avg_hosts: float
    time_avg_hosts_then: float
    cpu_s: float
    decision_us_p50: float

    def as_json(self) -> dict[str, Any]:
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(self).items()}


class _Use:
    """Hosts in use over time."""

    __slots__ = ("_area", "_at_s", "_began_s", "_host_of", "_vms", "peak")

    def __init__(self, began_s: float) -> None:
        self._began_s = self._at_s = began_s
        self._host_of: dict[str, str] = {}
        self._vms: Counter[str] = Counter()
        self._area, self.peak = 0.0, 0

    def put(self, vm_id: str, host_id: str, at_s: float) -> None:
        """Say that the vm is there from now on; '' is nowhere."""
        self._area += len(self._vms) * (at_s - self._at_s)
        self._at_s = at_s
        old = self._host_of.pop(vm_id, "")
        if old:
            self._vms[old] -= 1
            if not self._vms[old]:
                del self._vms[old]
        if host_id:
            self._host_of[vm_id] = host_id
            self._vms[host_id] += 1
        self.peak = max(self.peak, len(self._vms))

    def mean(self, until_s: float) -> float:
        whole = until_s - self._began_s
        return (self._area + len(self._vms) * (until_s - self._at_s)) / whole if whole > 0 else float(len(self._vms))


def replay_journal(
    fleet: FleetSnapshot,
    events: Sequence[JournalEvent],
    *,
    policy: Policy,
    until_s: float,
    cpu_time_ns: Callable[[], int],
) -> JournalReport:
    """Drive the policy along the events, which are in order of time, on this fleet's hosts as if nothing were claimed."""
    run = _Run(emptied(fleet), policy, events[0].at_s if events else until_s, cpu_time_ns)
    for event in events:
        run.take(event)
    spent_ns = run.decisions_ns
    return JournalReport(
        placements=run.placements,
        refused=run.refused,
        refused_then=run.refused_then,
        same_host=run.same_host,
        peak_hosts=run.now.peak,
        peak_hosts_then=run.then.peak,
        time_avg_hosts=run.now.mean(until_s),
        time_avg_hosts_then=run.then.mean(until_s),
        cpu_s=sum(spent_ns) / 1e9,
        decision_us_p50=statistics.median(spent_ns) / 1000 if spent_ns else 0.0,
    )


def emptied(fleet: FleetSnapshot) -> FleetSnapshot:
    """Return the hosts as if they were up, open, and held nothing."""
    groups = [GroupSnapshot(group_id=group_id) for group_id in fleet.members]
    return FleetSnapshot.of([_emptied(host) for host in fleet.hosts], fleet.pools.values(), groups=groups)


def _emptied(host: HostSnapshot) -> HostSnapshot:
    return replace(
        host,
        vcpus_claimed=0,
        memory_claimed_mib=0,
        is_cordoned=False,
        connectivity=HostConnectivity.UP,
        cells=tuple(cell.emptied() for cell in host.cells),
        devices={name: replace(stock, claimed=0) for name, stock in host.devices.items()},
        resources={name: replace(stock, claimed=0) for name, stock in host.resources.items()},
    )


class _Run:
    def __init__(self, fleet: FleetSnapshot, policy: Policy, began_s: float, cpu_time_ns: Callable[[], int]) -> None:
        self._fleet, self._policy, self._cpu_time_ns = fleet, policy, cpu_time_ns
        self._occupancy = Occupancy(len(fleet), Lifetimes()) if knows_lifetimes(policy) else None
        self._books = Books(fleet, occupancy=self._occupancy)
        self._held: dict[str, tuple[PlacementRequest, str]] = {}
        # Where the replay made each vm: its local disks are there.
        self._home_of: dict[str, str] = {}
        self.now, self.then = _Use(began_s), _Use(began_s)
        self.decisions_ns: list[int] = []
        self.placements = self.refused = self.refused_then = self.same_host = 0

    def take(self, event: JournalEvent) -> None:
        if self._occupancy is not None:
            self._occupancy.pass_time(event.at_s)
        self._give_back(event)
        if event.request is None:
            self.then.put(event.vm_id, "", event.at_s)
            return
        if event.is_before:
            self._keep(event, event.request)
            return
        self.refused_then += not event.host_id
        self.then.put(event.vm_id, event.host_id, event.at_s)
        request = self._asked(event.request)
        began_ns = self._cpu_time_ns()
        chosen = decide(self._books, request, policy=self._policy, listed_hosts=KEPT_HOSTS).chosen_host_id
        self.decisions_ns.append(self._cpu_time_ns() - began_ns)
        if chosen is None:
            self.refused += 1
            return
        self.placements += 1
        self.same_host += chosen == event.host_id
        if event.host_id:  # else it was told no and did not run: it would have, for nobody knows how long
            self._hold(event, request, chosen)

    def _keep(self, event: JournalEvent, request: PlacementRequest) -> None:
        self.then.put(event.vm_id, event.host_id, event.at_s)
        asked = replace(self._asked(request), required_host_id=event.host_id)
        if decide(self._books, asked, policy=self._policy, listed_hosts=KEPT_HOSTS).chosen_host_id is not None:
            self._hold(event, asked, event.host_id)

    def _hold(self, event: JournalEvent, request: PlacementRequest, host_id: str) -> None:
        self._books.claim(request, host_id)
        self._held[event.vm_id] = (request, host_id)
        self._home_of[event.vm_id] = host_id
        self.now.put(event.vm_id, host_id, event.at_s)

    def _give_back(self, event: JournalEvent) -> None:
        held = self._held.pop(event.vm_id, None)
        if held is not None:
            self._books.release(*held, is_end=event.request is None)
            self.now.put(event.vm_id, "", event.at_s)

    def _asked(self, request: PlacementRequest) -> PlacementRequest:
        """Return the request without what the other history put into it."""
        home = self._home_of.get(request.vm_id, "")
        is_bound = any(
            disk.host_id and disk.pool_id in self._fleet.pools and not self._fleet.pools[disk.pool_id].is_shared
            for disk in request.disks
        )
        return replace(
            request,
            disks=tuple(replace(disk, host_id="", is_claimed=True) for disk in request.disks),
            required_host_id=home if is_bound else request.required_host_id,
            preferred_host_id=home if request.preferred_host_id else "",
            excluded_host_ids=(),
            held_cells=(),
            family=family_of(request.project_id, request.vm_name),
        )


def in_order(events: Iterable[JournalEvent]) -> list[JournalEvent]:
    """Return the events by time; what is given back at an instant comes before what is asked for then."""
    return sorted(events, key=lambda event: (not event.is_before, event.at_s, event.request is not None, event.vm_id))
