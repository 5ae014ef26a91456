"""Everything that will hurt, ranked: each concern is a file with pure checks over one snapshot, registered here."""

from collections.abc import Sequence

from trimtab_controller.core.doctor import (
    backups,
    certificates,
    clocks,
    failover,
    fences,
    guest_agents,
    hosts,
    mobility,
    networks,
    operations,
    overlays,
    pools,
    protection,
    snapshots,
    vms,
)
from trimtab_controller.core.doctor.model import Check, Finding, FleetFacts, Severity

CHECKS: tuple[Check, ...] = (
    certificates.expiring,
    clocks.skewed,
    failover.standing_still,
    hosts.silent,
    hosts.troubled,
    hosts.cordoned,
    hosts.crowded,
    hosts.shared,
    hosts.older_qemu,
    hosts.guests_on_other_qemu,
    mobility.bound,
    networks.mismatched,
    networks.unreachable,
    overlays.unwritten,
    overlays.without_gateway,
    pools.full,
    pools.filling,
    pools.unusable,
    vms.troubled,
    vms.changed_by_hand,
    vms.waiting_for_a_stop,
    vms.stuck,
    vms.uncovered,
    guest_agents.stale,
    fences.untested,
    protection.thin,
    snapshots.old,
    backups.overdue,
    fences.missing,
    operations.parked,
)
_RANK = {severity: rank for rank, severity in enumerate(Severity)}


def examine(fleet: FleetFacts, checks: Sequence[Check] = CHECKS) -> tuple[Finding, ...]:
    """Return what every check found, the worst first, then by kind and subject.

    The order is total: it depends on what was found, not on the order in which rows came.
    """
    return tuple(sorted((finding for check in checks for finding in check(fleet)), key=_rank))


def _rank(one: Finding) -> tuple[int, str, str, str, str, float]:
    since = one.since.timestamp() if one.since is not None else 0.0
    return (_RANK[one.severity], one.kind, one.subject, one.message, one.cure, since)
