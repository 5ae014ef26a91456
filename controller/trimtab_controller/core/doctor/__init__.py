"""Everything that will hurt, ranked: each check is a pure function from the fleet's facts to findings. One file per concern.

A new concern (backups, say) is a file that has `KINDS` and `check`, and one line in `_CONCERNS`; what it looks at besides is a
field of `FleetFacts`.
"""

from collections.abc import Callable, Iterable, Sequence

from trimtab_controller.core.doctor import (
    certificates,
    clocks,
    coverage,
    failover,
    hosts,
    mobility,
    networks,
    pools,
    protection,
    snapshots,
    unmanaged,
    vms,
)
from trimtab_controller.core.doctor.facts import FleetFacts
from trimtab_controller.core.doctor.finding import Finding, Severity, ranked

__all__ = ["CHECKS", "KINDS", "Finding", "FleetFacts", "Severity", "examine"]

Check = Callable[[FleetFacts], Iterable[Finding]]

_CONCERNS = (
    certificates,
    clocks,
    coverage,
    failover,
    hosts,
    mobility,
    networks,
    pools,
    protection,
    snapshots,
    unmanaged,
    vms,
)
CHECKS: Sequence[Check] = tuple(concern.check for concern in _CONCERNS)
# Every kind that a check may find, so that a gauge that fell to nothing is seen to have.
KINDS: Sequence[str] = tuple(sorted(kind for concern in _CONCERNS for kind in concern.KINDS))


def examine(facts: FleetFacts, checks: Sequence[Check] = CHECKS) -> tuple[Finding, ...]:
    """Return what all checks find, worst first; equal facts give the equal order, in whatever order their rows came."""
    return ranked(finding for check in checks for finding in check(facts))
