"""Replays a history of creations and deletions through the production engine, to see what a policy would have made of it.

`Fleet` is the seam: alike hosts, one request at a time, decided by `engine.decide` on books that know what was placed before and
nothing of what comes. `run` drives it along a trace and counts; `volume bound` is the fewest hosts that could hold what lives at
an instant if vms could be cut up, so no policy gets below a ratio of 1.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trimtab_controller.core.placement.books import Books
from trimtab_controller.core.placement.engine import decide
from trimtab_controller.core.placement.fleet import FleetSnapshot, HostSnapshot
from trimtab_controller.core.placement.lifetimes import Lifetimes, Occupancy
from trimtab_controller.core.placement.policies import Policy, knows_lifetimes, policy_named
from trimtab_controller.core.placement.request import PlacementKind, PlacementRequest
from trimtab_controller.core.placement.verdict import KEPT_HOSTS, Decision


class Fleet:
    """Alike hosts, empty at first. Host indexes are 0-based."""

    def __init__(self, hosts: int, cpu_millis: int, memory_mib: int, policy: str | Policy = "best-fit") -> None:
        """`hosts` hosts of `cpu_millis` thousandths of a cpu and `memory_mib` MiB. InvalidRequest for a policy that is none."""
        self.policy = policy_named(policy) if isinstance(policy, str) else policy
        self.last_decision: Decision | None = None
        """Of the last `place`: why there, or why not."""
        names = [f"host-{index:07}" for index in range(hosts)]
        self._occupancy = Occupancy(hosts, Lifetimes()) if knows_lifetimes(self.policy) else None
        self._books = Books(
            FleetSnapshot.of(
                # The engine counts in base units; a thousandth of a cpu is one here.
                HostSnapshot(host_id=name, name=name, vcpus_limit=cpu_millis, memory_limit_mib=memory_mib)
                for name in names
            ),
            occupancy=self._occupancy,
        )
        self._placed: dict[str, tuple[PlacementRequest, str]] = {}

    def place(self, vm: str, cpu_millis: int, memory_mib: int, batch: str, now: float) -> int | None:
        """Return the host that the vm is given, None where none fits. `batch` names the requests that came together.

        `now`, in seconds, never goes back.
        """
        name = str(vm)
        if self._occupancy is not None:
            self._occupancy.pass_time(now)
        request = PlacementRequest(
            request_id=name,
            vm_id=name,
            vm_name=name,
            project_id="",
            kind=PlacementKind.CREATE,
            vcpus=cpu_millis,
            memory_mib=memory_mib,
            family=batch,
            order=int(now),
        )
        decision = self.last_decision = decide(self._books, request, policy=self.policy, listed_hosts=KEPT_HOSTS)
        host_id = decision.chosen_host_id
        if host_id is None:
            return None
        self._books.claim(request, host_id)
        self._placed[name] = (request, host_id)
        return self._books.fleet.row_of[host_id]

    def remove(self, vm: str, now: float) -> None:
        """Give back what the vm has; nothing for one that was refused."""
        if self._occupancy is not None:
            self._occupancy.pass_time(now)
        placed = self._placed.pop(str(vm), None)
        if placed is not None:
            self._books.release(*placed, is_end=True)


@dataclass(frozen=True, slots=True)
class TraceEvent:
    t_s: float
    is_create: bool
    vm: str
    cpu_millis: int
    memory_mib: int
    batch: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What came of a trace. Times are CPU time of this process; averages are over the time of the trace."""

    placements: int
    refused: int
    peak_hosts: int
    time_avg_hosts: float
    time_avg_bound: float
    time_avg_ratio: float
    """Hosts in use over the volume bound, each averaged over time."""
    peak_ratio: float
    cpu_s: float
    placements_per_cpu_s: float
    decision_us_p50: float
    decision_us_p99: float

    def as_json(self) -> dict[str, Any]:
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(self).items()}


def peak_bound(events: Iterable[TraceEvent], *, cpu_millis: int, memory_mib: int) -> int:
    """Return the volume bound at the trace's peak in whole hosts: how large a pool it needs at least."""
    load, peak = _Load(cpu_millis, memory_mib), 0.0
    for event in events:
        load.count(event, sign=1 if event.is_create else -1)
        peak = max(peak, load.bound)
    return math.ceil(peak)


