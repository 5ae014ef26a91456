"""Reads the doctor's snapshot: a handful of queries over the whole fleet, none of them once per row."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core import cpu_features
from trimtab_controller.core.doctor.model import (
    CertificateFacts,
    FenceFacts,
    FleetFacts,
    HostFacts,
    NetworkFacts,
    OperationFacts,
    PoolFacts,
    RouterFacts,
    SnapshotFacts,
    VmFacts,
)
from trimtab_controller.core.host_troubles import Trouble
from trimtab_controller.core.lifecycle import LIVE_STATES, OperationState
from trimtab_controller.store import behind, failover, host_guards, host_troubles, overlays, pools, schema
from trimtab_controller.store.among import among

_LIVE = tuple(state.value for state in LIVE_STATES)


def read(session: Session, now: datetime) -> FleetFacts:
    """Return the fleet as it is in this transaction, without the failover proof, which others work out."""
    control, overlay, past = failover.control(session), overlays.state(session), behind.state(session)
    # MTUs by host and bridge: told in inventories, which are read with the hosts.
    bridges: dict[tuple[str, str], int] = {}
    return FleetFacts(
        now=now,
        hosts=_hosts(session, bridges, host_troubles.read(session, now=now)),
        pools=_pools(session),
        vms=_vms(session),
        parked_operations=_parked(session),
        networks=_networks(session, bridges),
        routers=_routers(session),
        overlay_problem=overlay.problem,
        overlay_since=overlay.since,
        snapshots=_snapshots(session),
        is_failover_paused=control.is_paused,
        failover_frozen=control.frozen,
        database_behind=past.message,
        database_behind_since=past.since,
    )


def _networks(session: Session, bridges: dict[tuple[str, str], int]) -> tuple[NetworkFacts, ...]:
    network, mapping, host = schema.network, schema.network_host, schema.host
    mtus: dict[str, dict[str, int]] = defaultdict(dict)
    problems: dict[str, dict[str, str]] = defaultdict(dict)
    query = (
        sa.select(
            network.c.id, network.c.bridge, mapping.c.bridge.label("own_bridge"), mapping.c.state, mapping.c.problem, host.c.name
        )
        .join(mapping, mapping.c.network_id == network.c.id)
        .join(host, host.c.id == mapping.c.host_id)
        .where(network.c.deleted_at.is_(None), host.c.deleted_at.is_(None))
    )
    for row in session.execute(query):
        mtu = bridges.get((row.name, row.own_bridge or row.bridge))
        if mtu is not None:
            mtus[row.id][row.name] = mtu
        if row.state == "failed":
            problems[row.id][row.name] = row.problem or "no reason was given"
    live = sa.select(network.c.id, network.c.name, network.c.mtu, network.c.bridge).where(network.c.deleted_at.is_(None))
    return tuple(
        NetworkFacts(name=row.name, mtu=row.mtu, bridge=row.bridge, mtus=mtus[row.id], problems=problems[row.id])
        for row in session.execute(live)
    )


def _routers(session: Session) -> tuple[RouterFacts, ...]:
    """Return the routers that have an outer side."""
    router, network, project = schema.router, schema.network, schema.project
    query = (
        sa.select(router.c.name, router.c.outer_network_id, network.c.name.label("outer"), project.c.name.label("project"))
        .join(network, network.c.id == router.c.outer_network_id)
        .join(project, project.c.id == router.c.project_id)
        .where(router.c.deleted_at.is_(None))
    )
    rows = session.execute(query).all()
    hosts = overlays.gateway_hosts(session, sorted({row.outer_network_id for row in rows}))
    return tuple(
        RouterFacts(
            project=row.project,
            name=row.name,
            outer=row.outer,
            up=tuple(host.name for host in hosts.get(row.outer_network_id, ()) if host.is_up),
            down=tuple(host.name for host in hosts.get(row.outer_network_id, ()) if not host.is_up),
        )
        for row in rows
    )


def _snapshots(session: Session) -> tuple[SnapshotFacts, ...]:
    """Return the oldest of each vm, and how many it keeps; those that only serve a clone under way do not count."""
    table, vm, project = schema.snapshot, schema.vm, schema.project
    query = (
        sa.select(table.c.vm_id, table.c.name, table.c.created_at, vm.c.name.label("vm"), project.c.name.label("project"))
        .join(vm, vm.c.id == table.c.vm_id)
        .join(project, project.c.id == vm.c.project_id)
        .where(table.c.deleted_at.is_(None), table.c.is_temporary.is_(False), table.c.state == "ready", vm.c.deleted_at.is_(None))
        .order_by(table.c.vm_id, table.c.created_at, table.c.id)
    )
    found: dict[str, SnapshotFacts] = {}
    for row in session.execute(query):
        oldest = found.get(row.vm_id)
        if oldest is not None:
            found[row.vm_id] = replace(oldest, count=oldest.count + 1)
        else:
            found[row.vm_id] = SnapshotFacts(project=row.project, vm=row.vm, name=row.name, created_at=row.created_at, count=1)
    return tuple(found.values())


def _parked(session: Session) -> tuple[OperationFacts, ...]:
    table = schema.operation
    query = sa.select(table.c.id, table.c.kind).where(table.c.state == OperationState.NEEDS_ATTENTION.value)
    return tuple(OperationFacts(id=row.id, kind=row.kind) for row in session.execute(query))


def _hosts(
    session: Session, bridges: dict[tuple[str, str], int], troubles: Mapping[str, tuple[Trouble, ...]]
) -> tuple[HostFacts, ...]:
    """Return the hosts; `bridges` is filled with what they told of theirs."""
    table, host_class = schema.host, schema.host_class
    reserves = {
        row.id: row.memory_reserve_mib for row in session.execute(sa.select(host_class.c.id, host_class.c.memory_reserve_mib))
    }
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
        table.c.host_class_id,
        table.c.inventory,
    ).where(table.c.deleted_at.is_(None))
    found, rows = [], session.execute(query).all()
    qemus = _guest_qemus(session, {row.id: row.inventory or {} for row in rows})
    for row in rows:
        told = row.inventory or {}
        bridges.update({(row.name, one["name"]): int(one.get("mtu", 1500)) for one in told.get("bridges", ())})
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
                qemu_build=str(told.get("qemu_build", "")),
                guest_qemus=qemus.get(row.id, ()),
                cpu_models=frozenset(told.get("usable_cpu_models", ())),
                certificates=tuple(certificates[row.id]),
                fences=tuple(fences[row.id]),
                cpu_features=_listed_cpu_features(told),
                machines=frozenset(told.get("machines", ())),
                memory_reserve_mib=reserves.get(row.host_class_id),
                is_warden_armed=row.id in armed,
                troubles=troubles.get(row.id, ()),
            )
        )
    return tuple(found)


def _listed_cpu_features(told: Mapping[str, Any]) -> frozenset[str]:
    """Return the host's CPU features; none where its agent lists only some: a host that has not told is not blamed."""
    lists_all = cpu_features.ALL_LISTED in told.get("capabilities", ())
    return frozenset(told.get("cpu_features", ())) if lists_all else frozenset()


