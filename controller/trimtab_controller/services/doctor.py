"""Everything that will hurt: the fleet's rows and its failover proof, put before the checks of `core/doctor`."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from sqlalchemy.orm import Session

from trimtab_controller.core.doctor import examine
from trimtab_controller.core.doctor.model import BackupFacts, Finding, FleetFacts, UncoveredFacts
from trimtab_controller.core.planning import Estate
from trimtab_controller.core.planning.domains import HOST, Domain
from trimtab_controller.core.planning.proof import FailoverProof
from trimtab_controller.operations.estates import read_estate
from trimtab_controller.services import backup_status, survival
from trimtab_controller.store import backup_repos, doctor_rows, identity


@dataclass(frozen=True, slots=True)
class Patient:
    """What one transaction read."""

    rows: FleetFacts
    estate: Estate


def read(session: Session, *, now: datetime, host_states: Mapping[str, Mapping[str, Any]] | None = None) -> Patient:
    """Return the rows and, of `host_states` (as gateways last wrote them), what SQL does not know: the hosts' clocks."""
    rows, states = doctor_rows.read(session, now), host_states or {}
    hosts = tuple(replace(host, skew_ms=int(states.get(host.id, {}).get("skew_ms") or 0)) for host in rows.hosts)
    return Patient(replace(rows, hosts=hosts, overdue_backups=_overdue(session, now)), read_estate(session, now=now))


def _overdue(session: Session, now: datetime) -> tuple[BackupFacts, ...]:
    if not backup_repos.policies(session):
        return ()
    overdue = [
        one
        for one in backup_status.status(session, project_ids=None, now=now)
        if one.policy is not None and one.protection.problem
    ]
    projects = {project_id: identity.find_project(session, project_id) for project_id in {one.vm.project_id for one in overdue}}
    names = {project_id: project.name for project_id, project in projects.items() if project is not None}
    return tuple(
        BackupFacts(
            project=names.get(one.vm.project_id, one.vm.project_id),
            vm=one.vm.name,
            policy=one.policy.name,
            problem=one.protection.problem,
            is_lost=one.protection.last_good is None,
            since=one.protection.last_good.taken_at if one.protection.last_good is not None else one.vm.backup_asked_at,
        )
        for one in overdue
        if one.policy is not None
    )


def diagnose(patient: Patient) -> tuple[Finding, ...]:
    """Return the findings, the worst first. Takes seconds for a large fleet: call it on a thread."""
    uncovered = [
        UncoveredFacts(vm=lost.vm, domain=_place(one.proof.domain), reason=lost.reason)
        for one in survival.coverage(patient.estate).domains
        for lost in one.uncovered
    ]
    return examine(replace(patient.rows, uncovered=tuple(uncovered)))


def diagnose_with(patient: Patient, proof: FailoverProof) -> tuple[Finding, ...]:
    """As `diagnose`, by a proof that is at hand and kept up: reasons are left out, since nobody reads them."""
    uncovered = [
        UncoveredFacts(vm=proof.estate.vms[vm_id].name, domain=_place(one.domain), reason="")
        for one in proof.results()
        if one.domain.kind in _LOST_WITH
        for vm_id in one.uncovered
    ]
    return examine(replace(patient.rows, uncovered=tuple(uncovered)))


# A pool that is lost ends the vms on it in every fleet; other labels are domains where they are asked for.
_LOST_WITH = frozenset({HOST, *survival.USUAL_LABELS})


def _place(domain: Domain) -> str:
    return f"{domain.kind} {domain.value}"


def counted(findings: Iterable[Finding]) -> Counter[tuple[str, str]]:
    """Return how many there are by severity and kind: the metric's labels, both bounded."""
    return Counter((one.severity.value, one.kind) for one in findings)
