"""Answers "why not that host?" from what was decided, or by asking the scheduler again about that one host."""

from collections.abc import Callable

from sqlalchemy.orm import Session

from trimtab_controller.core.placement.verdict import Decision, HostVerdict
from trimtab_controller.store import hosts
from trimtab_protos.errors import NotFound


def why_not(session: Session, decision: Decision, host: str, *, ask_again: Callable[[str], HostVerdict] | None) -> str:
    """Return a sentence about the host (name or id). NotFound for a host that is none."""
    verdict = decision.verdict_of(host)
    if verdict is not None:
        return decision.why_not(verdict)
    found = hosts.find(session, host)
    if found is None:
        raise NotFound("host-not-found", f"why_not: there is no host {host}", field="why_not")
    verdict = decision.verdict_of(found.id)
    if verdict is None and ask_again is not None:
        verdict = ask_again(found.id)
    if verdict is None:
        return f"{found.name}: not listed in this decision; it joined later, or was neither among the best nor the closest"
    return decision.why_not(verdict)
