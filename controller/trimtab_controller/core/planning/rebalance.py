"""Evens out predicted load with as few moves as pay for themselves, and knows when to leave things alone.

What keeps it calm: nothing starts below a spread (`start_spread`) while no host runs hot; a move must be worth more than its cost;
a vm that moved rests; an hour has a budget; the state after each move is what the next is judged on. A plan ends where no single
move is worth its cost, so that the state it leaves gives no second plan.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

import numpy as np

from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.core.placement.fleet import MEMORY, VCPUS, Floats
from trimtab_controller.core.planning.balance import Balance, BalanceInput, Shift
from trimtab_controller.core.planning.classes import Classes
from trimtab_controller.core.planning.drain import Terms, finished
from trimtab_controller.core.planning.estate import Estate, VmSnapshot
from trimtab_controller.core.planning.obstacles import way_out
from trimtab_controller.core.planning.plan import Plan, PlanKind, StepKind
from trimtab_controller.core.planning.what_if import WhatIf, shortened


class RebalanceMode(StrEnum):
    OFF = "off"
    # Plans are made and shown; an operator applies them.
    ADVISE = "advise"
    AUTOMATIC = "automatic"


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalancePolicy:
    mode: RebalanceMode = RebalanceMode.ADVISE
    start_spread: float = 0.05
    """The standard deviation of the hosts' predicted CPU shares below which nothing is moved."""
    hot_share: float = 0.85
    """A host above this share is a reason to start whatever the spread; no move fills a host beyond it."""
    least_worth: float = 0.01
    """What a move must take off the deviation, in shares of one host, after its cost."""
    cost_per_gib: float = 0.0005
    """What sending one GiB costs, in the same unit."""
    moves_per_hour: int = 60
    rest_s: float = 6 * 3600.0
    """A vm that moved stays where it is for so long."""
    cpu_weight: float = 1.0
    """How much evenness of predicted CPU use counts."""
    memory_weight: float = 0.25
    """The same for claimed memory,"""
    vcpus_weight: float = 0.0
    """for claimed vcpus per core,"""
    count_weight: float = 0.0
    """and for the number of vms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What was moved lately: for the budget and for vms at rest."""

    moved_ago_s: Mapping[str, float] = field(default_factory=dict)
    """By vm id, since its last move by a rebalance."""

    def spent(self) -> int:
        return sum(1 for ago_s in self.moved_ago_s.values() if ago_s < 3600)


NO_HISTORY = History()


def plan_rebalance(estate: Estate, policy: RebalancePolicy, terms: Terms, *, history: History = NO_HISTORY) -> Plan:
    """Return the moves that pay for themselves; a plan without steps says why none does."""
    field_ = _Field.of(estate, policy, history)
    balance = Balance(field_.given)
    before = field_.figures(balance)
    what_if = WhatIf(estate)
    budget = policy.moves_per_hour - history.spent()
    quiet = _quiet(before, policy, budget, len(field_.host_ids))
    if quiet:
        return _told(finished(PlanKind.REBALANCE, what_if, (), [], terms), quiet, before, before)
    shifts = _search(balance, field_, what_if, policy, budget)
    if not shifts:
        message = "no beneficial move: none is worth its cost"
        return _told(finished(PlanKind.REBALANCE, what_if, (), [], terms), message, before, before)
    what_if = shortened(what_if)
    after = field_.figures(balance)
    plan = finished(PlanKind.REBALANCE, what_if, (), [], terms)
    return _told(plan, _gain(len(plan.moves), before, after), before, after)


def _search(balance: Balance, field_: "_Field", what_if: WhatIf, policy: RebalancePolicy, budget: int) -> list[Shift]:
    """Make the best move until none pays; each is held against all rules of placement before it counts.

    A rule that stood against a move may not do so any more once others were made: then those that were refused are tried again.
    """
    shifts: list[Shift] = []
    moved: set[int] = set()
    # How many moves had been made at the first refusal that still counts.
    refused_at: int | None = None
    while True:
        shift = balance.best(least_worth=policy.least_worth)
        if shift is None and refused_at is not None and refused_at < len(shifts):
            balance.reconsider()
            refused_at = None
            continue
        if shift is None:
            return shifts
        if shift.vm not in moved and len(moved) >= budget:
            return shifts
        vm, target = field_.vms[shift.vm], field_.host_ids[shift.target]
        if not what_if.fits(vm, StepKind.MIGRATE, target):
            balance.forbid(shift.vm, shift.target)
            refused_at = len(shifts) if refused_at is None else refused_at
            continue
        what_if.move(vm, StepKind.MIGRATE, target, is_fixed=True, why=f"worth {shift.worth:.3f} after its cost")
        balance.apply(shift)
        shifts.append(shift)
        moved.add(shift.vm)


