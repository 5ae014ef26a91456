"""Everything that will hurt, ranked: each concern is a file with pure checks over one snapshot, registered here."""

from collections.abc import Sequence

from trimtab_controller.core.doctor import certificates, fences, hosts, operations, pools, vms
from trimtab_controller.core.doctor.model import Check, Finding, FleetFacts, Severity

CHECKS: tuple[Check, ...] = (
    certificates.expiring,
    hosts.silent,
    hosts.cordoned,
    hosts.crowded,
    hosts.older_qemu,
    pools.full,
    pools.unusable,
    vms.troubled,
    vms.waiting_for_a_stop,
    vms.stuck,
    vms.uncovered,
    fences.untested,
    fences.missing,
    operations.parked,
)
_RANK = {severity: rank for rank, severity in enumerate(Severity)}


def examine(fleet: FleetFacts, checks: Sequence[Check] = CHECKS) -> tuple[Finding, ...]:
    """Return what every check found, the worst first, then by kind and subject."""
    found = [finding for check in checks for finding in check(fleet)]
    return tuple(sorted(found, key=lambda one: (_RANK[one.severity], one.kind, one.subject, one.message)))
