"""Answers "why not that host?" from what was decided, or by asking the scheduler again about that one host."""

from sqlalchemy.orm import Session

from trimtab_controller.core.model import Vm
from trimtab_controller.core.placement.verdict import Decision
from trimtab_controller.services import placement_advisor
from trimtab_controller.store import hosts
from trimtab_protos.errors import NotFound


def why_not(session: Session, vm: Vm, decision: Decision, host: str) -> str:
    """Return a sentence about the host (name or id). NotFound for a host that is none."""
    verdict = decision.verdict_of(host)
    if verdict is not None:
        return decision.why_not(verdict)
    found = hosts.find(session, host)
    if found is None:
        raise NotFound("host-not-found", f"why_not: there is no host {host}", field="why_not")
    verdict = decision.verdict_of(found.id)
    if verdict is not None:
        return decision.why_not(verdict)
    verdict = placement_advisor.verdict(session, placement_advisor.read_fleet(session), vm, found.id)
    if verdict is None:
        return f"{found.name}: it is no member of the fleet any more"
    return f"{decision.why_not(verdict)} (as things are now: the decision does not list it)"
