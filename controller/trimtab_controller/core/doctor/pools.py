"""Pools that are full, nearly so, or not usable."""

from trimtab_controller.core.doctor.model import Finding, FleetFacts, PoolFacts, Severity

CRITICAL_PERMILLE = 20
"""Below this much free space guests are about to be paused by failed writes, whatever the reserve."""

_NAMED = 8

NOTICE_PERMILLE = 200
WARN_PERMILLE = 100


def full(fleet: FleetFacts) -> tuple[Finding, ...]:
    found = []
    for pool in fleet.pools:
        if pool.problem or not pool.capacity_bytes:
            continue
        left_permille = pool.available_bytes * 1000 // pool.capacity_bytes
        if left_permille > max(pool.reserve_permille, CRITICAL_PERMILLE):
            continue
        severity = Severity.CRITICAL if left_permille <= CRITICAL_PERMILLE else Severity.WARNING
        words = (
            f"{left_permille / 10:g} % of it is free, its reserve is {pool.reserve_permille / 10:g} %: it takes no more volumes"
        )
        found.append(_finding(pool, severity, "pool-full", words, "trimtab volume list"))
    return tuple(found)


def filling(fleet: FleetFacts) -> tuple[Finding, ...]:
    """Not down to the reserve yet, which `full` tells."""
    found = []
    for pool in fleet.pools:
        if pool.problem or not pool.capacity_bytes:
            continue
        left_permille = pool.available_bytes * 1000 // pool.capacity_bytes
        if max(pool.reserve_permille, CRITICAL_PERMILLE) < left_permille <= NOTICE_PERMILLE:
            severity = Severity.WARNING if left_permille <= WARN_PERMILLE else Severity.NOTICE
            words = f"{100 - left_permille / 10:g} % of it is used, at {100 - pool.reserve_permille / 10:g} % it takes no more volumes"
            found.append(_finding(pool, severity, "pool-filling", words, f"trimtab pool get {pool.name}"))
    return tuple(found)


def unusable(fleet: FleetFacts) -> tuple[Finding, ...]:
    return tuple(
        _finding(
            pool,
            Severity.CRITICAL,
            "pool-unresponsive" if pool.is_unresponsive else "pool-unusable",
            pool.problem + _concerned(pool),
            f"trimtab pool get {pool.name}",
        )
        for pool in fleet.pools
        if pool.problem
    )


def _concerned(pool: PoolFacts) -> str:
    """Say whose disks are there, and how they come back."""
    if not pool.vms:
        return ""
    names = ", ".join(pool.vms[:_NAMED]) + (f" and {len(pool.vms) - _NAMED} more" if len(pool.vms) > _NAMED else "")
    way = "they go on when it answers" if pool.is_unresponsive else "they need it to start"
    return f"; it has disks of {names}: {way}"


def _finding(pool: PoolFacts, severity: Severity, kind: str, words: str, cure: str) -> Finding:
    place = f" on {pool.host}" if pool.host else ""
    return Finding(severity=severity, kind=kind, subject=f"pool {pool.name}{place}", message=words, cure=cure)
