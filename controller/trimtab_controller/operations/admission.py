"""Admission control on what the scheduler decided: the setting of a host class, the failover proof's answer."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

from trimtab_controller.core.model import HostClass
from trimtab_controller.core.placement.filters.intent import NOT_UP
from trimtab_controller.core.placement.fleet import FleetSnapshot
from trimtab_controller.core.placement.request import PlacementKind
from trimtab_controller.core.placement.verdict import Decision, HostVerdict, Refusal, Shortlist
from trimtab_controller.core.planning.admission import Admission, Objection
from trimtab_controller.core.planning.estate import Estate, VmSnapshot
from trimtab_controller.operations import estates
from trimtab_controller.store import estate_rows, fleet
from trimtab_controller.store.database import Session
from trimtab_controller.store.fleet import FleetRows, VmNeeds

ANY, ONE_HOST_LOSS = "any", "one-host-loss"
REFUSED = "admission-refused"
_FILTER = "admission"


class Gatekeeper:
    """Judges decisions in order, each counting those accepted before. The leader keeps one from batch to batch.

    `follow` brings it to what the database says now and reads only the vms that changed: reading a fleet of twenty thousand vms and
    proving all of it takes seconds, which a batch must not.
    """

    __slots__ = ("_admission", "_class_of", "_context", "_marks", "_rows", "vms")

    def __init__(self) -> None:
        self._admission: Admission | None = None
        self._context: object = None
        self._marks: Mapping[str, Hashable] = {}
        self.vms: dict[str, VmSnapshot] = {}
        """By id, as of the last `follow`."""
        self._rows: FleetRows | None = None
        self._class_of: dict[str, HostClass] = {}

    @staticmethod
    def is_needed(rows: FleetRows) -> bool:
        """Whether any class asks for it."""
        return any(known.admission == ONE_HOST_LOSS for known in rows.classes.values())

    def follow(self, session: Session, rows: FleetRows, snapshot: FleetSnapshot) -> None:
        """Bring it to the fleet of `rows` and to the vms of this session's snapshot."""
        marks, context = estate_rows.marks(session), _context(session, rows)
        known = self._marks if context == self._context else {}
        stale = [vm_id for vm_id, mark in marks.items() if known.get(vm_id) != mark]
        read = {vm.vm_id: vm for vm in estates.read_vms(session, rows, stale)}
        self.vms = {vm_id: read[vm_id] if vm_id in read else self.vms[vm_id] for vm_id in marks}
        self._marks, self._context, self._rows = marks, context, rows
        self._class_of = {host.id: rows.classes[host.host_class_id] for host in rows.hosts}
        estate = Estate.of(snapshot, self.vms.values())
        if self._admission is None:
            self._admission = Admission(estate)
        else:
            self._admission.follow(estate)

    def judge(self, decisions: Sequence[Decision], needs: Mapping[str, VmNeeds]) -> list[Decision]:
        """Return the decisions, refusals instead where a host's class holds to what survives and the vm would not.

        Only of new vms: the restart after a failover must not be refused because the next loss would not be survived.
        `needs`: by vm id.
        """
        objections: dict[str, Objection] = {}
        for is_bound, run in groupby(filter(_is_create, decisions), key=self._is_bound):
            vms = [self._as_placed(decision, needs[decision.request.vm_id]) for decision in run]
            if is_bound:
                objections |= self._kept.add_all(vms)
            else:
                self._kept.accept_all(vms)
        return [self._judged(decision, objections.get(decision.request.vm_id)) for decision in decisions]

    @property
    def _kept(self) -> Admission:
        assert self._admission is not None, "follow first"
        return self._admission

    def _is_bound(self, decision: Decision) -> bool:
        return self._class_of[decision.chosen_host_id or ""].admission == ONE_HOST_LOSS

    def _as_placed(self, decision: Decision, needs: VmNeeds) -> VmSnapshot:
        assert self._rows is not None, "follow first"
        return estates.as_placed(needs, decision.chosen_host_id or "", self._rows, cells=decision.cells)

    def _judged(self, decision: Decision, objection: Objection | None) -> Decision:
        if objection is None:
            return decision
        host_class = self._class_of[decision.chosen_host_id or ""]
        cure = f"add a host, or accept it with `trimtab host-class update {host_class.name} --admission {ANY}`"
        context: Mapping[str, str | int] = {"lost_host": objection.host_id, "vms": len(objection.vm_ids)}
        refusal = Refusal(_FILTER, REFUSED, f"{objection.message}; {cure}", context)
        chosen = decision.fitting.verdict(0)
        return replace(
            decision,
            fitting=Shortlist(),
            refused=(HostVerdict(chosen.host_id, chosen.host_name, (refusal,)), *decision.refused),
            fit_count=0,
            refused_by={**decision.refused_by, _FILTER: decision.fit_count},
            cells=(),
        )


def _is_create(decision: Decision) -> bool:
    return decision.chosen_host_id is not None and decision.request.kind is PlacementKind.CREATE


def _context(session: Session, rows: FleetRows) -> object:
    """Return what vms' needs depend on besides their own rows: the rules of groups, and networks."""
    return tuple((group.id, group.name, group.rules) for group in rows.groups.values()), fleet.network_facts(session)


def code_of(decision: Decision) -> str:
    """Return the code of a refusal: `admission-refused`, `host-not-up` of the one host that was named, else `no-host-fits`."""
    if _FILTER in decision.refused_by:
        return REFUSED
    named = [verdict for verdict in decision.refused if verdict.host_id == decision.request.required_host_id]
    return NOT_UP if any(one.code == NOT_UP for verdict in named for one in verdict.refusals) else "no-host-fits"
