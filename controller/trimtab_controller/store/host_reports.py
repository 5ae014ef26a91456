"""What hosts report, as rows: inventory and limits, unmanaged domains' share, pools' state and space. And what they are told."""

import hashlib
import ipaddress
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from trimtab_controller.core.model import Pool
from trimtab_controller.store import describe, host_stocks, hosts, inventories, schema, snapshots
from trimtab_controller.store.rows import build, columns_of
from trimtab_protos.messages import Inventory, NetworkKind, NetworkSpec, PoolKind, PoolObservation, PoolSpec

_host = schema.host

# How the problem of a host begins that has another storage at a shared pool's path. The path answers all the same, so heartbeats
# say nothing about it: only a marker that is read proves the opposite (`operations/reach_steps.py`).
NOT_SHARED = "not the same storage"

_SEEN_OF_SPACE = ("capacity_bytes", "available_bytes", "written_bytes", "observed_at")


def store_inventory(session: Session, host_id: str, inventory: Inventory, *, now: datetime) -> bool:
    """Store what a host says it is, with the limits of its class; False where its digest is the one we have.

    The unmanaged share and MACs are part of it: they count as used, and ours must not collide with them.
    """
    before = session.execute(
        sa.select(_host.c.inventory_digest, _host.c.host_class_id, _host.c.migration_address).where(_host.c.id == host_id)
    ).one()
    if inventory.digest and before.inventory_digest == inventory.digest[:64]:
        return False  # a thousand hosts that come back at once say what they said before
    document = inventories.to_json(inventory)
    digest = inventory.digest[:64] or hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    if before.inventory_digest == digest:
        return False
    if not all(bridge.has_carrier for bridge in inventory.bridges):
        stored = session.scalar(sa.select(_host.c.inventory).where(_host.c.id == host_id))
        inventories.note_lost_carriers(document, stored, now=now)
    session.execute(
        _host.update()
        .where(_host.c.id == host_id)
        .values(
            inventory=document,
            inventory_digest=digest,
            inventory_at=now,
            migration_address=_migration_address(session, host_id, inventory.migration_address, before.migration_address),
            unmanaged_vcpus=max(0, inventory.unmanaged_vcpus),
            unmanaged_memory_mib=max(0, inventory.unmanaged_memory_mib),
            generation=_host.c.generation + 1,
            version=_host.c.version + 1,
        )
    )
    hosts.set_limits(session, host_id, inventory, hosts.get_class(session, before.host_class_id))
    host_stocks.set_reported(session, host_id, inventory)
    _store_unmanaged_macs(session, host_id, inventory.unmanaged_macs)
    return True


def _migration_address(session: Session, host_id: str, reported: str, present: str) -> str:
    """Return the address to keep: what is reported, unless it is none or another host's.

    The next libvirt certificate of the host names it, so a host that claims its neighbour's could stand in for it.
    """
    if reported == present or not is_own_address(session, host_id, reported):
        return present
    return reported


def is_own_address(session: Session, host_id: str, address: str) -> bool:
    """Tell whether a host may have this migration address: a usable one that no other live host has (loopback is nobody's)."""
    try:
        number = ipaddress.ip_address(address)
    except ValueError:
        return False
    if number.is_unspecified or number.is_multicast:
        return False
    if number.is_loopback:
        return True
    query = sa.select(_host.c.id).where(_host.c.migration_address == address, _host.c.id != host_id, _host.c.deleted_at.is_(None))
    return session.execute(query.limit(1)).first() is None


def _store_unmanaged_macs(session: Session, host_id: str, macs: Sequence[str]) -> None:
    table = schema.unmanaged_mac
    known = set(session.scalars(sa.select(table.c.mac).where(table.c.host_id == host_id)))
    reported = {mac.lower() for mac in macs if len(mac) <= 17}
    if gone := known - reported:
        session.execute(table.delete().where(table.c.host_id == host_id, table.c.mac.in_(sorted(gone))))
    if fresh := reported - known:
        session.execute(table.insert(), [{"host_id": host_id, "mac": mac} for mac in sorted(fresh)])


@dataclass(frozen=True, slots=True)
class PoolReport:
    """A pool as one host saw it."""

    host_id: str
    pool: PoolObservation


