"""Asks the scheduler without claiming anything, on the same snapshot as the leader's batch loop: dry runs and "why not that host?"."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from sqlalchemy.orm import Session

from trimtab_controller.core.baseline import Baseline
from trimtab_controller.core.model import Vm
from trimtab_controller.core.placement.books import Books
from trimtab_controller.core.placement.engine import explain, explain_host
from trimtab_controller.core.placement.fleet import FleetSnapshot
from trimtab_controller.core.placement.request import PlacementKind
from trimtab_controller.core.placement.verdict import Decision, HostVerdict
from trimtab_controller.operations import placement_cures, placement_snapshot
from trimtab_controller.operations.admission import Gatekeeper, code_of
from trimtab_controller.store import claims, fleet
from trimtab_protos.errors import NoCapacity

# So many hosts' reasons a refusal carries; those that came closest.
REASONS_MAX = 20


@dataclass(frozen=True, slots=True)
class FleetView:
    """The fleet at one moment. Read apart from the transaction that asks: it takes long where there are many hosts."""

    rows: fleet.FleetRows
    baselines: Mapping[str, Baseline]
    snapshot: FleetSnapshot

    @classmethod
    def of(cls, rows: fleet.FleetRows) -> "FleetView":
        baselines = placement_snapshot.baselines_of(rows)
        return cls(rows, baselines, placement_snapshot.snapshot_of(rows, baselines))


def read_fleet(session: Session) -> FleetView:
    return FleetView.of(fleet.read_rows(session))


def preview(session: Session, view: FleetView, vm: Vm, *, to_host_id: str) -> Decision:
    """Return where a new vm would go; its rows are there, perhaps in a transaction that is rolled back.

    Raises NoCapacity with the reasons by host where none fits, or where the chosen host's class can give no machine type.
    """
    needs = fleet.needs_of(session, [vm.id])[vm.id]
    ask = placement_cures.unasked(vm, PlacementKind.CREATE, to_host_id=to_host_id)
    request = placement_snapshot.request_of(ask, needs, source=None, groups=view.rows.groups)
    policy = placement_snapshot.policy_of(view.rows)(request)
    decision = explain(view.snapshot, request, policy=policy)
    if decision.chosen_host_id is None:
        decision = placement_cures.cured(session, decision, Books(view.snapshot), policy=policy, rows=view.rows)
        reasons = [verdict.sentence() for verdict in decision.refused[:REASONS_MAX]]
        raise NoCapacity(code_of(decision), decision.summary(), reasons="\n".join(reasons))
    if Gatekeeper.is_needed(view.rows):
        keeper = Gatekeeper()
        keeper.follow(session, view.rows, view.snapshot)
        (judged,) = keeper.judge([decision], {vm.id: needs})
        if judged.chosen_host_id is None:
            raise NoCapacity(code_of(judged), judged.summary(), reasons=judged.refused[0].sentence())
    class_id = next(host.host_class_id for host in view.rows.hosts if host.id == decision.chosen_host_id)
    lacking = placement_snapshot.lacks_baseline(view.rows, view.baselines, class_id)
    if lacking:
        raise NoCapacity("no-host-fits", lacking)
    return decision


def verdict(session: Session, view: FleetView, vm: Vm, host_id: str) -> HostVerdict | None:
    """Return what would be said of one host now, None where it is no member.

    Of a vm that holds compute: whether it could be moved there live; of its own host: whether it would fit there without itself.
    """
    if host_id not in view.snapshot.row_of:
        return None
    home = claims.homes_of(session, [vm.id]).get(vm.id)
    kind = PlacementKind.CREATE if not vm.host_id else PlacementKind.START
    if home is not None and home.host_id == host_id:
        view = _without(view, home.host_id, vcpus=home.vcpus, memory_mib=home.memory_mib)
    elif home is not None:
        kind = PlacementKind.MIGRATE
    needs = fleet.needs_of(session, [vm.id])[vm.id]
    source = next((host for host in view.rows.hosts if host.id == vm.host_id), None)
    ask = placement_cures.unasked(vm, kind)
    request = placement_snapshot.request_of(ask, needs, source=source.inventory if source else None, groups=view.rows.groups)
    return explain_host(view.snapshot, request, host_id, policy=placement_snapshot.policy_of(view.rows)(request))


def _without(view: FleetView, host_id: str, *, vcpus: int, memory_mib: int) -> FleetView:
    """Return the fleet as if this much were not claimed on the host."""
    hosts = tuple(
        replace(host, vcpus_claimed=host.vcpus_claimed - vcpus, memory_claimed_mib=host.memory_claimed_mib - memory_mib)
        if host.id == host_id
        else host
        for host in view.rows.hosts
    )
    return FleetView.of(replace(view.rows, hosts=hosts))
