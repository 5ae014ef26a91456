"""What the doctor found, as JSON."""

from dataclasses import dataclass
from datetime import datetime

from trimtab_controller.core.doctor import Finding
from trimtab_controller.services import doctor


@dataclass(frozen=True, slots=True, kw_only=True)
class FindingResource:
    # severe, warning, notice.
    severity: str
    # What sort of trouble; stable, for scripts.
    kind: str
    # Kind and name of what it is about: `host node1`, `vm shop/web1`.
    subject: str
    what: str
    # None where nobody wrote it down.
    since: datetime | None
    # The command to run next.
    cure: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FindingCountResource:
    severity: str
    kind: str
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorResource:
    # Nothing severe.
    is_well: bool
    # Worst first; the first thousand.
    items: tuple[FindingResource, ...]
    # Of all of them, worst first.
    counts: tuple[FindingCountResource, ...]
    total: int
    at: datetime


def render_doctor(found: tuple[Finding, ...], *, at: datetime) -> DoctorResource:
    counts = doctor.counted(found)
    return DoctorResource(
        is_well=not any(one.severity.value == "severe" for one in found),
        items=tuple(
            FindingResource(
                severity=one.severity.value, kind=one.kind, subject=one.subject, what=one.what, since=one.since, cure=one.cure
            )
            for one in found[: doctor.FINDINGS_MAX]
        ),
        counts=tuple(
            FindingCountResource(severity=severity, kind=kind, count=count) for (severity, kind), count in counts.items()
        ),
        total=len(found),
        at=at,
    )
