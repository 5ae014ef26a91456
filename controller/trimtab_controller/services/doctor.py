"""The doctor's use case: the fleet's facts from SQL, gateways and the failover proof, and what the checks find in them."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

from sqlalchemy.orm import Session

from trimtab_controller.core.doctor import Finding, FleetFacts, examine
from trimtab_controller.core.doctor.facts import UncoveredFacts
from trimtab_controller.core.planning import Estate
from trimtab_controller.core.planning.domains import HOST, domains_of
from trimtab_controller.core.planning.proof import DomainProof, FailoverProof
from trimtab_controller.services.survival import USUAL_LABELS
from trimtab_controller.store import doctor

# One answer's worth. There may be a finding for each vm; their counts are told in full.
FINDINGS_MAX = 1000


def read(session: Session, *, now: datetime) -> FleetFacts:
    """Return the facts that SQL has; a fixed number of queries."""
    return doctor.read(session, now=now)


def prove(estate: Estate) -> tuple[UncoveredFacts, ...]:
    """Return what the failover proof says of this estate. Takes seconds for a large fleet."""
    return uncovered_of(FailoverProof(estate, domains_of(estate, (HOST, *USUAL_LABELS))).results())


def uncovered_of(results: Iterable[DomainProof]) -> tuple[UncoveredFacts, ...]:
    return tuple(
        UncoveredFacts(kind=one.domain.kind, value=one.domain.value, vm_ids=one.uncovered) for one in results if one.uncovered
    )


def skews_of(states: Mapping[str, Mapping[str, Any]]) -> Mapping[str, int]:
    """Return the clock skews in hosts' states as gateways wrote them, in ms."""
    return {host_id: int(state["skew_ms"]) for host_id, state in states.items() if state.get("skew_ms")}


def judge(
    facts: FleetFacts, *, uncovered: tuple[UncoveredFacts, ...] = (), skews_ms: Mapping[str, int] | None = None
) -> tuple[Finding, ...]:
    """Return everything that will hurt, worst first."""
    return examine(replace(facts, uncovered=uncovered, skews_ms=skews_ms or {}))


def counted(findings: Iterable[Finding]) -> Mapping[tuple[str, str], int]:
    """Return how many there are by severity and kind."""
    return Counter((one.severity.value, one.kind) for one in findings)
