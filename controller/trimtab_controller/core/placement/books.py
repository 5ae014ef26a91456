"""The books of a batch: what is free now, with every decision of the batch booked, so that the next one sees it.

The only mutable state of placement. `Books` belongs to one call (or one plan) and is written in one place, `claim` and `release`;
what rules have to count along (cells of memory, devices, members of a group) is counted there. Which rows were written stands in
`changed_rows`: whoever keeps an answer along (`standing.py`) has to look at those alone.
"""

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np

from trimtab_controller.core.placement.fleet import ALL, FleetSnapshot, Floats, Integers, Mask, Rows, at_rows
from trimtab_controller.core.placement.lifetimes import Occupancy
from trimtab_controller.core.placement.members import Members
from trimtab_controller.core.placement.request import PlacementRequest
from trimtab_controller.core.placement.space import CellNeed, SpaceNeed, amounts_of

__all__ = ["Books", "SpaceNeed", "Trial"]


class Books:
    """Free capacity by resource and row, and by shared pool. Not thread-safe: a batch is decided by one thread."""

    __slots__ = (
        "_cells_of",
        "_trial",
        "asked_shapes",
        "changed_rows",
        "families",
        "fleet",
        "free",
        "free_shares",
        "ladders",
        "members",
        "occupancy",
        "shared_free_bytes",
        "standing",
    )

    def __init__(self, fleet: FleetSnapshot, *, occupancy: Occupancy | None = None) -> None:
        self.fleet = fleet
        self.occupancy = occupancy
        """Who is where and for how long, for policies that ask; claims are written there too. A copy of the books has none."""
        self.free: dict[str, Integers] = {resource: column.copy() for resource, column in fleet.free.items()}
        self.shared_free_bytes = dict(fleet.shared_free_bytes)
        # Free / limit, kept along: dividing all hosts again for every decision costs more than all filters.
        self.free_shares: dict[str, Floats] = {
            resource: self.free[resource] * inverse for resource, inverse in fleet.inverse_limits.items()
        }
        self.members = Members(fleet, fleet.members)
        self.changed_rows: list[int] = []
        """The row of every claim and release, in order."""
        self.standing: dict[Hashable, Any] = {}
        self.asked_shapes: set[Hashable] = set()
        """Both are `standing.py`'s: what it keeps about these books, and what it may have to keep."""
        self.families: dict[Hashable, Any] = {}
        self.ladders: dict[str, Any] = {}
        """What `families.py` and `ladders.py` keep about them."""
        self._cells_of: dict[str, tuple[int, ...]] = {}
        self._trial: Trial | None = None

    def trial(self, request: PlacementRequest) -> "Trial":
        """Return the request held against these books; the same object when it is asked again at once, as a claim does."""
        if self._trial is None or self._trial.request is not request:
            self._trial = Trial(self, request)
        return self._trial

    def claim(self, request: PlacementRequest, host_id: str) -> None:
        """Book what the request needs on this host. ValueError where it is not free: nothing is ever overcommitted."""
        trial, row = self.trial(request), self.fleet.row_of[host_id]
        cells = trial.cells_on(row)
        amounts = trial.amounts if trial.cells is None else trial.amounts | trial.cells.amounts(cells)
        short = [name for name, amount in amounts.items() if amount > self.available(name, row)]
        short += [pool for pool, size in trial.space.shared_bytes.items() if size > self.shared_free_bytes[pool]]
        if trial.cells is not None and len(cells) < request.cell_count:
            short.append("room in its cells")
        if short:
            raise ValueError(f"host {host_id} has not enough {', '.join(short)} for request {request.request_id}")
        if trial.cells is not None:
            self._cells_of[request.request_id] = cells
        self._book(trial, amounts, row, sign=-1)
        if request.group is not None:
            self.members.put(request.group.group_id, request.vm_id, row)
        if self.occupancy is not None:
            self.occupancy.put(row, request.vm_id, request.life_kind)

    def release(self, request: PlacementRequest, host_id: str, *, is_end: bool = False) -> None:
        """Take back what `claim` booked; in a plan also what a running vm holds (then `held_cells` says where).

        `is_end`: since the vm ended; of that `occupancy` learns.
        """
        trial, row = self.trial(request), self.fleet.row_of[host_id]
        amounts = trial.amounts
        if trial.cells is not None:
            amounts = amounts | trial.cells.amounts(self._cells_of.pop(request.request_id, request.held_cells))
        self._book(trial, amounts, row, sign=1)
        if request.group is not None:
            self.members.take(request.group.group_id, request.vm_id, row)
        if self.occupancy is not None:
            self.occupancy.take(row, request.vm_id, is_end=is_end)

    def available(self, resource: str, row: int) -> int:
        """Return how much is free on a host; 0 of what no host has."""
        column = self.free.get(resource)
        return 0 if column is None else column.item(row)

    def cells_of(self, request_id: str) -> tuple[int, ...]:
        """Return the cells that a request booked here was given; () where it asked for none."""
        return self._cells_of.get(request_id, ())

    def copy(self) -> "Books":
        """Return books that start as these are now; neither sees what is written in the other."""
        other = Books(self.fleet)
        for resource, column in self.free.items():
            other.free[resource][:] = column
        for resource, shares in self.free_shares.items():
            other.free_shares[resource][:] = shares
        other.shared_free_bytes = dict(self.shared_free_bytes)
        other.members = self.members.copy()
        other._cells_of = dict(self._cells_of)
        return other

    def _book(self, trial: "Trial", amounts: Mapping[str, int], row: int, *, sign: int) -> None:
        # Single figures are read and written in plain Python: numpy's own take three times as long.
        free, inverse_limits = self.free, self.fleet.inverse_limits
        for resource, amount in amounts.items():
            column = free[resource]
            left = column[row] = column.item(row) + sign * amount
            if resource in inverse_limits:
                self.free_shares[resource][row] = left * inverse_limits[resource].item(row)
        for pool_id, size_bytes in trial.space.shared_bytes.items():
            self.shared_free_bytes[pool_id] += sign * size_bytes
        self.changed_rows.append(row)


class Trial:
    """One request held against the books: what filters and scorers look at."""

    __slots__ = ("amounts", "books", "cells", "fleet", "request", "space")

    def __init__(self, books: Books, request: PlacementRequest) -> None:
        self.books, self.request, self.fleet = books, request, books.fleet
        self.space = SpaceNeed.of(request, books.fleet)
        self.amounts = amounts_of(request, self.space)
        """What is taken on the chosen host, by resource; cells apart."""
        self.cells = CellNeed.of(request)

    @staticmethod
    def of(books: Books, request: PlacementRequest) -> "Trial":
        return books.trial(request)

    def free(self, resource: str, row: int) -> int:
        return self.books.available(resource, row)

    def has(self, resource: str, amount: int, rows: Rows = ALL) -> Mask:
        """Return which of these rows have so much free."""
        column = self.books.free.get(resource)
        if column is None:
            return np.full(len(self.fleet), amount <= 0)[rows]
        fits: Mask = at_rows(column, rows) >= amount
        return fits

    def cells_on(self, row: int) -> tuple[int, ...]:
        """Return the cells that the vm is given on a host: the fullest that fit, so that whole cells stay free."""
        if self.cells is None:
            return ()
        return self.cells.choose(lambda resource: self.books.available(resource, row), self.cell_numbers)

    @property
    def cell_numbers(self) -> tuple[int, ...]:
        """The numbers that cells have anywhere in the fleet."""
        fleet = self.fleet
        return fleet.remembered("cells", lambda: tuple(sorted({cell.cell for host in fleet.hosts for cell in host.cells})))
