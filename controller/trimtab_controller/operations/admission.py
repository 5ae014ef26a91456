"""Admission control on what the scheduler decided: the setting of a host class, the failover proof's answer."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime

from trimtab_controller.core.placement.request import PlacementKind
from trimtab_controller.core.placement.verdict import Decision, HostVerdict, Refusal, Shortlist
from trimtab_controller.core.planning.admission import Admission
from trimtab_controller.operations import estates
from trimtab_controller.store.database import Session
from trimtab_controller.store.fleet import FleetRows, VmNeeds

ANY, ONE_HOST_LOSS = "any", "one-host-loss"
REFUSED = "admission-refused"
_FILTER = "admission"


class Gatekeeper:
    """Judges the decisions of one batch in order, each counting those accepted before."""

    def __init__(self, session: Session, rows: FleetRows, *, now: datetime) -> None:
        self._rows = rows
        self._class_of = {host.id: rows.classes[host.host_class_id] for host in rows.hosts}
        self._admission = Admission(estates.read_estate(session, now=now))

    @staticmethod
    def is_needed(rows: FleetRows) -> bool:
        """Whether any class asks for it: the proof of a whole fleet costs seconds where it is large."""
        return any(known.admission == ONE_HOST_LOSS for known in rows.classes.values())

    def judge(self, decision: Decision, needs: VmNeeds) -> Decision:
        """Return the decision, or a refusal where its host's class holds to what survives and this would not.

        Only of new vms: the restart after a failover must not be refused because the next loss would not be survived.
        """
        host_id = decision.chosen_host_id
        if host_id is None or decision.request.kind is not PlacementKind.CREATE:
            return decision
        objection = self._admission.add(estates.as_placed(needs, host_id, self._rows, cells=decision.cells))
        host_class = self._class_of[host_id]
        if objection is None or host_class.admission != ONE_HOST_LOSS:
            return decision
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


def code_of(decision: Decision) -> str:
    """Return the code of a refusal: `admission-refused`, else `no-host-fits`."""
    return REFUSED if _FILTER in decision.refused_by else "no-host-fits"
