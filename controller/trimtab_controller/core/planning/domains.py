"""Failure domains: hosts that fail together, and pools."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from trimtab_controller.core.planning.estate import Estate

HOST = "host"
POOL = "pool"


@dataclass(frozen=True, slots=True)
class Domain:
    kind: str
    """`host`, `pool`, or the label's key."""
    value: str
    """The host's or pool's name, or the label's value."""
    host_ids: frozenset[str] = field(default_factory=frozenset)
    pool_id: str = ""

    @property
    def key(self) -> str:
        return f"{self.kind}:{self.value}"


def domains_of(estate: Estate, kinds: Iterable[str]) -> tuple[Domain, ...]:
    """Return the domains of these kinds: `host`, `pool` or label keys; hosts without a label are in no domain of it."""
    found: list[Domain] = []
    for kind in kinds:
        if kind == HOST:
            found += [Domain(HOST, host.name, frozenset({host.host_id})) for host in estate.fleet.hosts]
        elif kind == POOL:
            found += [Domain(POOL, pool.name, pool_id=pool.pool_id) for pool in estate.fleet.pools.values()]
        else:
            found += _of_label(estate, kind)
    return tuple(found)


def _of_label(estate: Estate, label: str) -> list[Domain]:
    members: defaultdict[str, set[str]] = defaultdict(set)
    for host in estate.fleet.hosts:
        if label in host.labels:
            members[host.labels[label]].add(host.host_id)
    return [Domain(label, value, frozenset(members[value])) for value in sorted(members)]
