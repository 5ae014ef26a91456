"""Pools that fill up, and those that a host does not reach."""

from collections.abc import Iterator

from trimtab_controller.core.doctor.facts import FleetFacts
from trimtab_controller.core.doctor.finding import Finding, Severity
from trimtab_controller.core.model import Pool, PoolSpace

KINDS = ("pool-failed", "pool-filling", "pool-full")
GIB = 1 << 30
WARN_SHARE = 0.8
SEVERE_SHARE = 0.9


def check(facts: FleetFacts) -> Iterator[Finding]:
    for space in facts.spaces:
        pool = facts.pools.get(space.pool_id)
        host = facts.host_by_id.get(space.host_id)
        if pool is not None and space.capacity_bytes > 0 and (host is not None or not space.host_id):
            yield from _of_space(pool, space, host.name if host is not None else "")
    for reach in facts.pool_reach:
        pool, host = facts.pools.get(reach.subject_id), facts.host_by_id.get(reach.host_id)
        if pool is not None and host is not None and reach.state == "failed":
            yield Finding(
                severity=Severity.SEVERE,
                kind="pool-failed",
                subject=f"pool {pool.name}",
                what=f"host {host.name} does not reach it: {reach.problem or 'no reason was given'}",
                cure=f"trimtab pool get {pool.name}",
            )


def _of_space(pool: Pool, space: PoolSpace, host_name: str) -> Iterator[Finding]:
    """At the reserve nothing more is placed; past it guests that write are paused once the last byte is gone."""
    reserve_bytes = space.capacity_bytes * pool.reserve_permille // 1000
    used = 1 - space.available_bytes / space.capacity_bytes
    subject = f"pool {pool.name}" + (f" on {host_name}" if host_name else "")
    cure = f"trimtab pool get {pool.name}"
    if space.available_bytes <= reserve_bytes:
        what = f"it is {used:.0%} full, down to its reserve of {reserve_bytes / GIB:.1f} GiB: nothing more is placed there"
        yield Finding(severity=Severity.SEVERE, kind="pool-full", subject=subject, what=what, cure=cure)
    elif used >= WARN_SHARE:
        severity = Severity.SEVERE if used >= SEVERE_SHARE else Severity.WARNING
        what = f"it is {used:.0%} full, {space.available_bytes / GIB:.1f} GiB are left"
        yield Finding(severity=severity, kind="pool-filling", subject=subject, what=what, cure=cure)