def run(
    events: Sequence[TraceEvent],
    fleet: Fleet,
    *,
    cpu_millis: int,
    memory_mib: int,
    cpu_time_ns: Callable[[], int],
) -> Report:
    """Drive the fleet along the trace; hosts have `cpu_millis` and `memory_mib`, `cpu_time_ns` reads this process's CPU time."""
    load, in_use, decisions_ns = _Load(cpu_millis, memory_mib), _InUse(), []
    host_of: dict[str, int] = {}
    refused, spent_ns = 0, 0
    for event in events:
        in_use.pass_time(event.t_s, load.bound)
        if event.is_create:
            started = cpu_time_ns()
            host = fleet.place(event.vm, event.cpu_millis, event.memory_mib, event.batch, event.t_s)
            decisions_ns.append(cpu_time_ns() - started)
            if host is None:
                refused += 1
                continue
            host_of[event.vm] = host
            load.count(event, sign=1)
            in_use.add(host, load.bound)
        elif event.vm in host_of:
            started = cpu_time_ns()
            fleet.remove(event.vm, event.t_s)
            spent_ns += cpu_time_ns() - started
            load.count(event, sign=-1)
            in_use.take(host_of.pop(event.vm))
    cpu_s = (sum(decisions_ns) + spent_ns) / 1e9
    percentiles = statistics.quantiles(decisions_ns, n=100) if len(decisions_ns) > 1 else [0.0] * 99
    return Report(
        placements=len(decisions_ns) - refused,
        refused=refused,
        peak_hosts=in_use.peak,
        time_avg_hosts=in_use.mean_hosts,
        time_avg_bound=in_use.mean_bound,
        time_avg_ratio=in_use.mean_hosts / in_use.mean_bound if in_use.mean_bound else 0.0,
        peak_ratio=in_use.peak / in_use.peak_bound if in_use.peak_bound else 0.0,
        cpu_s=cpu_s,
        placements_per_cpu_s=(len(decisions_ns) - refused) / cpu_s if cpu_s else 0.0,
        decision_us_p50=percentiles[49] / 1000,
        decision_us_p99=percentiles[98] / 1000,
    )


class _Load:
    """What lives now."""

    def __init__(self, cpu_millis: int, memory_mib: int) -> None:
        self._host_cpu_millis, self._host_memory_mib = cpu_millis, memory_mib
        self._cpu_millis = self._memory_mib = 0

    def count(self, event: TraceEvent, *, sign: int) -> None:
        self._cpu_millis += sign * event.cpu_millis
        self._memory_mib += sign * event.memory_mib

    @property
    def bound(self) -> float:
        """The hosts' worth of the scarcer resource."""
        return max(self._cpu_millis / self._host_cpu_millis, self._memory_mib / self._host_memory_mib)


class _InUse:
    """Hosts that hold a vm, over time."""

    def __init__(self) -> None:
        self.peak, self.peak_bound = 0, 0.0
        self._vms_on: dict[int, int] = {}
        self._now_s: float | None = None
        self._host_seconds = self._bound_seconds = self._seconds = 0.0

    def pass_time(self, now_s: float, bound: float) -> None:
        if self._now_s is not None:
            passed_s = now_s - self._now_s
            self._seconds += passed_s
            self._host_seconds += passed_s * len(self._vms_on)
            self._bound_seconds += passed_s * bound
        self._now_s = now_s

    def add(self, host: int, bound: float) -> None:
        self._vms_on[host] = self._vms_on.get(host, 0) + 1
        self.peak, self.peak_bound = max(self.peak, len(self._vms_on)), max(self.peak_bound, bound)

    def take(self, host: int) -> None:
        self._vms_on[host] -= 1
        if not self._vms_on[host]:
            del self._vms_on[host]

    @property
    def mean_hosts(self) -> float:
        return self._host_seconds / self._seconds if self._seconds else 0.0

    @property
    def mean_bound(self) -> float:
        return self._bound_seconds / self._seconds if self._seconds else 0.0
