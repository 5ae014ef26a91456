"""Evens out predicted load with as few moves as pay for themselves, and knows when to leave things alone.

What keeps it calm: nothing starts below a spread (`start_spread`) while no host runs hot; a move must be worth more than its cost;
a vm that moved rests; an hour has a budget; the state after each move is what the next is judged on. A plan ends where no single
move is worth its cost, so that the state it leaves gives no second plan. Memory that is nearly used up comes first (`relief.py`).
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
from trimtab_controller.core.planning.load import HostUse
from trimtab_controller.core.planning.obstacles import way_out
from trimtab_controller.core.planning.plan import Plan, PlanKind, StepKind
from trimtab_controller.core.planning.relief import MemoryUse, Relief
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
    hot_memory: float = 0.1
    """A host on which tasks wait for memory for more of the time is a reason to start, too, and takes no vm."""
    full_memory: float = 0.95
    """So is one that is predicted to use more than this share of its memory, measured, not claimed: vms leave it,"""
    relieved_memory: float = 0.9
    """until it uses no more than this; and no move makes any host use more."""
    moves_per_hour: int = 60
    rest_s: float = 6 * 3600.0
    """A vm that moved stays where it is for so long."""
    cpu_weight: float = 1.0
    """How much evenness of predicted CPU use counts."""
    memory_weight: float = 0.25
    """The same for claimed memory, with the time that tasks waited for memory counted as memory that is taken,"""
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
# Hosts that a sentence names.
_NAMED = 3
_UNKNOWN = HostUse()


def plan_rebalance(estate: Estate, policy: RebalancePolicy, terms: Terms, *, history: History = NO_HISTORY) -> Plan:
    """Return the moves that pay for themselves; a plan without steps says why none does."""
    field_ = _Field.of(estate, policy, history)
    run = _Run(estate, field_, policy, budget=policy.moves_per_hour - history.spent())
    before, short = run.figures(), run.relief.short()
    quiet = _quiet(run, policy)
    if not quiet:
        run.search()
        quiet = "" if run.moved else _none_found(run, short)
    if quiet:
        return _told(finished(PlanKind.REBALANCE, WhatIf(estate), (), [], terms), quiet, before, before)
    plan = finished(PlanKind.REBALANCE, run.outcome(), (), [], terms)
    reasons = [*_relieved(run, short), *_waiting(run)]
    return _told(plan, _gain(len(plan.moves), reasons, before, run.figures()), before, run.figures())


class _Run:
    """One search. Belongs to one plan."""

    def __init__(self, estate: Estate, field_: "_Field", policy: RebalancePolicy, *, budget: int) -> None:
        self.estate, self.field, self.policy, self.budget = estate, field_, policy, budget
        self.balance = Balance(field_.given)
        self.what_if = WhatIf(estate)
        self.moved: set[int] = set()
        self.relief = Relief(
            balance=self.balance,
            memory=field_.memory,
            full=policy.full_memory,
            relieved=policy.relieved_memory,
            may_move=self._may_move,
            move=self._relieve,
        )
        self.shares_before = self.shares()
        # By vm, why it left a host that was short of memory.
        self._relieved: dict[str, str] = {}

    def shares(self) -> Floats:
        """Return what share of its memory each host is predicted to use with the vms that are there so far."""
        return self.field.memory.shares(self.balance.home)

    def figures(self) -> dict[str, float]:
        return self.field.figures(self.balance)

    def waiting(self) -> list[int]:
        """Return the hosts on which tasks wait for memory for too much of the time."""
        return [int(row) for row in np.flatnonzero(self.field.memory.waiting > self.policy.hot_memory)]

    def is_uneven(self) -> bool:
        """Tell whether evenness by itself is a reason to move anything."""
        figures, policy = self.figures(), self.policy
        is_even = figures["cpu_spread"] < policy.start_spread and figures["cpu_hottest"] <= policy.hot_share
        return not is_even or bool(self.waiting())

    def search(self) -> None:
        """Relieve hosts that are short of memory, then even out; what that makes room for is relieved in turn.

        It ends: what is used beyond the mark of relief only falls, and what evens out takes no host beyond it.
        """
        while True:
            self.relief.relieve()
            if not self.is_uneven() or not self._even_out() or not self.relief.short():
                return
            self.balance.reconsider()

    def outcome(self) -> WhatIf:
        """Return the moves, one for each vm where that is possible, each with its reason."""
        what_if = shortened(self.what_if)
        for number, step in enumerate(what_if.steps):
            why = self._relieved.get(step.vm_id, "")
            if why and self.estate.vms[step.vm_id].host_id == step.host_id:
                what_if.steps[number] = replace(step, why=why)
        return what_if

    def _even_out(self) -> bool:
        """Make the best move until none pays; each is held against all rules of placement before it counts.

        A rule that stood against a move may not do so any more once others were made: then those that were refused are tried again.
        """
        made = 0
        # How many moves had been made at the first refusal that still counts.
        refused_at: int | None = None
        while True:
            shift = self.balance.best(least_worth=self.policy.least_worth)
            if shift is None and refused_at is not None and refused_at < made:
                self.balance.reconsider()
                refused_at = None
                continue
            if shift is None or not self._may_move(shift.vm):
                return made > 0
            if not self._move(shift, f"worth {shift.worth:.3f} after its cost{self._of_waiting(shift.source)}"):
                self.balance.forbid(shift.vm, shift.target)
                refused_at = made if refused_at is None else refused_at
                continue
            made += 1

    def _may_move(self, vm: int) -> bool:
        return vm in self.moved or len(self.moved) < self.budget

    def _of_waiting(self, row: int) -> str:
        share = float(self.field.memory.waiting[row])
        return f"; tasks wait for memory on {self.name(row)} {share:.0%} of the time" if share > self.policy.hot_memory else ""

    def _relieve(self, shift: Shift) -> bool:
        vm, used = self.field.vms[shift.vm], float(self.shares()[shift.source])
        why = f"memory: {self.name(shift.source)} is predicted to use {used:.0%} of it, {vm.used_mib} MiB for this vm"
        is_made = self._move(shift, why)
        if is_made:
            self._relieved[vm.vm_id] = why
        return is_made

    def _move(self, shift: Shift, why: str) -> bool:
        vm, target = self.field.vms[shift.vm], self.field.host_ids[shift.target]
        if not self.what_if.fits(vm, StepKind.MIGRATE, target):
            return False
        self.what_if.move(vm, StepKind.MIGRATE, target, is_fixed=True, why=why)
        self.balance.apply(shift)
        self.moved.add(shift.vm)
        return True

    def name(self, row: int) -> str:
        return self.estate.host_name(self.field.host_ids[row])


@dataclass(frozen=True, slots=True)
class _Field:
    """The part of the estate that takes part, as columns."""

    vms: tuple[VmSnapshot, ...]
    host_ids: tuple[str, ...]
    given: BalanceInput
    dimensions: tuple[str, ...]
    """Names of the rows of `given.loads`."""
    memory: MemoryUse

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
        host_ids = tuple(host.host_id for host in hosts)
        memory = MemoryUse.of(estate, host_ids, vms)
        room_mib = memory.room_mib(home, ceiling=policy.relieved_memory, waiting_max=policy.hot_memory)
        withheld_mib = [estate.use.get(host_id, _UNKNOWN).memory_withheld_mib for host_id in host_ids]
        free_mib = fleet.free[MEMORY][rows] - np.array(withheld_mib, dtype=np.int64)
        given = BalanceInput(
            loads=np.array([loads for _, loads, _ in counted.values()], dtype=np.float64),
            inverse_capacity=np.array([1.0 / np.maximum(own, 0.001) for _, _, own in counted.values()]),
            base=np.array([memory.waiting if name == "memory" else np.zeros(len(hosts)) for name in counted]),
            weights=np.array([weight for weight, _, _ in counted.values()]),
            home=home,
            needs=np.array([vcpus, memory_mib, millis, memory.needed_mib], dtype=np.int64),
            free=np.array([fleet.free[VCPUS][rows], free_mib, cores * policy.hot_share - loaded, room_mib], dtype=np.int64),
            allowed=masks,
            class_of=class_of,
            cost=_costs(vms, estate, policy, history),
        )
        return cls(vms, host_ids, given, tuple(counted), memory)

    def figures(self, balance: Balance) -> dict[str, float]:
        """Return the spread of every dimension that counts, and the hottest host."""
        spreads = balance.spreads() if self.host_ids else np.zeros(len(self.dimensions))
        found = {f"{name}_spread": round(float(spreads[row]), 4) for row, name in enumerate(self.dimensions)}
        hottest = balance.shares[self.dimensions.index("cpu")].max(initial=0.0) if "cpu" in self.dimensions else 0.0
        if self.memory.is_known:
            found["memory_used_fullest"] = round(float(self.memory.shares(balance.home).max(initial=0.0)), 4)
        return {"cpu_spread": 0.0, "cpu_hottest": round(float(hottest), 4)} | found


def _costs(vms: Sequence[VmSnapshot], estate: Estate, policy: RebalancePolicy, history: History) -> Floats:
    """Return what each vm's move must be worth before it counts; infinite for one that cannot move or is at rest."""
    costs = np.full(len(vms), np.inf)
    for number, vm in enumerate(vms):
        is_resting = history.moved_ago_s.get(vm.vm_id, np.inf) < policy.rest_s
        if not is_resting and way_out(vm, estate) is StepKind.MIGRATE:
            costs[number] = policy.cost_per_gib * vm.request.memory_mib / 1024
    return costs


