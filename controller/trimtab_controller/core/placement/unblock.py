"""For a refusal: the smallest change that would let the vm in, found by asking the scheduler again. Nothing is suggested unverified.

Looked at are single changes of the request (another zone, a soft rule, a toleration, less of a resource), then moves of up to
`MOVED_AT_MOST` vms off one host, then pairs of changes, then a change with moves. Every suggestion was decided on a copy of the
books with the very changes that it names, the moved vms placed as well.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain, combinations, islice
from typing import Any

import numpy as np

from trimtab_controller.core.placement.books import Books, Trial
from trimtab_controller.core.placement.columns import MEMORY, VCPUS, devices_of, resource_named
from trimtab_controller.core.placement.engine import scan
from trimtab_controller.core.placement.policies import Policy
from trimtab_controller.core.placement.request import PlacementKind, PlacementRequest, Toleration
from trimtab_controller.core.placement.sieve import Sieve
from trimtab_controller.core.placement.snapshot import TaintEffect

SUGGESTED_AT_MOST = 3
MOVED_AT_MOST = 3
# Hosts that are looked at for moves, and pairs of changes that are tried: bounds of the search, not of what is true.
_HOSTS_TRIED = 8
_PAIRS_TRIED = 60
# People ask for memory in such steps.
_MEMORY_STEP_MIB = 256

MovableOn = Callable[[str], Sequence[PlacementRequest]]
"""The vms that may be moved off a host, as the requests that would move them."""


@dataclass(frozen=True, slots=True)
class Change:
    """One change of the request. The message completes "it would fit ..."."""

    field: str
    message: str


@dataclass(frozen=True, slots=True)
class Move:
    vm_id: str
    vm_name: str
    from_host_id: str
    from_host: str
    to_host_id: str
    to_host: str


@dataclass(frozen=True, slots=True)
class Unblock:
    """What would let the vm in: these changes, after these moves, on this host."""

    host_id: str
    host_name: str
    request: PlacementRequest
    """The request with the changes made."""
    changes: tuple[Change, ...] = ()
    moves: tuple[Move, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            "host_id": self.host_id,
            "host": self.host_name,
            "changes": [{"field": change.field, "message": change.message} for change in self.changes],
            "moves": [
                {"vm_id": move.vm_id, "vm": move.vm_name, "from": move.from_host, "to": move.to_host} for move in self.moves
            ],
            "message": self.sentence(),
        }

    def sentence(self) -> str:
        told = [change.message for change in self.changes]
        if self.moves:
            moved = ", ".join(f"{move.vm_name} to {move.to_host}" for move in self.moves)
            told.append(f"after moving {moved}")
        return f"it would fit on {self.host_name} {' and '.join(told)}"


def unblock(
    books: Books,
    request: PlacementRequest,
    *,
    policy: Policy,
    movable_on: MovableOn | None = None,
) -> tuple[Unblock, ...]:
    """Return up to `SUGGESTED_AT_MOST` smallest changes for a request that no host fits; () where none was found. Books stay."""
    singles = list(_relaxed(books, request))
    found = _fitting(books, singles, policy)
    movable = cache(movable_on or _nobody)
    if len(found) < SUGGESTED_AT_MOST:
        found += _by_moving(books, request, policy, movable)
    if not found:
        pairs = chain(_of_two_sizes(books, request), _pairs(books, singles))
        found = _fitting(books, islice(pairs, _PAIRS_TRIED), policy)
    if not found:
        ways = ((changes, one) for changes, relaxed in singles for one in _by_moving(books, relaxed, policy, movable))
        found = [replace(one, changes=changes) for changes, one in islice(ways, SUGGESTED_AT_MOST)]
    return tuple(found[:SUGGESTED_AT_MOST])


def _nobody(_host_id: str) -> Sequence[PlacementRequest]:
    return ()


Relaxed = tuple[tuple[Change, ...], PlacementRequest]


def _fitting(books: Books, candidates: Iterable[Relaxed], policy: Policy) -> list[Unblock]:
    found = []
    for changes, relaxed in candidates:
        chosen = scan(books, relaxed, policy=policy, listed_hosts=-1).chosen
        if chosen is not None:
            found.append(Unblock(chosen.host_id, chosen.host_name, relaxed, changes))
    return found


def _pairs(books: Books, singles: Sequence[Relaxed]) -> Iterator[Relaxed]:
    """Yield pairs of changes, the second made to the request that the first has changed; each pair once."""
    seen = set()
    for changes, relaxed in singles:
        for more, twice in _relaxed(books, relaxed):
            fields = frozenset(change.field for change in (*changes, *more))
            if len(fields) == 2 and fields not in seen:
                seen.add(fields)
                yield (*changes, *more), twice


# --- changes of the request --------------------------------------------------------------------------------------------------


def _relaxed(books: Books, request: PlacementRequest) -> Iterator[Relaxed]:
    """Yield each single change that may help, what costs the user least first."""
    for changed, message, relaxed in (*_of_place(request), *_of_rules(books, request), *_of_size(books, request)):
        yield (Change(changed, message),), relaxed


Single = tuple[str, str, PlacementRequest]


def _of_place(request: PlacementRequest) -> Iterator[Single]:
    selector = request.host_selector
    for key, value in selector.items():
        without = {other: selector[other] for other in selector if other != key}
        yield f"host_selector.{key}", f"without asking for {key}={value}", replace(request, host_selector=without)
    if request.host_class:
        yield "host_class", f"in another host class than {request.host_class}", replace(request, host_class="")
    if request.required_host_id:
        yield "to_host", "without naming the host", replace(request, required_host_id="")


def _of_rules(books: Books, request: PlacementRequest) -> Iterator[Single]:
    group = request.group
    for position, rule in enumerate(group.rules if group is not None else ()):
        if group is not None and rule.is_must:
            rules = (*group.rules[:position], replace(rule, is_must=False), *group.rules[position + 1 :])
            message = f"if group {group.name} only wished for {rule.relation.value} by {rule.domain}"
            yield f"group.{position}", message, replace(request, group=replace(group, rules=rules))
    for key, value in _refusing_taints(books, request):
        tolerated = (*request.tolerations, Toleration(key, value))
        yield f"toleration.{key}", f"if it tolerated {Toleration(key, value)}", replace(request, tolerations=tolerated)


def _refusing_taints(books: Books, request: PlacementRequest) -> list[tuple[str, str]]:
    fleet = books.fleet
    taints = fleet.remembered("all-taints", lambda: sorted({taint for host in fleet.hosts for taint in host.taints}))
    refusing = (taint for taint in taints if taint.effect is TaintEffect.REFUSE)
    unknown = (taint for taint in refusing if not any(one.covers(taint) for one in request.tolerations))
    return sorted({(taint.key, taint.value) for taint in unknown})


def _of_size(books: Books, request: PlacementRequest) -> Iterator[Single]:
    if request.is_dedicated:
        yield "dedicated", "without cpus of its own", replace(request, is_dedicated=False)
    if request.page_kib:
        yield "hugepages", "without huge pages", replace(request, page_kib=0)
    for size in _sizes(request):
        row = _roomiest(books, request, (size,))
        if row is not None:
            yield size.lessened(request, books.available(size.resource, row))


def _of_two_sizes(books: Books, request: PlacementRequest) -> Iterator[Relaxed]:
    """Yield the requests for less of two things at once, where every host is short of one or the other."""
    for sizes in combinations(_sizes(request), 2):
        row = _roomiest(books, request, sizes)
        if row is None:
            continue
        changes, relaxed = [], request
        for size in sizes:
            field, message, relaxed = size.lessened(relaxed, books.available(size.resource, row))
            changes.append(Change(field, message))
        yield tuple(changes), relaxed


@dataclass(frozen=True, slots=True)
class _Size:
    """Something countable of the request, of which less may be enough."""

    filter: str
    resource: str
    wanted: int
    lessened: Callable[[PlacementRequest, int], Single]
    """The request with as much as is free, and how that is said."""
    least: int = 1


def _sizes(request: PlacementRequest) -> Iterator[_Size]:
    if not request.is_dedicated:
        yield _Size("vcpus", VCPUS, request.vcpus, _with_vcpus)
    if not request.page_kib:
        yield _Size("memory", MEMORY, request.memory_mib, _with_memory)
    for kind, count in request.devices.items():
        yield _Size("devices", devices_of(kind), count, partial(_with_devices, kind), least=0)
    for name, amount in request.resources.items():
        yield _Size("resources", resource_named(name), amount, partial(_with_resource, name), least=0)


def _with_vcpus(request: PlacementRequest, free: int) -> Single:
    vcpus = min(free, request.vcpus)
    return "vcpus", f"with {vcpus} vcpus instead of {request.vcpus}", replace(request, vcpus=vcpus)


def _with_memory(request: PlacementRequest, free: int) -> Single:
    memory_mib = min(free - free % _MEMORY_STEP_MIB or free, request.memory_mib)
    return "memory", f"with {memory_mib} MiB instead of {request.memory_mib}", replace(request, memory_mib=memory_mib)


def _with_devices(kind: str, request: PlacementRequest, free: int) -> Single:
    wanted, less = request.devices[kind], min(free, request.devices[kind])
    told = f"with {less} {kind} instead of {wanted}" if less else f"without {kind}"
    return f"device.{kind}", told, replace(request, devices={**request.devices, kind: less})


def _with_resource(name: str, request: PlacementRequest, free: int) -> Single:
    wanted, less = request.resources[name], min(free, request.resources[name])
    resources = {**request.resources, name: less}
    told = f"with {less} of {name} instead of {wanted}" if less else f"without {name}"
    return f"resource.{name}", told, replace(request, resources=resources)


def _roomiest(books: Books, request: PlacementRequest, sizes: Sequence[_Size]) -> int | None:
    """Return the host that every other filter lets in and that comes closest to these sizes, by the one it is shortest of."""
    ignored = {size.filter for size in sizes}
    fits = np.ones(len(books.fleet), dtype=np.bool_)
    for each, mask in Sieve.of(Trial.of(books, request)).passed:
        if each.name not in ignored:
            fits &= mask
    nearness = np.ones(len(books.fleet))
    for size in sizes:
        free = books.free.get(size.resource, np.zeros(len(books.fleet), dtype=np.int64))
        fits &= free >= size.least
        nearness = np.minimum(nearness, free / max(1, size.wanted))
    rows = np.flatnonzero(fits)
    return int(rows[np.argmax(nearness[rows])]) if rows.size else None


# --- moves -------------------------------------------------------------------------------------------------------------------


def _by_moving(books: Books, request: PlacementRequest, policy: Policy, movable_on: MovableOn) -> list[Unblock]:
    """Return the one way in by the fewest moves, if there is one among the hosts that come closest."""
    trial = Trial.of(books, request)
    closest = Sieve.of(trial).refused_verdicts(trial, count=_HOSTS_TRIED)
    full = [verdict for verdict in closest if {refusal.filter for refusal in verdict.refusals} <= {"vcpus", "memory"}]
    for size in range(1, MOVED_AT_MOST + 1):
        for verdict in full:
            chosen = _to_move(books, request, verdict.host_id, movable_on(verdict.host_id), size)
            found = chosen and _moved(books, request, verdict.host_id, chosen, policy)
            if found:
                return [found]
    return []


def _to_move(
    books: Books, request: PlacementRequest, host_id: str, movable: Sequence[PlacementRequest], size: int
) -> Sequence[PlacementRequest]:
    """Return up to `size` vms whose leaving makes room, the smallest that do and none that could stay; () where no such number does."""
    row = books.fleet.row_of[host_id]
    vcpus = request.vcpus - books.available(VCPUS, row)
    memory_mib = request.memory_mib - books.available(MEMORY, row)

    def makes_room(leaving: Sequence[PlacementRequest]) -> bool:
        return sum(vm.vcpus for vm in leaving) >= vcpus and sum(vm.memory_mib for vm in leaving) >= memory_mib

    by_size = sorted(movable, key=lambda vm: (vm.memory_mib, vm.vcpus, vm.vm_id))
    for start in range(len(by_size) - size + 1):
        leaving = by_size[start : start + size]
        if makes_room(leaving):
            for vm in reversed(by_size[start : start + size]):
                others = [other for other in leaving if other is not vm]
                leaving = others if makes_room(others) else leaving
            return leaving
    return ()


def _moved(
    books: Books, request: PlacementRequest, host_id: str, moving: Sequence[PlacementRequest], policy: Policy
) -> Unblock | None:
    """Return the suggestion if all of it can be done: they leave, the vm comes, each of them finds another host."""
    scratch, fleet = books.copy(), books.fleet
    host_name = fleet.hosts[fleet.row_of[host_id]].name
    for vm in moving:
        scratch.release(vm, host_id)
    if scan(scratch, replace(request, required_host_id=host_id), policy=policy, listed_hosts=-1).chosen is None:
        return None
    scratch.claim(request, host_id)
    moves = []
    for vm in moving:
        leaving = replace(vm, kind=PlacementKind.MIGRATE, excluded_host_ids=(host_id,), preferred_host_id="")
        chosen = scan(scratch, leaving, policy=policy, listed_hosts=-1).chosen
        if chosen is None:
            return None
        scratch.claim(leaving, chosen.host_id)
        moves.append(Move(vm.vm_id, vm.vm_name, host_id, host_name, chosen.host_id, chosen.host_name))
    return Unblock(host_id, host_name, request, (), tuple(moves))
