"""What the doctor looks at, of the whole fleet at once: a fixed number of queries whatever its size."""

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.doctor.facts import CertificateFacts, FleetFacts, ReachFacts, SnapshotFacts, VmFacts
from trimtab_controller.core.model import HostClass, Network, Pool, PoolSpace
from trimtab_controller.store import failover, hosts, schema
from trimtab_controller.store.rows import build, columns_of


def read(session: Session, *, now: datetime) -> FleetFacts:
    """Return the facts that SQL has; what gateways hear and what the failover proof says is for the caller to add."""
    pool, network, host_class, guard = schema.pool, schema.network, schema.host_class, schema.host_guard
    live_pools = sa.select(*columns_of(pool, Pool)).where(pool.c.deleted_at.is_(None))
    live_networks = sa.select(*columns_of(network, Network)).where(network.c.deleted_at.is_(None))
    held = sa.select(schema.host_maintenance.c.host_id, schema.host_maintenance.c.created_at)
    return FleetFacts(
        now=now,
        hosts=hosts.live(session),
        classes={row.id: build(HostClass, row) for row in session.execute(sa.select(*columns_of(host_class, HostClass)))},
        vms=_vms(session),
        certificates=_certificates(session),
        pools={row.id: build(Pool, row) for row in session.execute(live_pools)},
        spaces=tuple(build(PoolSpace, row) for row in session.execute(sa.select(schema.pool_space))),
        pool_reach=_reach(session, schema.pool_host, "pool_id"),
        networks=tuple(build(Network, row) for row in session.execute(live_networks)),
        network_reach=_reach(session, schema.network_host, "network_id"),
        control=failover.control(session),
        fence_paths=failover.fence_paths(session),
        armed=frozenset(session.scalars(sa.select(guard.c.host_id).where(guard.c.is_armed))),
        maintenance={row.host_id: row.created_at for row in session.execute(held)},
        snapshots=_snapshots(session),
    )


def _vms(session: Session) -> tuple[VmFacts, ...]:
    vm, project = schema.vm, schema.project
    columns = [*columns_of(vm, VmFacts), project.c.name.label("project")]
    query = sa.select(*columns).join(project, project.c.id == vm.c.project_id).where(vm.c.deleted_at.is_(None))
    return tuple(build(VmFacts, row) for row in session.execute(query))


def _certificates(session: Session) -> tuple[CertificateFacts, ...]:
    """Return the newest one by host and purpose, also where it has expired."""
    table, host = schema.host_certificate, schema.host
    query = (
        sa.select(*columns_of(table, CertificateFacts))
        .join(host, host.c.id == table.c.host_id)
        .where(host.c.deleted_at.is_(None), table.c.revoked_at.is_(None))
        .order_by(table.c.created_at, table.c.not_after)
    )
    newest = {(row.host_id, row.purpose): row for row in session.execute(query)}
    return tuple(build(CertificateFacts, row) for row in newest.values())


def _reach(session: Session, table: sa.Table, subject: str) -> tuple[ReachFacts, ...]:
    columns: list[sa.ColumnElement[Any]] = [table.c[subject].label("subject_id"), table.c.host_id, table.c.state, table.c.problem]
    columns.append(table.c.bridge if "bridge" in table.c else sa.literal("").label("bridge"))
    return tuple(build(ReachFacts, row) for row in session.execute(sa.select(*columns)))


def _snapshots(session: Session) -> tuple[SnapshotFacts, ...]:
    """Return the oldest of each vm, and how many it keeps; those that only serve a clone under way do not count."""
    table = schema.snapshot
    query = (
        sa.select(table.c.vm_id, table.c.name, table.c.created_at)
        .where(table.c.deleted_at.is_(None), table.c.is_temporary.is_(False), table.c.state == "ready")
        .order_by(table.c.vm_id, table.c.created_at, table.c.id)
    )
    found: dict[str, SnapshotFacts] = {}
    for row in session.execute(query):
        oldest = found.get(row.vm_id)
        name, created_at, count = (oldest.name, oldest.created_at, oldest.count + 1) if oldest else (row.name, row.created_at, 1)
        found[row.vm_id] = SnapshotFacts(vm_id=row.vm_id, name=name, created_at=created_at, count=count)
    return tuple(found.values())
