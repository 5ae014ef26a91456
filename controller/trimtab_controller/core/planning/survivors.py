"""Who of the victims of one failure domain finds a place on the survivors, and which hosts that answer rests on."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice

import numpy as np

from trimtab_controller.core.placement import BEST_FIT, Books, PlacementRequest, decide
from trimtab_controller.core.placement.fleet import MEMORY, VCPUS, FleetSnapshot
from trimtab_controller.core.planning.classes import Classes, is_special
from trimtab_controller.core.planning.estate import VmSnapshot

SPECIAL = -1
# A fleet has few shapes; one in which every vm has its own must not keep a list of hosts for each.
_KEPT_SHAPES = 4096
Shape = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Victim:
    """A vm that has to be restarted, and the class that says where it may go; `SPECIAL`: the scheduler says it."""

    vm: VmSnapshot
    class_number: int
    vcpus: int
    memory_mib: int

    @property
    def shape(self) -> Shape:
        return self.class_number, self.vcpus, self.memory_mib

    @classmethod
    def of(cls, vm: VmSnapshot, classes: Classes, fleet: FleetSnapshot) -> "Victim":
        request = replace(vm.restart_request(), excluded_host_ids=())
        number = SPECIAL if is_special(request, fleet) else classes.of(request)
        return cls(vm, number, request.vcpus, request.memory_mib)


@dataclass(frozen=True, slots=True)
class Finding:
    missing: tuple[str, ...]
    """Vms without a place, in the order of the victims."""
    rows: frozenset[int]
    """Hosts whose free capacity the answer rests on."""
    start: int
    reach: int
    """Hosts whose properties it rests on: `reach` rows of the ring from `start` on."""
    reads_all: bool
    is_tight: bool


class Survivors:
    """The state of a fleet as searches read it: shared by the searches of all domains, written by none."""

    __slots__ = ("_columns", "_roomy", "_rows_of", "classes", "fleet", "memory_mib", "vcpus")

    def __init__(self, fleet: FleetSnapshot, classes: Classes) -> None:
        self.fleet = fleet
        self.classes = classes
        self._columns = (fleet.free[VCPUS], fleet.free[MEMORY])
        # Lists: reading one cell of a numpy column costs as much as ten of these.
        self.vcpus: list[int] = self._columns[0].tolist()
        self.memory_mib: list[int] = self._columns[1].tolist()
        self._rows_of: dict[int, list[int]] = {}
        self._roomy: dict[Shape, list[int]] = {}

    def rows_of(self, class_number: int) -> list[int]:
        """Return the rows that a class may use, in order."""
        rows = self._rows_of.get(class_number)
        if rows is None:
            rows = self._rows_of[class_number] = np.flatnonzero(self.classes.masks[class_number]).tolist()
        return rows

    def free_at(self, row: int) -> tuple[int, int]:
        return self.vcpus[row], self.memory_mib[row]

    def search(self, victims: Sequence[Victim], dead: frozenset[str]) -> Finding:
        """Place the victims on the hosts that are not dead."""
        search = _Search(self, {self.fleet.row_of[host_id] for host_id in dead if host_id in self.fleet.row_of}, dead)
        return search.run(victims)

    def roomy_rows(self, victim: Victim) -> list[int]:
        """Return the rows of its class that had room before anything was placed, in order."""
        rows = self._roomy.get(victim.shape)
        if rows is None:
            if len(self._roomy) >= _KEPT_SHAPES:
                self._roomy.clear()
            mask = self.classes.masks[victim.class_number] & (self._columns[0] >= victim.vcpus)
            mask &= self._columns[1] >= victim.memory_mib
            rows = self._roomy[victim.shape] = np.flatnonzero(mask).tolist()
        return rows


class _Search:
    __slots__ = ("_all", "_dead", "_dead_ids", "_furthest", "_left", "_start", "_survivors")

    def __init__(self, survivors: Survivors, dead: set[int], dead_ids: frozenset[str]) -> None:
        self._survivors = survivors
        self._dead = dead
        self._dead_ids = tuple(sorted(dead_ids))
        # A ring that starts behind the domain: each domain reads other hosts first, so that a change touches few of them.
        self._start = (min(dead) + 1) % max(1, len(survivors.fleet)) if dead else 0
        # Vcpus and memory left on the hosts that took someone.
        self._left: dict[int, tuple[int, int]] = {}
        # By class, how many of its rows were read.
        self._furthest: dict[int, int] = {}
        self._all = False

    def run(self, victims: Sequence[Victim]) -> Finding:
        special = [victim for victim in victims if victim.class_number == SPECIAL]
        # The choosy first: the others fit around them.
        missing = self._place_special(special)
        left = set(missing)
        is_tight = False
        plain = [victim for victim in victims if victim.class_number != SPECIAL]
        before = dict(self._left)
        homeless = [victim for group in _equal(plain) for victim in self._take_first(group)]
        if homeless and any(self._is_short(victim) for victim in homeless):
            self._all = is_tight = True
            tighter = self._pack(plain, before)
            homeless = tighter if len(tighter) <= len(homeless) else homeless
        left |= {victim.vm.vm_id for victim in homeless}
        rows, reach = self._read()
        return Finding(
            missing=tuple(victim.vm.vm_id for victim in victims if victim.vm.vm_id in left),
            rows=rows,
            start=self._start,
            reach=reach,
            reads_all=self._all,
            is_tight=is_tight,
        )

    def _place_special(self, special: Sequence[Victim]) -> list[str]:
        """Place by the scheduler itself; return who found nothing."""
        if not special:
            return []
        self._all = True
        fleet, missing = self._survivors.fleet, []
        books = Books(fleet)
        for victim in special:
            books.release(self._request(victim), victim.vm.host_id)
        for victim in special:
            request = self._request(victim)
            chosen = decide(books, request, policy=BEST_FIT, listed_hosts=-1).chosen_host_id
            if chosen is None:
                missing.append(victim.vm.vm_id)
            else:
                books.claim(request, chosen)
                self._book(fleet.row_of[chosen], victim)
        return missing

    def _request(self, victim: Victim) -> PlacementRequest:
        return replace(victim.vm.restart_request(), excluded_host_ids=self._dead_ids)

    def _take_first(self, group: Sequence[Victim]) -> Sequence[Victim]:
        """Book equal victims on the first hosts of the ring that have room; return those that are left."""
        first, dead, left = group[0], self._dead, self._left
        vcpus, memory_mib, wanted = first.vcpus, first.memory_mib, len(group)
        roomy = self._survivors.roomy_rows(first)
        begin = bisect_left(roomy, self._start)
        for row in chain(islice(roomy, begin, None), islice(roomy, begin)):
            if row in dead:
                continue
            free = left.get(row) or self._survivors.free_at(row)
            if free[0] < vcpus or free[1] < memory_mib:
                continue
            taken = min(wanted, free[0] // vcpus if vcpus else wanted, free[1] // memory_mib if memory_mib else wanted)
            left[row] = (free[0] - taken * vcpus, free[1] - taken * memory_mib)
            wanted -= taken
            if not wanted:
                self._note(first.class_number, row)
                return ()
        self._furthest[first.class_number] = len(self._survivors.rows_of(first.class_number))
        return group[len(group) - wanted :]

    def _book(self, row: int, victim: Victim) -> None:
        free = self._left.get(row) or self._survivors.free_at(row)
        self._left[row] = (free[0] - victim.vcpus, free[1] - victim.memory_mib)

    def _note(self, class_number: int, row: int) -> None:
        rows = self._survivors.rows_of(class_number)
        offset = (bisect_left(rows, row) - bisect_left(rows, self._start)) % len(rows)
        self._furthest[class_number] = max(self._furthest.get(class_number, 0), offset)

    def _is_short(self, victim: Victim) -> bool:
        """Tell whether room is what it lacks: some survivor may hold it by everything else."""
        return any(row not in self._dead for row in self._survivors.rows_of(victim.class_number))

    def _pack(self, plain: Sequence[Victim], left: dict[int, tuple[int, int]]) -> list[Victim]:
        """Place all anew, each where the least is left over; return who found nothing."""
        fleet = self._survivors.fleet
        vcpus, memory_mib = fleet.free[VCPUS].copy(), fleet.free[MEMORY].copy()
        for row, amounts in left.items():
            vcpus[row], memory_mib[row] = amounts
        vcpus[list(self._dead)] = -1
        missing = []
        for victim in plain:
            mask = self._survivors.classes.masks[victim.class_number]
            rows = np.flatnonzero(mask & (vcpus >= victim.vcpus) & (memory_mib >= victim.memory_mib))
            if rows.size == 0:
                missing.append(victim)
                continue
            over = (vcpus[rows] - victim.vcpus) * fleet.inverse_limits[VCPUS][rows]
            over += (memory_mib[rows] - victim.memory_mib) * fleet.inverse_limits[MEMORY][rows]
            row = rows[over.argmin()]
            vcpus[row] -= victim.vcpus
            memory_mib[row] -= victim.memory_mib
        return missing

    def _read(self) -> tuple[frozenset[int], int]:
        """Return the hosts read, and how far the ring was walked."""
        found: set[int] = set()
        size, reach = len(self._survivors.fleet), 0
        for number, offset in self._furthest.items():
            rows = self._survivors.rows_of(number)
            begin = bisect_left(rows, self._start)
            if offset + 1 >= len(rows):
                found.update(rows)
                reach = size
                continue
            read = [rows[(begin + each) % len(rows)] for each in range(offset + 1)]
            found.update(read)
            reach = max(reach, (read[-1] - self._start) % size + 1)
        return frozenset(found), reach


def _equal(victims: Sequence[Victim]) -> list[list[Victim]]:
    """Return the victims in groups of one priority, shape and class, in the order in which each is met first."""
    groups: dict[tuple[int, Shape], list[Victim]] = {}
    for victim in victims:
        groups.setdefault((victim.vm.priority, victim.shape), []).append(victim)
    return list(groups.values())