@dataclass(frozen=True, slots=True)
class _Field:
    """The part of the estate that takes part, as columns."""

    vms: tuple[VmSnapshot, ...]
    host_ids: tuple[str, ...]
    given: BalanceInput
    dimensions: tuple[str, ...]
    """Names of the rows of `given.loads`."""

    @classmethod
    def of(cls, estate: Estate, policy: RebalancePolicy, history: History) -> "_Field":
        fleet = estate.fleet
        hosts = [host for host in fleet.hosts if host.connectivity is HostConnectivity.UP and not host.is_cordoned]
        rows = np.array([fleet.row_of[host.host_id] for host in hosts], dtype=np.intp)
        row_of = {host.host_id: row for row, host in enumerate(hosts)}
        vms = tuple(vm for host in hosts for vm in estate.on(host.host_id))
        classes = Classes(fleet)
        class_of = np.array([classes.of(vm.request) for vm in vms], dtype=np.intp)
        masks = np.array(classes.masks, dtype=np.bool_)[:, rows] if classes.masks else np.ones((1, len(hosts)), np.bool_)
        cores = np.array([estate.capacity_millis(host.host_id) for host in hosts], dtype=np.float64)
        requests = [vm.request for vm in vms]
        millis = np.array([vm.load_millis for vm in vms], dtype=np.int64)
        memory_mib = np.array([request.memory_mib for request in requests], dtype=np.int64)
        vcpus = np.array([request.vcpus for request in requests], dtype=np.int64)
        home = np.array([row_of[vm.host_id] for vm in vms], dtype=np.intp)
        loaded = np.bincount(home, weights=millis, minlength=len(hosts)).astype(np.int64)
        dimensions = {
            "cpu": (policy.cpu_weight, millis, cores),
            "memory": (policy.memory_weight, memory_mib, fleet.limits[MEMORY][rows]),
            "vcpus": (policy.vcpus_weight, vcpus, cores / 1000),
            "count": (policy.count_weight, np.ones(len(vms)), np.ones(len(hosts))),
        }
        counted = {name: one for name, one in dimensions.items() if one[0] > 0}
        given = BalanceInput(
            loads=np.array([loads for _, loads, _ in counted.values()], dtype=np.float64),
            inverse_capacity=np.array([1.0 / np.maximum(own, 0.001) for _, _, own in counted.values()]),
            base=np.zeros((len(counted), len(hosts))),
            weights=np.array([weight for weight, _, _ in counted.values()]),
            home=home,
            needs=np.array([vcpus, memory_mib, millis], dtype=np.int64),
            free=np.array([fleet.free[VCPUS][rows], fleet.free[MEMORY][rows], cores * policy.hot_share - loaded], dtype=np.int64),
            allowed=masks,
            class_of=class_of,
            cost=_costs(vms, estate, policy, history),
        )
        return cls(vms, tuple(host.host_id for host in hosts), given, tuple(counted))

    def figures(self, balance: Balance) -> dict[str, float]:
        """Return the spread of every dimension that counts, and the hottest host."""
        spreads = balance.spreads() if self.host_ids else np.zeros(len(self.dimensions))
        found = {f"{name}_spread": round(float(spreads[row]), 4) for row, name in enumerate(self.dimensions)}
        hottest = balance.shares[self.dimensions.index("cpu")].max(initial=0.0) if "cpu" in self.dimensions else 0.0
        return {"cpu_spread": 0.0, "cpu_hottest": round(float(hottest), 4)} | found


def _costs(vms: Sequence[VmSnapshot], estate: Estate, policy: RebalancePolicy, history: History) -> Floats:
    """Return what each vm's move must be worth before it counts; infinite for one that cannot move or is at rest."""
    costs = np.full(len(vms), np.inf)
    for number, vm in enumerate(vms):
        is_resting = history.moved_ago_s.get(vm.vm_id, np.inf) < policy.rest_s
        if not is_resting and way_out(vm, estate) is StepKind.MIGRATE:
            costs[number] = policy.cost_per_gib * vm.request.memory_mib / 1024
    return costs


def _quiet(figures: Mapping[str, float], policy: RebalancePolicy, budget: int, host_count: int) -> str:
    """Return why nothing is to be done, '' where a search is worth it."""
    if host_count < 2:
        return "no beneficial move: there are fewer than two hosts between which to balance"
    if figures["cpu_spread"] < policy.start_spread and figures["cpu_hottest"] <= policy.hot_share:
        spread, start = figures["cpu_spread"], policy.start_spread
        return f"no beneficial move: CPU spread {spread:.3f} is below {start:.3f} and no host is hot"
    if budget <= 0:
        return f"no beneficial move: the hour's budget of {policy.moves_per_hour} moves is spent"
    return ""


def _gain(count: int, before: Mapping[str, float], after: Mapping[str, float]) -> str:
    spread = f"CPU spread {before['cpu_spread']:.3f} to {after['cpu_spread']:.3f}"
    hottest = f"hottest host {before['cpu_hottest']:.0%} to {after['cpu_hottest']:.0%}"
    return f"rebalance: {count} {'move' if count == 1 else 'moves'}, {spread}, {hottest}"


def _told(plan: Plan, summary: str, before: Mapping[str, float], after: Mapping[str, float]) -> Plan:
    told = f"{summary}, about {plan.duration_s:.0f} s" if plan.steps else summary
    return replace(plan, summary=told, before=dict(before), expected=dict(after))
