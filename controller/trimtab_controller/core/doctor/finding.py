"""What the doctor finds, and in which order it is told. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum


class Severity(StrEnum):
    """Worst first."""

    # Vms are lost, or would be, by the next thing that goes wrong.
    SEVERE = "severe"
    # Becomes severe by itself, or takes a way out that is needed on a bad day.
    WARNING = "warning"
    # To know before acting.
    NOTICE = "notice"


_ORDER = {severity: position for position, severity in enumerate(Severity)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    severity: Severity
    kind: str
    """What sort of trouble, kebab-case and stable: scripts and metrics count by it."""
    subject: str
    """Kind and name of what it is about: `host node1`, `vm shop/web1`."""
    what: str
    cure: str
    """The command to run next."""
    since: datetime | None = None
    """None where nobody wrote it down."""


def ranked(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return the findings worst first; equals by age (the oldest first, unknown ages last), then by kind and subject.

    The order is total: it depends on what was found and not on the order in which it was.
    """
    return tuple(sorted(findings, key=_rank))


def _rank(finding: Finding) -> tuple[int, bool, float, str, str, str, str]:
    age = finding.since.timestamp() if finding.since is not None else 0.0
    return (_ORDER[finding.severity], finding.since is None, age, finding.kind, finding.subject, finding.what, finding.cure)
