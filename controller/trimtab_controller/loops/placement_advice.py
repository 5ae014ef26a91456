"""Asks the scheduler without claiming anything: what a vm would get, what would be said of one host, what would let a refused vm in."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from trimtab_controller.clock import Clock
from trimtab_controller.core.model import PlacementAsk
from trimtab_controller.core.placement.books import Books
from trimtab_controller.core.placement.engine import decide, explain_host
from trimtab_controller.core.placement.policies import Policy
from trimtab_controller.core.placement.request import PlacementKind, PlacementRequest
from trimtab_controller.core.placement.unblock import unblock
from trimtab_controller.core.placement.verdict import Decision, HostVerdict
from trimtab_controller.loops import placement_snapshot
from trimtab_controller.store import fleet
from trimtab_controller.store.database import Session
from trimtab_protos.errors import NotFound

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
    accelerator = host.inventory.accelerator if host.inventory else ""
    needs = fleet.needs_of(session, fleet.movable_ids(session, host_id, limit=_MOVABLE))
    asks = (_ask(one, PlacementKind.MIGRATE, to_host_id="", now=one.vm.created_at) for one in needs.values())
    return [
        placement_snapshot.request_of(ask, one, accelerator=accelerator, groups=rows.groups)
        for ask, one in zip(asks, needs.values(), strict=True)
        if one.vm.host_id == host_id
    ]


class Advisor:
    """What the API asks; reads the fleet anew each time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def preview(self, session: Session, vm_id: str, *, to_host_id: str) -> Decision:
        """Decide for a vm whose rows are there, perhaps in a transaction that is rolled back; a refusal says what would help."""
        rows, books, request = self._asked(session, vm_id, PlacementKind.CREATE, to_host_id)
        policy = placement_snapshot.policy_of(rows)(request)
        decision = decide(books, request, policy=policy)
        return decision if decision.chosen else cured(session, decision, books, policy=policy, rows=rows)

    def verdict(self, session: Session, vm_id: str, host_id: str) -> HostVerdict:
        """Return what would be said of one host now, as for a start. NotFound where the host is not in the fleet."""
        rows, books, request = self._asked(session, vm_id, PlacementKind.START, "")
        if host_id not in books.fleet.row_of:
            raise NotFound("host-not-found", f"host {host_id} is not in the fleet")
        return explain_host(books.fleet, request, host_id, policy=placement_snapshot.policy_of(rows)(request))

    def _asked(
        self, session: Session, vm_id: str, kind: PlacementKind, to_host_id: str
    ) -> tuple[fleet.FleetRows, Books, PlacementRequest]:
        rows = fleet.read_rows(session)
        needs = fleet.needs_of(session, [vm_id])[vm_id]
        snapshot = placement_snapshot.snapshot_of(rows, placement_snapshot.baselines_of(rows))
        ask = _ask(needs, kind, to_host_id=to_host_id, now=self._clock.now())
        return rows, Books(snapshot), placement_snapshot.request_of(ask, needs, accelerator="", groups=rows.groups)


def _ask(needs: fleet.VmNeeds, kind: PlacementKind, *, to_host_id: str, now: datetime) -> PlacementAsk:
    """Return a request that is in no table."""
    return PlacementAsk(
        operation_id=f"preview-{needs.vm.id}",
        vm_id=needs.vm.id,
        project_id=needs.vm.project_id,
        kind=kind.value,
        to_host_id=to_host_id,
        previous_host_id="",
        state="pending",
        chosen_host_id="",
        epoch=0,
        decision_id="",
        refusal="",
        created_at=now,
    )
