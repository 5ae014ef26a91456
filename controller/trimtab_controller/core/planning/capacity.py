"""How much there is, how much is left, and how many more vms of a shape the fleet takes: now, without hosts, with more.

The answers are the scheduler's: what a host may take at all is asked of its filters, the rest is division. They are exact for one
shape, since equal vms do not compete for the order in which they come.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.core.placement import (
    BEST_FIT,
    Books,
    FleetSnapshot,
    HostSnapshot,
    PlacementKind,
    PlacementRequest,
    PoolSnapshot,
    decide,
)
from trimtab_controller.core.placement.books import SpaceNeed, Trial
from trimtab_controller.core.placement.fleet import MEMORY, VCPUS, Integers, Mask, RowIndex, local_space
from trimtab_controller.core.placement.sieve import Sieve, lasting_sieve
from trimtab_controller.core.planning.classes import Classes, asks_more_than_numbers
from trimtab_controller.core.planning.estate import Estate, Power, VmSnapshot

# Of a shape that has to be placed vm by vm; more is told as "at least".
COUNTED_MAX = 20_000
_UNBOUNDED = np.iinfo(np.int64).max
# No host has more of anything.
_SIZE_MAX = 1 << 40


@dataclass(frozen=True, slots=True)
class Shape:
    vcpus: int
    memory_mib: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One part of the fleet. Limits have overcommit and reserve applied; only hosts that take vms count as free."""

    name: str
    host_count: int
    open_count: int
    """Hosts that are up and not cordoned."""
    vm_count: int
    vcpus_limit: int
    vcpus_claimed: int
    vcpus_free: int
    memory_limit_mib: int
    memory_claimed_mib: int
    memory_free_mib: int
    used_millis: int
    """Measured CPU use, in thousandths of a core; 0 where nothing was measured."""
    stranded_vcpus: int
    """Free, but no vm of the reference shape can use them, since its memory is not beside them."""
    stranded_memory_mib: int
    reference: Shape
    largest_by_vcpus: Shape
    """The largest plain vm that still fits: most vcpus, and the memory that is beside them. It tolerates no taint, is of no project
    that has hosts of its own, asks for nothing special, and has a disk on any pool that is ready on its host and not full."""
    largest_by_memory: Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    count: int
    """How many more."""
    is_capped: bool
    """There are at least so many; counting stopped."""
    by_host: Mapping[str, int] = field(default_factory=dict)
    """By host name; only hosts that take some. Empty where a rule beyond numbers binds them together."""
    homeless: tuple[str, ...] = ()
    """Names of vms of the hosts that are left out for which the rest has no place."""
    refusal: str = ""
    """Why not one more, where none fits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Largest:
    """The largest vm of one wish that the scheduler would place, by either size, and the most of the other beside it."""

    by_vcpus: Shape
    by_memory: Shape


def figures(estate: Estate, *, by: str = "", reference: Shape | None = None) -> tuple[Figures, ...]:
    """Return the fleet's figures, or with `by` those of each value of that label, in order; hosts without it come as ''.

    `reference`: what counts as usable; by default the mean vm of the fleet.
    """
    shape = reference or _mean_shape(estate)
    groups: dict[str, list[int]] = {}
    for row, host in enumerate(estate.fleet.hosts):
        groups.setdefault(host.labels.get(by, "") if by else "fleet", []).append(row)
    if not groups and not by:
        groups["fleet"] = []
    takes_plain = _takes_plain(estate.fleet)
    return tuple(_figures(estate, name, np.array(groups[name], dtype=np.intp), shape, takes_plain) for name in sorted(groups))


def fit(estate: Estate, request: PlacementRequest, *, keep_free_hosts: int = 0) -> Fit:
    """Return how many more vms like this one the fleet takes.

    `keep_free_hosts` 1: so many that whichever host is lost, its vms and all the new ones still have a place; exact where hosts and
    vms are equal, else never too high by what another packing of the lost host's vms would leave.
    """
    if keep_free_hosts not in (0, 1):
        raise ValueError("keep_free_hosts is 0 or 1")
    books = Books(estate.fleet)
    whole = _fit(books, request, np.ones(len(estate.fleet), dtype=np.bool_))
    if not keep_free_hosts or whole.count == 0:
        return whole
    least = min((_without_one(estate, request, host) for host in estate.fleet.hosts), default=0)
    return replace(whole, count=min(whole.count, least), by_host={})


def largest(estate: Estate, wish: PlacementRequest) -> Largest:
    """Return the largest vm that asks what `wish` asks besides its sizes: the scheduler places it, and none with one of them larger.

    Found by bisection, asking the scheduler's own filters; (0, 0) where not even one vcpu with one MiB fits.
    """
    books = Books(estate.fleet)

    def fits(vcpus: int, memory_mib: int) -> bool:
        return Sieve.of(Trial.of(books, replace(wish, vcpus=vcpus, memory_mib=memory_mib))).fit_count > 0

    vcpus = _most(lambda count: fits(count, 1))
    memory_mib = _most(lambda count: fits(1, count))
    return Largest(
        by_vcpus=Shape(vcpus, _most(lambda count: vcpus > 0 and fits(vcpus, count))),
        by_memory=Shape(_most(lambda count: memory_mib > 0 and fits(count, memory_mib)), memory_mib),
    )


def _most(fits: Callable[[int], bool]) -> int:
    """Return the largest number that fits, 0 for none; what is more than one that does not fit does not fit either."""
    too_many = 1
    while fits(too_many) and too_many < _SIZE_MAX:
        too_many *= 2
    least = too_many // 2
    while too_many - least > 1:
        middle = (least + too_many) // 2
        least, too_many = (middle, too_many) if fits(middle) else (least, middle)
    return least


def without(estate: Estate, host_ids: Sequence[str]) -> tuple[Estate, tuple[VmSnapshot, ...]]:
    """Return the estate as if these hosts were gone and their vms restarted elsewhere, and the vms that found no place."""
    gone = set(host_ids)
    books, homeless, moved = Books(estate.fleet), [], []
    for vm in _running(vm for host_id in host_ids for vm in estate.on(host_id)):
        request = replace(vm.restart_request(), excluded_host_ids=tuple(sorted(gone)))
        chosen = decide(books, request, policy=BEST_FIT, listed_hosts=-1).chosen_host_id
        if chosen is None:
            homeless.append(vm)
        else:
            books.claim(request, chosen)
            moved.append(replace(vm, host_id=chosen))
    settled = estate.changed(vms=moved)
    hosts = [host for host in settled.fleet.hosts if host.host_id not in gone]
    fleet = FleetSnapshot.of(hosts, estate.fleet.pools.values(), groups=settled.fleet.groups)
    kept = [vm for vm in settled.vms.values() if vm.host_id not in gone]
    return Estate.of(fleet, kept, host_versions=estate.host_versions, cpu_millis=estate.cpu_millis), tuple(homeless)


def with_added(estate: Estate, shapes: Iterable[Shape], *, like: HostSnapshot) -> Estate:
    """Return the estate with one empty host per shape, in everything else like `like`."""
    added = [
        replace(
            like,
            host_id=f"added-{number}",
            name=f"added-{number}",
            vcpus_limit=shape.vcpus,
            memory_limit_mib=shape.memory_mib,
            vcpus_claimed=0,
            memory_claimed_mib=0,
            unmanaged_vcpus=0,
            unmanaged_memory_mib=0,
            is_cordoned=False,
            connectivity=HostConnectivity.UP,
        )
        for number, shape in enumerate(shapes, 1)
    ]
    fleet = FleetSnapshot.of([*estate.fleet.hosts, *added], estate.fleet.pools.values(), groups=estate.fleet.groups)
    return Estate.of(fleet, estate.vms.values(), host_versions=estate.host_versions, cpu_millis=estate.cpu_millis)


def _fit(books: Books, request: PlacementRequest, rows: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Fit:
    if asks_more_than_numbers(request):
        return _fit_one_by_one(books, request)
    counts = _counts(books, request) * rows
    space, total = SpaceNeed.of(request, books.fleet), int(min(counts.sum(), COUNTED_MAX * len(books.fleet)))
    for pool_id, size_bytes in space.shared_bytes.items():
        if size_bytes:
            total = min(total, max(0, books.shared_free_bytes[pool_id]) // size_bytes)
    by_host = {books.fleet.hosts[row].name: int(counts[row]) for row in np.flatnonzero(counts)}
    refusal = "" if total else decide(books, request, policy=BEST_FIT, listed_hosts=-1).summary()
    return Fit(count=total, is_capped=bool((counts >= COUNTED_MAX).any()), by_host=by_host, refusal=refusal)


def _fit_one_by_one(books: Books, request: PlacementRequest) -> Fit:
    by_host: dict[str, int] = {}
    for number in range(COUNTED_MAX):
        each = replace(request, request_id=f"{request.request_id}-{number}", vm_id=f"{request.vm_id}-{number}")
        decision = decide(books, each, policy=BEST_FIT, listed_hosts=-1)
        chosen = decision.chosen
        if chosen is None:
            return Fit(count=number, is_capped=False, by_host=by_host, refusal="" if number else decision.summary())
        books.claim(each, chosen.host_id)
        by_host[chosen.host_name] = by_host.get(chosen.host_name, 0) + 1
    return Fit(count=COUNTED_MAX, is_capped=True, by_host=by_host)


def _counts(books: Books, request: PlacementRequest) -> Integers:
    """Return by row how many fit, as if each host stood alone."""
    fleet = books.fleet
    classes = Classes(fleet)
    allowed = classes.masks[classes.of(request)]
    needs = {VCPUS: request.vcpus, MEMORY: request.memory_mib}
    needs |= {local_space(pool_id): size for pool_id, size in SpaceNeed.of(request, fleet).local_bytes.items()}
    counts = np.full(len(fleet), _UNBOUNDED, dtype=np.int64)
    for resource, need in needs.items():
        if need:
            np.minimum(counts, np.maximum(books.free[resource], 0) // need, out=counts)
    np.minimum(counts, COUNTED_MAX, out=counts)  # a vm that needs nothing fits without end
    counts[~allowed] = 0
    return counts


def _without_one(estate: Estate, request: PlacementRequest, host: HostSnapshot) -> int:
    """Return how many more fit on the others after they took this host's vms; 0 where they cannot take them."""
    books = Books(estate.fleet)
    for vm in _running(vm for vm in estate.on(host.host_id) if vm.is_protected):
        moved = vm.restart_request()
        chosen = decide(books, moved, policy=BEST_FIT, listed_hosts=-1).chosen_host_id
        if chosen is None:
            return 0
        books.claim(moved, chosen)
    rows = np.ones(len(estate.fleet), dtype=np.bool_)
    rows[estate.fleet.row_of[host.host_id]] = False
    return _fit(books, request, rows).count


