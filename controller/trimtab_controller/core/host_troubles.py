"""What is wrong with a host that lives: shown, told, and a reason to place nothing there that needs it; never one to call the host dead.

network-degraded   a bridge that networks of the fleet use has lost its carrier, while the host is heard from
storage-lost       a shared pool that kept vms of the host use answers others and not this one
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

FRESH = timedelta(seconds=60)
"""So long what a host said of a pool counts; it says it anew every ten seconds."""


class TroubleKind(StrEnum):
    NETWORK = "network-degraded"
    STORAGE = "storage-lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """One thing that is wrong with one host."""

    kind: TroubleKind
    what: str
    """The bridge's name; the pool's id."""
    message: str
    since: datetime | None = None
    """None where it is not on record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LostCarrier:
    """A bridge without carrier, as its host says."""

    bridge: str
    since: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolView:
    """What one host that is heard from says of one shared pool."""

    pool_id: str
    pool: str
    host_id: str
    is_ready: bool
    is_hung: bool
    problem: str
    observed_at: datetime | None


def without_network(lost: Sequence[LostCarrier], networks: Mapping[str, Sequence[str]]) -> tuple[Trouble, ...]:
    """Return the troubles of one host; `networks`: the names of those that it reaches over each bridge. Others do not count."""
    return tuple(
        Trouble(
            kind=TroubleKind.NETWORK,
            what=one.bridge,
            message=f"bridge {one.bridge} has lost its carrier",
            since=one.since,
        )
        for one in sorted(lost, key=lambda each: each.bridge)
        if networks.get(one.bridge)
    )


def without_storage(
    views: Collection[PoolView], used: Collection[tuple[str, str]], *, now: datetime
) -> Mapping[str, tuple[Trouble, ...]]:
    """Return each host's lost pools; `used`: (pool, host) of kept vms' disks.

    A pool counts only where another host says that it is fine, both lately: a server that is down for all is nobody's reason to move.
    """
    lately = [one for one in views if one.observed_at is not None and now - one.observed_at <= FRESH]
    healthy = {one.pool_id for one in lately if one.is_ready}
    found: dict[str, tuple[Trouble, ...]] = {}
    for one in sorted(lately, key=lambda each: (each.host_id, each.pool)):
        if one.is_ready or one.pool_id not in healthy or (one.pool_id, one.host_id) not in used:
            continue
        why = "does not answer" if one.is_hung or not one.problem else f"cannot be used: {one.problem}"
        trouble = Trouble(kind=TroubleKind.STORAGE, what=one.pool_id, message=f"pool {one.pool} {why}")
        found[one.host_id] = (*found.get(one.host_id, ()), trouble)
    return found
