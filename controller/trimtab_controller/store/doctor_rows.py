"""Reads the doctor's snapshot: a handful of queries over the whole fleet, none of them once per row."""

from collections import defaultdict
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.doctor.model import (
    CertificateFacts,
    FenceFacts,
    FleetFacts,
    HostFacts,
    OperationFacts,
    PoolFacts,
    VmFacts,
)
from trimtab_controller.core.lifecycle import LIVE_STATES, OperationState
from trimtab_controller.store import host_guards, schema

_LIVE = tuple(state.value for state in LIVE_STATES)


def read(session: Session, now: datetime) -> FleetFacts:
    """Return the fleet as it is in this transaction, without the failover proof, which others work out."""
    return FleetFacts(
        now=now, hosts=_hosts(session), pools=_pools(session), vms=_vms(session), parked_operations=_parked(session)
    )


def _parked(session: Session) -> tuple[OperationFacts, ...]:
    table = schema.operation
    query = sa.select(table.c.id, table.c.kind).where(table.c.state == OperationState.NEEDS_ATTENTION.value)
    return tuple(OperationFacts(id=row.id, kind=row.kind) for row in session.execute(query))


def _hosts(session: Session) -> tuple[HostFacts, ...]:
    table = schema.host
    certificates, fences = _certificates(session), _fences(session)
    armed = {host_id for host_id, guard in host_guards.read_all(session).items() if guard.is_armed}
    in_maintenance = set(session.scalars(sa.select(schema.host_maintenance.c.host_id)))
    query = sa.select(
        table.c.id,
        table.c.name,
        table.c.connectivity,
        table.c.connectivity_at,
        table.c.is_cordoned,
        table.c.memory_limit_mib,
        table.c.memory_claimed_mib,
        table.c.unmanaged_memory_mib,
        table.c.inventory,
    ).where(table.c.deleted_at.is_(None))
    found = []
    for row in session.execute(query):
        told = row.inventory or {}
        found.append(
            HostFacts(
                id=row.id,
                name=row.name,
                connectivity=row.connectivity,
                connectivity_at=row.connectivity_at,
                is_cordoned=row.is_cordoned,
                is_in_maintenance=row.id in in_maintenance,
                memory_limit_mib=row.memory_limit_mib,
                memory_claimed_mib=row.memory_claimed_mib,
                unmanaged_memory_mib=row.unmanaged_memory_mib,
                qemu_version=str(told.get("qemu_version", "")),
                cpu_models=frozenset(told.get("usable_cpu_models", ())),
                certificates=tuple(certificates[row.id]),
                fences=tuple(fences[row.id]),
                is_warden_armed=row.id in armed,
            )
        )
    return tuple(found)


def _certificates(session: Session) -> dict[str, list[CertificateFacts]]:
    """Return of each host and purpose the certificate that ends last; those before it were renewed."""
    table = schema.host_certificate
    newest = sa.func.max(table.c.not_after, type_=table.c.not_after.type)
    query = (
        sa.select(table.c.host_id, table.c.purpose, newest.label("not_after"))
        .where(table.c.revoked_at.is_(None))
        .group_by(table.c.host_id, table.c.purpose)
    )
    found: dict[str, list[CertificateFacts]] = defaultdict(list)
    for row in session.execute(query):
        found[row.host_id].append(CertificateFacts(purpose=row.purpose, not_after=row.not_after))
    return found


def _fences(session: Session) -> dict[str, list[FenceFacts]]:
    table = schema.fence_path
    found: dict[str, list[FenceFacts]] = defaultdict(list)
    for row in session.execute(sa.select(table).order_by(table.c.host_id, table.c.position)):
        fence = FenceFacts(name=row.name, tested_at=row.tested_at, test_power=row.test_power, test_message=row.test_message)
        found[row.host_id].append(fence)
    return found


def _pools(session: Session) -> tuple[PoolFacts, ...]:
    pool, space, reach, host = schema.pool, schema.pool_space, schema.pool_host, schema.host
    spaces = (
        sa.select(
            pool.c.name, host.c.name.label("host"), space.c.capacity_bytes, space.c.available_bytes, pool.c.reserve_permille
        )
        .join(space, space.c.pool_id == pool.c.id)
        .outerjoin(host, host.c.id == space.c.host_id)
        .where(pool.c.deleted_at.is_(None), host.c.deleted_at.is_(None))
    )
    broken = (
        sa.select(pool.c.name, host.c.name.label("host"), reach.c.problem)
        .join(reach, reach.c.pool_id == pool.c.id)
        .join(host, host.c.id == reach.c.host_id)
        .where(pool.c.deleted_at.is_(None), host.c.deleted_at.is_(None), reach.c.state == "failed")
    )
    full = [
        PoolFacts(
            name=row.name,
            host=row.host or "",
            capacity_bytes=row.capacity_bytes,
            available_bytes=row.available_bytes,
            reserve_permille=row.reserve_permille,
            problem="",
        )
        for row in session.execute(spaces)
    ]
    unusable = [
        PoolFacts(
            name=row.name,
            host=row.host,
            capacity_bytes=0,
            available_bytes=0,
            reserve_permille=0,
            problem=row.problem or "it cannot be used there",
        )
        for row in session.execute(broken)
    ]
    return (*full, *unusable)


def _vms(session: Session) -> tuple[VmFacts, ...]:
    vm, project, operation = schema.vm, schema.project, schema.operation
    busy = set(session.scalars(sa.select(operation.c.subject_id).where(operation.c.state.in_(_LIVE))))
    query = (
        sa.select(
            vm.c.id,
            project.c.name.label("project"),
            vm.c.name,
            vm.c.host_id,
            vm.c.cpu_model,
            vm.c.desired_power,
            vm.c.observed_state,
            vm.c.problem,
            vm.c.next_vcpus,
            vm.c.next_memory_mib,
            vm.c.ha,
        )
        .join(project, project.c.id == vm.c.project_id)
        .where(vm.c.deleted_at.is_(None))
    )
    return tuple(
        VmFacts(
            project=row.project,
            name=row.name,
            host_id=row.host_id,
            cpu_model=row.cpu_model,
            desired_power=row.desired_power,
            observed_state=row.observed_state,
            problem=row.problem,
            is_busy=row.id in busy,
            is_adjusted_at_next_stop=bool(row.next_vcpus or row.next_memory_mib),
            is_kept=row.ha == "restart",
        )
        for row in session.execute(query)
    )