def _running(vms: Iterable[VmSnapshot]) -> list[VmSnapshot]:
    found = (vm for vm in vms if vm.power is not Power.STOPPED)
    return sorted(found, key=lambda vm: (-vm.priority, -vm.request.memory_mib, -vm.request.vcpus, vm.vm_id))


def _mean_shape(estate: Estate) -> Shape:
    running = [vm.request for vm in estate.vms.values() if vm.power is not Power.STOPPED]
    if not running:
        return Shape(1, 2048)
    vcpus = -(-sum(request.vcpus for request in running) // len(running))
    memory_mib = -(-sum(request.memory_mib for request in running) // len(running))
    return Shape(max(1, vcpus), max(1, memory_mib))


def _takes_plain(fleet: FleetSnapshot) -> Mask:
    """Return the hosts that take a vm of which nothing is known but its size; a fleet without pools keeps no disks."""
    plain = PlacementRequest(request_id="", vm_id="", vm_name="", project_id="", kind=PlacementKind.CREATE, vcpus=0, memory_mib=0)
    takes: Mask = lasting_sieve(Trial.of(Books(fleet), plain)).fits
    if not fleet.pools:
        return takes
    has_space = [
        any(host.pools.get(pool.pool_id) and _is_open(pool, host) for pool in fleet.pools.values()) for host in fleet.hosts
    ]
    return takes & np.array(has_space, dtype=np.bool_)


def _is_open(pool: PoolSnapshot, host: HostSnapshot) -> bool:
    return pool.free_bytes(host.host_id) > 0 and (pool.is_sharing_proven or not pool.is_shared)


def _figures(estate: Estate, name: str, rows: RowIndex, shape: Shape, takes_plain: Mask) -> Figures:
    fleet = estate.fleet
    hosts = [fleet.hosts[row] for row in rows.tolist()]
    is_open = np.array([not host.is_cordoned and host.connectivity is HostConnectivity.UP for host in hosts], dtype=np.bool_)
    vcpus = np.maximum(fleet.free[VCPUS][rows], 0) * is_open
    memory_mib = np.maximum(fleet.free[MEMORY][rows], 0) * is_open
    plain_vcpus, plain_memory_mib = vcpus * takes_plain[rows], memory_mib * takes_plain[rows]
    fits = np.minimum(vcpus // shape.vcpus, memory_mib // shape.memory_mib)
    vms = [vm for host in hosts for vm in estate.on(host.host_id)]
    return Figures(
        name=name,
        host_count=len(hosts),
        open_count=int(is_open.sum()),
        vm_count=len(vms),
        vcpus_limit=sum(host.vcpus_limit for host in hosts),
        vcpus_claimed=sum(host.vcpus_claimed for host in hosts),
        vcpus_free=int(vcpus.sum()),
        memory_limit_mib=sum(host.memory_limit_mib for host in hosts),
        memory_claimed_mib=sum(host.memory_claimed_mib for host in hosts),
        memory_free_mib=int(memory_mib.sum()),
        used_millis=sum(vm.load_millis for vm in vms),
        stranded_vcpus=int((vcpus - fits * shape.vcpus).sum()),
        stranded_memory_mib=int((memory_mib - fits * shape.memory_mib).sum()),
        reference=shape,
        largest_by_vcpus=_largest(plain_vcpus, plain_memory_mib),
        largest_by_memory=_swapped(_largest(plain_memory_mib, plain_vcpus)),
    )


def _largest(first: Integers, second: Integers) -> Shape:
    """Return the most of the first that is free on one host with some of the second, and how much of the second is beside it."""
    usable = np.flatnonzero((first > 0) & (second > 0))
    if usable.size == 0:
        return Shape(0, 0)
    row = max(usable.tolist(), key=lambda row: (first[row], second[row]))
    return Shape(int(first[row]), int(second[row]))


def _swapped(shape: Shape) -> Shape:
    return Shape(shape.memory_mib, shape.vcpus)
