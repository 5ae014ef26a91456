"""Every suggestion for a refused vm really lets it in."""

from dataclasses import replace

from hypothesis import given, settings

from tests.properties.test_placement import Fleet, batches, fleets, policy_of, requests, unhurried
from trimtab_controller.core.placement import Books, FleetSnapshot, PlacementKind, PlacementRequest, decide, unblock


# Each suggestion is a search of some dozens of decisions.
@settings(unhurried, max_examples=40)
@given(fleets(), requests(0), batches())
def test_every_suggestion_for_a_refused_vm_fits(fleet: Fleet, request: PlacementRequest, others: list[PlacementRequest]) -> None:
    books = Books(FleetSnapshot.of(*fleet))
    on_host: dict[str, list[PlacementRequest]] = {}
    for other in others:
        chosen = decide(books, other, policy=policy_of(other)).chosen_host_id
        if chosen is not None and other.vm_id != request.vm_id:
            books.claim(other, chosen)
            on_host.setdefault(chosen, []).append(other)
    policy = policy_of(request)
    if decide(books, request, policy=policy).chosen_host_id is not None:
        return
    before = {resource: column.tolist() for resource, column in books.free.items()}
    for suggestion in unblock(books, request, policy=policy, movable_on=lambda host_id: on_host.get(host_id, [])):
        assert suggestion.changes or suggestion.moves
        assert len(suggestion.changes) <= 2
        trial = books.copy()
        by_id = {vm.vm_id: vm for vms in on_host.values() for vm in vms}
        for move in suggestion.moves:
            trial.release(by_id[move.vm_id], move.from_host_id)
        there = replace(suggestion.request, required_host_id=suggestion.host_id)
        assert decide(trial, there, policy=policy).chosen_host_id == suggestion.host_id
        trial.claim(there, suggestion.host_id)
        for move in suggestion.moves:
            moved = replace(by_id[move.vm_id], kind=PlacementKind.MIGRATE, required_host_id=move.to_host_id, preferred_host_id="")
            assert decide(trial, moved, policy=policy).chosen_host_id == move.to_host_id
            trial.claim(moved, move.to_host_id)
    assert {resource: column.tolist() for resource, column in books.free.items()} == before
