"""The books of a batch: what is free now, with every decision of the batch booked, so that the next one sees it.

The only mutable state of placement. `Books` belongs to one call (or one plan) and is written in one place, `claim` and `release`;
what a later rule has to count along (cells of memory, devices, members of a group per zone) is counted there.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from trimtab_controller.core.placement.fleet import MEMORY, VCPUS, FleetSnapshot, Floats, Integers, local_space
from trimtab_controller.core.placement.request import DiskNeed, PlacementKind, PlacementRequest


@dataclass(frozen=True, slots=True)
class SpaceNeed:
    """What a request's disks ask of pools."""

    local_bytes: Mapping[str, int]
    """By local pool, on whichever host is chosen."""
    shared_bytes: Mapping[str, int]
    bound: tuple[DiskNeed, ...]
    """Disks that exist on a host's local pool and are not moved: only that host fits."""

    @classmethod
    def of(cls, request: PlacementRequest, fleet: FleetSnapshot) -> "SpaceNeed":
        """Return the need; disks of pools that the fleet does not have are left to the reach filter."""
        local: dict[str, int] = {}
        shared: dict[str, int] = {}
        bound = []
        for disk in request.disks:
            pool = fleet.pools.get(disk.pool_id)
            if pool is None:
                continue
            is_bound = bool(disk.host_id) and not pool.is_shared
            if is_bound and request.kind is not PlacementKind.MIGRATE:
                bound.append(disk)
            # A migration copies local disks: their claim is at the source, and the target needs the space as well.
            is_copied = is_bound and request.kind is PlacementKind.MIGRATE
            if not disk.is_claimed or is_copied:
                need = shared if pool.is_shared else local
                need[pool.pool_id] = need.get(pool.pool_id, 0) + disk.size_bytes
        return cls(local, shared, tuple(bound))


class Books:
    """Free capacity by resource and row, and by shared pool. Not thread-safe: a batch is decided by one thread."""

    __slots__ = ("fleet", "free", "free_shares", "shared_free_bytes")

    def __init__(self, fleet: FleetSnapshot) -> None:
        self.fleet = fleet
        self.free: dict[str, Integers] = {resource: column.copy() for resource, column in fleet.free.items()}
        self.shared_free_bytes = dict(fleet.shared_free_bytes)
        # Free / limit, kept along: dividing all hosts again for every decision costs more than all filters.
        self.free_shares: dict[str, Floats] = {
            resource: self.free[resource] * inverse for resource, inverse in fleet.inverse_limits.items()
        }

    def claim(self, request: PlacementRequest, host_id: str) -> None:
        """Book what the request needs on this host. ValueError where it is not free: nothing is ever overcommitted."""
        self._book(request, host_id, sign=-1)

    def release(self, request: PlacementRequest, host_id: str) -> None:
        """Take back what `claim` booked; in a plan also what a running vm holds."""
        self._book(request, host_id, sign=1)

    def _book(self, request: PlacementRequest, host_id: str, *, sign: int) -> None:
        row = self.fleet.row_of[host_id]
        space = SpaceNeed.of(request, self.fleet)
        amounts = {VCPUS: request.vcpus, MEMORY: request.memory_mib}
        amounts.update({local_space(pool_id): size_bytes for pool_id, size_bytes in space.local_bytes.items()})
        if sign < 0:
            short = [resource for resource, amount in amounts.items() if amount > self.free[resource][row]]
            short += [pool for pool, size in space.shared_bytes.items() if size > self.shared_free_bytes[pool]]
            if short:
                raise ValueError(f"host {host_id} has not enough {', '.join(short)} for request {request.request_id}")
        for resource, amount in amounts.items():
            self.free[resource][row] += sign * amount
        for resource, shares in self.free_shares.items():
            shares[row] = self.free[resource][row] * self.fleet.inverse_limits[resource][row]
        for pool_id, size_bytes in space.shared_bytes.items():
            self.shared_free_bytes[pool_id] += sign * size_bytes


@dataclass(frozen=True, slots=True)
class Trial:
    """One request held against the books: what filters and scorers look at."""

    books: Books
    request: PlacementRequest
    space: SpaceNeed

    @classmethod
    def of(cls, books: Books, request: PlacementRequest) -> "Trial":
        return cls(books, request, SpaceNeed.of(request, books.fleet))

    @property
    def fleet(self) -> FleetSnapshot:
        return self.books.fleet

    def free(self, resource: str, row: int) -> int:
        return int(self.books.free[resource][row])
