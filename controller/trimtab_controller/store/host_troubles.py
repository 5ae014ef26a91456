"""What is wrong with hosts that live, from what they reported: carriers in their inventories, and what each says of shared pools.

Both are rows that gateways wrote, so a new leader and every api know it, with or without Redis.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.host_troubles import LostCarrier, PoolView, Trouble, without_network, without_storage
from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.store import schema
from trimtab_controller.store.among import among
from trimtab_controller.store.host_reports import NOT_SHARED
from trimtab_controller.store.inventories import LOST_AT

_host, _network, _reach, _pool = schema.host, schema.network, schema.network_host, schema.pool_host
# Networks over a bridge of the operator's. NAT and isolated ones have one of ours without an uplink; OVN finds its own way.
_OVER_BRIDGES = ("bridge", "vlan")
_IS_UP = sa.and_(_host.c.deleted_at.is_(None), _host.c.connectivity == HostConnectivity.UP.value)
_TOLD = sa.select(_host.c.id, _host.c.inventory_at).where(_IS_UP, _host.c.inventory_at.is_not(None))
_BRIDGES = sa.select(_host.c.id, _host.c.inventory["bridges"].label("bridges")).where(_IS_UP, _host.c.inventory.is_not(None))
_BAD_POOLS = (
    sa.select(_pool.c.pool_id)
    .join(schema.pool, schema.pool.c.id == _pool.c.pool_id)
    .where(
        schema.pool.c.is_shared,
        schema.pool.c.deleted_at.is_(None),
        _pool.c.state.in_(("failed", "unresponsive")),
        ~_pool.c.problem.startswith(NOT_SHARED),
    )
    .distinct()
)


class Carriers:
    """The bridges without carrier of all hosts, for who asks each second: an inventory is read once. Belongs to one thread."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[datetime, tuple[LostCarrier, ...]]] = {}

    def read(self, session: Session) -> Mapping[str, tuple[LostCarrier, ...]]:
        """Return what hosts that are up lack; others are left out."""
        told = {row.id: row.inventory_at for row in session.execute(_TOLD)}
        changed = [host_id for host_id, at in told.items() if host_id not in self._known or self._known[host_id][0] != at]
        fresh = lost_carriers(session, changed) if changed else {}
        self._known = {host_id: known for host_id, known in self._known.items() if host_id in told}
        self._known |= {host_id: (told[host_id], fresh.get(host_id, ())) for host_id in changed}
        return {host_id: lost for host_id, (_at, lost) in self._known.items() if lost}


def lost_carriers(session: Session, host_ids: Collection[str] | None = None) -> Mapping[str, tuple[LostCarrier, ...]]:
    """Return the bridges without carrier of hosts that are up (of these)."""
    query = _BRIDGES if host_ids is None else _BRIDGES.where(among(_host.c.id, sorted(host_ids)))
    found = {row.id: tuple(_lost(row.bridges or ())) for row in session.execute(query)}
    return {host_id: lost for host_id, lost in found.items() if lost}


def _lost(bridges: Iterable[Mapping[str, Any]]) -> Iterable[LostCarrier]:
    for one in bridges:
        if not one.get("has_carrier", True):
            at = one.get(LOST_AT)
            yield LostCarrier(bridge=str(one["name"]), since=datetime.fromisoformat(at) if at else None)


def unlinked(session: Session, lost: Mapping[str, Iterable[LostCarrier]]) -> Mapping[tuple[str, str], str]:
    """Return {(network, host): bridge} of networks whose bridge on the host lacks its carrier."""
    return {(network_id, host_id): bridge for network_id, host_id, bridge, _name in _crossings(session, lost)}


def _crossings(session: Session, lost: Mapping[str, Iterable[LostCarrier]]) -> list[tuple[str, str, str, str]]:
    if not lost:
        return []
    bridge = sa.case((_reach.c.bridge != "", _reach.c.bridge), else_=_network.c.bridge)
    query = (
        sa.select(_reach.c.network_id, _reach.c.host_id, bridge.label("bridge"), _network.c.name)
        .join(_network, _network.c.id == _reach.c.network_id)
        .where(_network.c.deleted_at.is_(None), _network.c.kind.in_(_OVER_BRIDGES), among(_reach.c.host_id, sorted(lost)))
        .order_by(_network.c.name, _reach.c.network_id)
    )
    down = {(host_id, one.bridge) for host_id, bridges in lost.items() for one in bridges}
    return [tuple(row) for row in session.execute(query) if (row.host_id, row.bridge) in down]


def read(
    session: Session,
    *,
    now: datetime,
    host_ids: Collection[str] | None = None,
    lost: Mapping[str, tuple[LostCarrier, ...]] | None = None,
) -> Mapping[str, tuple[Trouble, ...]]:
    """Return what is wrong with hosts (of these) that are up. `lost`: their bridges without carrier, where they are at hand."""
    lost = lost_carriers(session, host_ids) if lost is None else lost
    networks: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for _network_id, host_id, bridge, name in _crossings(session, lost):
        networks[host_id][bridge].append(name)
    found = {host_id: without_network(bridges, networks[host_id]) for host_id, bridges in lost.items() if networks[host_id]}
    for host_id, pools in _without_storage(session, now=now).items():
        if host_ids is None or host_id in host_ids:
            found[host_id] = (*found.get(host_id, ()), *pools)
    return {host_id: troubles for host_id, troubles in found.items() if troubles}


def _without_storage(session: Session, *, now: datetime) -> Mapping[str, tuple[Trouble, ...]]:
    pool_ids = session.scalars(_BAD_POOLS).all()
    if not pool_ids:
        return {}
    pool = schema.pool
    query = (
        sa.select(_pool, pool.c.name)
        .join(pool, pool.c.id == _pool.c.pool_id)
        .join(_host, _host.c.id == _pool.c.host_id)
        .where(_IS_UP, _pool.c.pool_id.in_(pool_ids), _pool.c.state != "unknown", ~_pool.c.problem.startswith(NOT_SHARED))
    )
    views = [
        PoolView(
            pool_id=row.pool_id,
            pool=row.name,
            host_id=row.host_id,
            is_ready=row.state == "ready",
            is_hung=row.state == "unresponsive",
            problem=row.problem,
            observed_at=row.observed_at,
        )
        for row in session.execute(query)
    ]
    return without_storage(views, _kept_in(session, pool_ids), now=now)


def _kept_in(session: Session, pool_ids: Collection[str]) -> frozenset[tuple[str, str]]:
    """Return (pool, host) of the disks of vms that failover keeps."""
    vm, volume = schema.vm, schema.volume
    query = (
        sa.select(volume.c.pool_id, vm.c.host_id)
        .join(vm, vm.c.id == volume.c.vm_id)
        .where(volume.c.pool_id.in_(pool_ids), volume.c.deleted_at.is_(None), vm.c.deleted_at.is_(None), vm.c.ha == "restart")
        .distinct()
    )
    return frozenset((row.pool_id, row.host_id) for row in session.execute(query))