def _guest_qemus(session: Session, told: Mapping[str, Mapping[str, Any]]) -> Mapping[str, tuple[tuple[str, str], ...]]:
    """Return, by host, (name, build) of the vms that are still there. `told`: inventories by host."""
    builds = {
        (host_id, str(one["vm_id"])): str(one["build"]) for host_id, each in told.items() for one in each.get("guest_qemus", ())
    }
    if not builds:
        return {}
    vm, found = schema.vm, defaultdict[str, tuple[tuple[str, str], ...]](tuple)
    query = (
        sa.select(vm.c.id, vm.c.name, vm.c.host_id).where(among(vm.c.id, {vm_id for _host, vm_id in builds})).order_by(vm.c.name)
    )
    for row in session.execute(query):
        if (build := builds.get((row.host_id, row.id))) is not None:
            found[row.host_id] += ((row.name, build),)
    return found


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
        sa.select(pool.c.id, pool.c.name, host.c.id.label("host_id"), host.c.name.label("host"), reach.c.state, reach.c.problem)
        .join(reach, reach.c.pool_id == pool.c.id)
        .join(host, host.c.id == reach.c.host_id)
        .where(pool.c.deleted_at.is_(None), host.c.deleted_at.is_(None), reach.c.state.in_(("failed", "unresponsive")))
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
            is_unresponsive=row.state == "unresponsive",
            vms=tuple(one.name for one in pools.vms_in(session, row.id) if one.host_id == row.host_id),
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
            vm.c.machine,
            vm.c.cpu_features,
            vm.c.ha,
            vm.c.attention,
            vm.c.hand_changes,
            vm.c.guest_agent,
            vm.c.guest_agent_since,
            vm.c.os_family,
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
            machine=row.machine,
            cpu_features=tuple(row.cpu_features or ()),
            is_kept=row.ha == "restart",
            given_up_by=row.attention,
            hand_changes=tuple(row.hand_changes),
            guest_agent=row.guest_agent,
            guest_agent_since=row.guest_agent_since,
            os_family=row.os_family,
        )
        for row in session.execute(query)
    )
