"""Every suggestion for a refused vm really lets it in, and asks for nothing that it could do without."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import chain, combinations

from hypothesis import given, settings

from tests.properties.test_placement import Fleet, batches, fleets, policy_of, requests
from trimtab_controller.core.placement import (
    Books,
    FleetSnapshot,
    Move,
    PlacementKind,
    PlacementRequest,
    Unblock,
    decide,
    unblock,
)

OnHost = Mapping[str, list[PlacementRequest]]


def filled(fleet: Fleet, request: PlacementRequest, others: list[PlacementRequest]) -> tuple[Books, OnHost]:
    """Return books on which the others are placed, and which of them are on each host."""
    books = Books(FleetSnapshot.of(*fleet))
    on_host: dict[str, list[PlacementRequest]] = {}
    for other in others:
        chosen = decide(books, other, policy=policy_of(other)).chosen_host_id
        if chosen is not None and other.vm_id != request.vm_id:
            books.claim(other, chosen)
            on_host.setdefault(chosen, []).append(other)
    return books, on_host


def suggested(books: Books, request: PlacementRequest, on_host: OnHost) -> tuple[Unblock, ...]:
    """Return what is suggested for the request; nothing where it fits."""
    policy = policy_of(request)
    if decide(books, request, policy=policy).chosen_host_id is not None:
        return ()
    return unblock(books, request, policy=policy, movable_on=lambda host_id: on_host.get(host_id, []))


def lets_in(books: Books, request: PlacementRequest, host_id: str, moves: Iterable[Move], on_host: OnHost) -> bool:
    """Tell whether the vm gets onto this host once these others moved off it to where they are said to."""
    if request.required_host_id not in ("", host_id):
        return False
    trial = books.copy()
    by_id = {vm.vm_id: vm for vms in on_host.values() for vm in vms}
    for move in moves:
        trial.release(by_id[move.vm_id], move.from_host_id)
    there = replace(request, required_host_id=host_id)
    if decide(trial, there, policy=policy_of(request)).chosen_host_id != host_id:
        return False
    trial.claim(there, host_id)
    for move in moves:
        moved = replace(by_id[move.vm_id], kind=PlacementKind.MIGRATE, required_host_id=move.to_host_id, preferred_host_id="")
        if decide(trial, moved, policy=policy_of(request)).chosen_host_id != move.to_host_id:
            return False
        trial.claim(moved, move.to_host_id)
    return True


# Each suggestion is a search of some dozens of decisions.
@settings(max_examples=40)
@given(fleets(), requests(0), batches())
def test_every_suggestion_for_a_refused_vm_fits(fleet: Fleet, request: PlacementRequest, others: list[PlacementRequest]) -> None:
    books, on_host = filled(fleet, request, others)
    before = {resource: column.tolist() for resource, column in books.free.items()}
    for suggestion in suggested(books, request, on_host):
        assert suggestion.changes or suggestion.moves
        assert len(suggestion.changes) <= 2
        assert lets_in(books, suggestion.request, suggestion.host_id, suggestion.moves, on_host)
    assert {resource: column.tolist() for resource, column in books.free.items()} == before


@settings(max_examples=100)
@given(fleets(), requests(0), batches())
def test_no_suggestion_asks_for_what_it_could_do_without(
    fleet: Fleet, request: PlacementRequest, others: list[PlacementRequest]
) -> None:
    books, on_host = filled(fleet, request, others)
    for suggestion in suggested(books, request, on_host):
        for number in range(len(suggestion.changes)):
            kept = [change.field for position, change in enumerate(suggestion.changes) if position != number]
            if is_tried(request, kept):
                less = taken_back(suggestion, request, suggestion.changes[number].field)
                assert not lets_in(books, less, suggestion.host_id, suggestion.moves, on_host), suggestion.sentence()
        fewer = chain.from_iterable(combinations(suggestion.moves, count) for count in range(len(suggestion.moves)))
        for moves in fewer:
            assert not lets_in(books, suggestion.request, suggestion.host_id, moves, on_host), suggestion.sentence()


def is_tried(request: PlacementRequest, fields: list[str]) -> bool:
    """Tell whether the search would come to these changes by themselves: fewer cpus of its own, or fewer huge pages, are not tried."""
    return not ("vcpus" in fields and request.is_dedicated) and not ("memory" in fields and request.page_kib)


def taken_back(suggestion: Unblock, asked: PlacementRequest, field: str) -> PlacementRequest:
    """Return the suggested request without this one of its changes."""
    changed = suggestion.request
    match field.split("."):
        case ["host_selector", key]:
            return replace(changed, host_selector={**changed.host_selector, key: asked.host_selector[key]})
        case ["host_class"]:
            return replace(changed, host_class=asked.host_class)
        case ["to_host"]:
            return replace(changed, required_host_id=asked.required_host_id)
        case ["group", number]:
            assert changed.group is not None
            assert asked.group is not None
            rules = list(changed.group.rules)
            rules[int(number)] = asked.group.rules[int(number)]
            return replace(changed, group=replace(changed.group, rules=tuple(rules)))
        case ["toleration", key]:
            own = [one for one in changed.tolerations if one.key != key or one in asked.tolerations]
            return replace(changed, tolerations=tuple(own))
        case ["dedicated"]:
            return replace(changed, is_dedicated=True)
        case ["hugepages"]:
            return replace(changed, page_kib=asked.page_kib)
        case ["vcpus"]:
            return replace(changed, vcpus=asked.vcpus)
        case ["memory"]:
            return replace(changed, memory_mib=asked.memory_mib)
        case ["device", kind]:
            return replace(changed, devices={**changed.devices, kind: asked.devices[kind]})
        case ["resource", name]:
            return replace(changed, resources={**changed.resources, name: asked.resources[name]})
    raise AssertionError(f"{field} is no change of a request")