def _quiet(run: _Run, policy: RebalancePolicy) -> str:
    """Return why nothing is to be done, '' where a search is worth it."""
    if len(run.field.host_ids) < 2:
        return "no beneficial move: there are fewer than two hosts between which to balance"
    if not run.is_uneven() and not run.relief.short():
        spread, start = run.figures()["cpu_spread"], policy.start_spread
        return f"no beneficial move: CPU spread {spread:.3f} is below {start:.3f}, no host is hot, none is short of memory"
    if run.budget <= 0:
        return f"no beneficial move: the hour's budget of {policy.moves_per_hour} moves is spent"
    return ""


def _none_found(run: _Run, short: Sequence[int]) -> str:
    if not short:
        return "no beneficial move: none is worth its cost"
    told = _listed([f"{run.name(row)} is predicted to use {run.shares_before[row]:.0%} of its memory" for row in short])
    return f"no beneficial move: {told}, but no vm that may move has a place with memory to spare"


def _relieved(run: _Run, short: Sequence[int]) -> list[str]:
    """Return what becomes of the hosts that were short of memory."""
    after = run.shares()
    told = [f"{run.name(row)} {run.shares_before[row]:.0%} to {after[row]:.0%}" for row in short]
    return [f"predicted use of memory {_listed(told)}"] if told else []


def _waiting(run: _Run) -> list[str]:
    told = [f"{run.name(row)} {run.field.memory.waiting[row]:.0%} of the time" for row in run.waiting()]
    return [f"tasks wait for memory on {_listed(told)}"] if told else []


def _listed(parts: Sequence[str]) -> str:
    more = [f"{len(parts) - _NAMED} more"] if len(parts) > _NAMED else []
    return ", ".join([*parts[:_NAMED], *more])


def _gain(count: int, reasons: Sequence[str], before: Mapping[str, float], after: Mapping[str, float]) -> str:
    spread = f"CPU spread {before['cpu_spread']:.3f} to {after['cpu_spread']:.3f}"
    hottest = f"hottest host {before['cpu_hottest']:.0%} to {after['cpu_hottest']:.0%}"
    return ", ".join([f"rebalance: {count} {'move' if count == 1 else 'moves'}", *reasons, spread, hottest])


def _told(plan: Plan, summary: str, before: Mapping[str, float], after: Mapping[str, float]) -> Plan:
    told = f"{summary}, about {plan.duration_s:.0f} s" if plan.steps else summary
    return replace(plan, summary=told, before=dict(before), expected=dict(after))