def store_pools(session: Session, reports: Sequence[PoolReport], *, now: datetime) -> None:
    """Store what hosts see of pools that they are mapped to; others are ignored. Claimed space is the leader's and stays."""
    mapping, pool, space = schema.pool_host, schema.pool, schema.pool_space
    host_ids = sorted({report.host_id for report in reports})
    query = (
        sa.select(mapping.c.pool_id, mapping.c.host_id, mapping.c.state, mapping.c.problem, pool.c.is_shared, pool.c.kind)
        .join(pool, pool.c.id == mapping.c.pool_id)
        .where(mapping.c.host_id.in_(host_ids), pool.c.deleted_at.is_(None))
    )
    known = {(row.pool_id, row.host_id): row for row in session.execute(query)}
    states: dict[tuple[str, str], dict[str, Any]] = {}
    spaces: dict[tuple[str, str], dict[str, Any]] = {}
    for report in reports:
        row = known.get((report.pool.pool_id, report.host_id))
        if row is None:
            continue
        seen = report.pool
        state, problem = _judge_pool(row.state, row.problem, seen)
        states[(seen.pool_id, report.host_id)] = {
            "of_pool": seen.pool_id,
            "of_host": report.host_id,
            "state": state,
            "problem": problem[:500],
            "observed_at": now,
        }
        # Of a Ceph pool hosts see the space only while they have its key: what was seen last stays.
        if state == "ready" and not (row.kind == PoolKind.RBD and not seen.capacity_bytes):
            place = schema.SHARED if row.is_shared else report.host_id
            spaces[(seen.pool_id, place)] = {
                "pool_id": seen.pool_id,
                "host_id": place,
                "capacity_bytes": max(0, seen.capacity_bytes),
                "available_bytes": max(0, seen.available_bytes),
                "written_bytes": None if seen.written_bytes is None else max(0, seen.written_bytes),
                "observed_at": now,
            }
    # One order everywhere: two gateways that write the same shared pools must not wait for each other in a circle.
    if states:
        changed = mapping.update().where(
            mapping.c.pool_id == sa.bindparam("of_pool"), mapping.c.host_id == sa.bindparam("of_host")
        )
        session.connection().execute(changed, [states[key] for key in sorted(states)])
    if spaces:
        insert = _insert(session, space)
        session.execute(
            insert.on_conflict_do_update(
                index_elements=["pool_id", "host_id"],
                set_={name: insert.excluded[name] for name in _SEEN_OF_SPACE},
            ),
            [spaces[key] for key in sorted(spaces)],
        )


def _judge_pool(state: str, problem: str, seen: PoolObservation) -> tuple[str, str]:
    """Return (state, problem) of a pool on a host after a heartbeat.

    A heartbeat moves a pool between ready, failed and unresponsive. Only preparing the host makes an unknown one ready, and only a
    marker that is read ends `NOT_SHARED`.
    """
    is_well = seen.is_responsive and not seen.problem
    if state == "failed" and problem.startswith(NOT_SHARED):
        return state, problem
    problem = "" if is_well else seen.problem or "the folder does not answer"
    if state == "unknown":
        return state, problem
    if is_well:
        return "ready", problem
    return "unresponsive" if seen.is_hung else "failed", problem


def _insert(session: Session, table: sa.Table) -> Any:
    return postgresql.insert(table) if session.get_bind().dialect.name == "postgresql" else sqlite.insert(table)


def map_everything(session: Session, host_id: str) -> None:
    """Give a new host a row, state unknown, for every live pool and network; rows that are there stay."""
    for things, mapping, key in (
        (schema.pool, schema.pool_host, "pool_id"),
        (schema.network, schema.network_host, "network_id"),
    ):
        mapped = sa.select(mapping.c[key]).where(mapping.c.host_id == host_id)
        missing = session.scalars(sa.select(things.c.id).where(things.c.deleted_at.is_(None), things.c.id.not_in(mapped))).all()
        if missing:
            session.execute(mapping.insert(), [{key: one, "host_id": host_id, "state": "unknown"} for one in missing])


def pool_specs_of(session: Session, host_id: str) -> tuple[PoolSpec, ...]:
    """Return the live pools that are mapped to the host."""
    pool, mapping = schema.pool, schema.pool_host
    query = (
        sa.select(*columns_of(pool, Pool))
        .join(mapping, mapping.c.pool_id == pool.c.id)
        .where(mapping.c.host_id == host_id, pool.c.deleted_at.is_(None))
        .order_by(pool.c.id)
    )
    found = [describe.pool_spec(build(Pool, row)) for row in session.execute(query)]
    # An agent of an earlier release takes no message with a kind that it does not know.
    return tuple(
        spec
        for spec in found
        if spec.kind not in describe.BLOCK_KINDS or snapshots.is_known_to(session, host_id, f"pool-{spec.kind.value}")
    )


def network_specs_of(session: Session, host_id: str) -> tuple[NetworkSpec, ...]:
    """Return the live networks that are mapped to the host, as they are there."""
    network, mapping = schema.network, schema.network_host
    query = (
        sa.select(network, mapping.c.bridge.label("own_bridge"))
        .join(mapping, mapping.c.network_id == network.c.id)
        .where(mapping.c.host_id == host_id, network.c.deleted_at.is_(None), network.c.kind.in_([k.value for k in NetworkKind]))
        .order_by(network.c.id)
    )
    return tuple(
        NetworkSpec(
            network_id=row.id,
            kind=NetworkKind(row.kind),
            name=row.name,
            bridge=row.own_bridge or row.bridge,
            vlan=row.vlan,
            mtu=row.mtu,
            subnet=row.subnet,
            has_dhcp=row.has_dhcp,
            is_outer="outer" in row.settings,
            keeps_groups=row.kind == "overlay",
        )
        for row in session.execute(query)
    )
