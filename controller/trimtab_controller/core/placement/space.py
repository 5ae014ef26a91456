"""What a request takes: from any host, from pools, and from single NUMA cells."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from trimtab_controller.core.placement.columns import (
    MEMORY,
    VCPUS,
    cell_cpus,
    cell_pages,
    devices_of,
    local_space,
    resource_named,
)
from trimtab_controller.core.placement.fleet import FleetSnapshot
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
        if not request.disks:
            return NO_SPACE
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


NO_SPACE = SpaceNeed({}, {}, ())


def scarce_amounts(request: PlacementRequest, cells: Iterable[int]) -> dict[str, int]:
    """Return what is taken of the stocks of a host, by resource, in these cells of it."""
    need = CellNeed.of(request)
    amounts = {devices_of(kind): count for kind, count in request.devices.items() if count}
    amounts |= {resource_named(name): amount for name, amount in request.resources.items() if amount}
    return amounts | (need.amounts(cells) if need is not None else {})


def amounts_of(request: PlacementRequest, space: SpaceNeed) -> dict[str, int]:
    """Return what is taken on the chosen host, by resource; what is taken from single cells is `CellNeed`'s."""
    amounts: dict[str, int] = {}
    if not request.is_dedicated:
        amounts[VCPUS] = request.vcpus
    if not request.page_kib:
        amounts[MEMORY] = request.memory_mib
    for pool_id, size_bytes in space.local_bytes.items():
        amounts[local_space(pool_id)] = size_bytes
    # None of a thing asks nothing, also where no host has it.
    if request.devices or request.resources:
        amounts.update({devices_of(kind): count for kind, count in request.devices.items() if count})
        amounts.update({resource_named(name): amount for name, amount in request.resources.items() if amount})
    return amounts


@dataclass(frozen=True, slots=True)
class CellNeed:
    """What a pinned or huge-page vm takes from each of its cells."""

    cpus: int
    pages: int
    page_kib: int
    count: int
    """Of cells."""

    @classmethod
    def of(cls, request: PlacementRequest) -> "CellNeed | None":
        """Return the need; None for a vm that is neither pinned nor on huge pages."""
        if not request.is_dedicated and not request.page_kib:
            return None
        count = request.cell_count
        cpus = request.vcpus // count if request.is_dedicated else 0
        return cls(cpus, request.page_count // count, request.page_kib, count)

    def of_cell(self, cell: int) -> dict[str, int]:
        """Return what is taken from one cell, by resource."""
        need = {cell_cpus(cell): self.cpus} if self.cpus else {}
        return need | ({cell_pages(cell, self.page_kib): self.pages} if self.pages else {})

    def amounts(self, cells: Iterable[int]) -> dict[str, int]:
        return {resource: amount for cell in cells for resource, amount in self.of_cell(cell).items()}

    def choose(self, free: Callable[[str], int], cells: Iterable[int]) -> tuple[int, ...]:
        """Return the cells to take, the fullest that fit; () where there are too few."""
        fitting = [cell for cell in cells if all(free(name) >= amount for name, amount in self.of_cell(cell).items())]
        fullest = sorted(fitting, key=lambda cell: (free(cell_cpus(cell)), free(cell_pages(cell, self.page_kib)), cell))
        return tuple(sorted(fullest[: self.count])) if len(fitting) >= self.count else ()
