"""What would let a refused vm in: the smallest changes and moves, each decided again by the scheduler before it is suggested."""

from collections.abc import Sequence
from dataclasses import replace

from trimtab_controller.core.model import PlacementAsk, Vm
from trimtab_controller.core.placement.books import Books
from trimtab_controller.core.placement.policies import Policy
from trimtab_controller.core.placement.request import PlacementKind, PlacementRequest
from trimtab_controller.core.placement.unblock import unblock
from trimtab_controller.core.placement.verdict import Decision
from trimtab_controller.operations import placement_snapshot
from trimtab_controller.store import fleet
from trimtab_controller.store.database import Session

# Vms of one host that are looked at for moves.
_MOVABLE = 200


def cured(session: Session, decision: Decision, books: Books, *, policy: Policy, rows: fleet.FleetRows) -> Decision:
    """Return a refusal with the smallest changes and moves that would let the vm in, where there are any."""

    def movable_on(host_id: str) -> Sequence[PlacementRequest]:
        return _movable(session, host_id, rows)

    found = unblock(books, decision.request, policy=policy, movable_on=movable_on)
    return replace(decision, unblocks=tuple(one.as_json() for one in found))


def _movable(session: Session, host_id: str, rows: fleet.FleetRows) -> list[PlacementRequest]:
    host = next(host for host in rows.hosts if host.id == host_id)
    needs = fleet.needs_of(session, fleet.movable_ids(session, host_id, limit=_MOVABLE))
    return [
        placement_snapshot.request_of(unasked(one.vm, PlacementKind.MIGRATE), one, source=host.inventory, groups=rows.groups)
        for one in needs.values()
        if one.vm.host_id == host_id
    ]


def unasked(vm: Vm, kind: PlacementKind, *, to_host_id: str = "") -> PlacementAsk:
    """Return a request that is in no table: a question, not a wish."""
    return PlacementAsk(
        operation_id=f"preview-{vm.id}",
        vm_id=vm.id,
        project_id=vm.project_id,
        kind=kind.value,
        to_host_id=to_host_id,
        previous_host_id="",
        state="pending",
        chosen_host_id="",
        epoch=0,
        decision_id="",
        refusal="",
        created_at=vm.created_at,
    )
