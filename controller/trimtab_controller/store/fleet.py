"""Questions about the fleet as a whole: who is joined, who reaches what, and what the scheduler decides on."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.host_troubles import LostCarrier
from trimtab_controller.core.model import Host, HostClass, Pool, PoolSpace, Vm, Volume
from trimtab_controller.store import failover, host_troubles, hosts, schema, vms
from trimtab_controller.store.among import among
from trimtab_controller.store.rows import build, columns_of

_HOST_NAME = sa.select(schema.host.c.name).where(schema.host.c.id == sa.bindparam("host_id"))
_FIX_MACHINE = (
    schema.vm.update()
    .where(schema.vm.c.id == sa.bindparam("of_vm"))
    .values(
        machine=sa.case((schema.vm.c.machine == "", sa.bindparam("to_machine")), else_=schema.vm.c.machine),
        cpu_model=sa.case((schema.vm.c.cpu_model == "", sa.bindparam("to_cpu_model")), else_=schema.vm.c.cpu_model),
    )
)


@dataclass(frozen=True, slots=True)
class GroupRow:
    """A vm group, and where its members hold capacity: host by vm (of a vm that migrates the target)."""

    id: str
    name: str
    rules: tuple[Mapping[str, Any], ...]
    generation: int
    members: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class FleetRows:
    """One snapshot of everything that a placement looks at but the vms themselves."""

    hosts: tuple[Host, ...]
    classes: Mapping[str, HostClass]
    pools: Mapping[str, Pool]
    spaces: tuple[PoolSpace, ...]
    # (pool, host, is ready)
    pool_reach: tuple[tuple[str, str, bool], ...]
    # (network, host, is ready, mtu of its bridge there; 0: not known)
    network_reach: tuple[tuple[str, str, bool, int], ...]
    # Hosts that have a replica of an image on a local pool: (image, host).
    local_replicas: frozenset[tuple[str, str]]
    # What is counted besides, by host and name: (capacity, claimed).
    stocks: Mapping[str, Mapping[str, tuple[int, int]]] = field(default_factory=dict)
    groups: Mapping[str, GroupRow] = field(default_factory=dict)
    # Hosts that nothing could prove off: no armed warden, no power device that answers.
    unprotected: frozenset[str] = frozenset()
    # Bridges without carrier, by the network that goes over them and the host.
    unlinked: Mapping[tuple[str, str], str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class VmNetwork:
    network_id: str
    name: str
    mtu: int


@dataclass(frozen=True, slots=True)
class VmNeeds:
    """What a vm asks of a host."""

    vm: Vm
    volumes: tuple[Volume, ...]
    claimed_volume_ids: frozenset[str]
    networks: tuple[VmNetwork, ...]
    image_ids: tuple[str, ...]
    group_id: str = ""
    held_cells: tuple[int, ...] = ()


def joined_ids(session: Session) -> frozenset[str]:
    """Return the ids of hosts that are members now."""
    return frozenset(session.scalars(sa.select(schema.host.c.id).where(schema.host.c.deleted_at.is_(None))))


def name_of(session: Session, host_id: str) -> str:
    """Return a host's name, its id where there is no such row."""
    return session.execute(_HOST_NAME, {"host_id": host_id}).scalar_one_or_none() or host_id


def host_for_volume(session: Session, pool: Pool, volume: Volume) -> str:
    """Return a host that is up and reaches the volume's bytes; "" when none does."""
    host, mapping = schema.host, schema.pool_host
    query = (
        sa.select(host.c.id)
        .join(mapping, sa.and_(mapping.c.host_id == host.c.id, mapping.c.pool_id == pool.id))
        .where(host.c.deleted_at.is_(None), host.c.connectivity == "up", mapping.c.state == "ready")
        .order_by(host.c.id)
        .limit(1)
    )
    if not pool.is_shared:
        query = query.where(host.c.id == volume.host_id)
    return session.scalars(query).first() or ""


def read_rows(session: Session) -> FleetRows:
    """Return the snapshot; a fixed number of queries for any number of hosts."""
    live_pools = sa.select(*columns_of(schema.pool, Pool)).where(schema.pool.c.deleted_at.is_(None))
    classes = session.execute(sa.select(*columns_of(schema.host_class, HostClass)))
    replica = schema.image_replica
    replicas = sa.select(replica.c.image_id, replica.c.host_id).where(replica.c.state == "ready", replica.c.host_id != "")
    members = hosts.live(session)
    return FleetRows(
        hosts=members,
        classes={row.id: build(HostClass, row) for row in classes},
        pools={row.id: build(Pool, row) for row in session.execute(live_pools)},
        spaces=tuple(build(PoolSpace, row) for row in session.execute(sa.select(schema.pool_space))),
        pool_reach=_pool_reach(session),
        network_reach=_network_reach(session),
        local_replicas=frozenset((row.image_id, row.host_id) for row in session.execute(replicas)),
        stocks=_stocks(session),
        groups=_groups(session),
        unprotected=failover.unprotected(session),
        unlinked=host_troubles.unlinked(session, _lost_carriers(members)),
    )


def _lost_carriers(members: Sequence[Host]) -> dict[str, tuple[LostCarrier, ...]]:
    told = ((host.id, host.inventory.bridges) for host in members if host.inventory is not None)
    return {
        host_id: tuple(LostCarrier(bridge=one.name) for one in bridges if not one.has_carrier)
        for host_id, bridges in told
        if not all(one.has_carrier for one in bridges)
    }


def _stocks(session: Session) -> dict[str, dict[str, tuple[int, int]]]:
    found: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    for row in session.execute(sa.select(schema.host_stock)):
        found[row.host_id][row.resource] = (row.capacity, row.claimed)
    return found


def _groups(session: Session) -> dict[str, GroupRow]:
    group, member, claim = schema.vm_group, schema.vm_group_member, schema.claim
    members: dict[str, dict[str, str]] = defaultdict(dict)
    # Home before target: of a vm that migrates the target stays.
    where = sa.select(member.c.vm_group_id, member.c.vm_id, claim.c.host_id).join(claim, claim.c.vm_id == member.c.vm_id)
    for row in session.execute(where.order_by(claim.c.role)):
        members[row.vm_group_id][row.vm_id] = row.host_id
    live = sa.select(group).where(group.c.deleted_at.is_(None))
    return {
        row.id: GroupRow(row.id, row.name, tuple(row.rule["rules"]), row.generation, members[row.id])
        for row in session.execute(live)
    }


def _pool_reach(session: Session) -> tuple[tuple[str, str, bool], ...]:
    mapping = schema.pool_host
    rows = session.execute(sa.select(mapping.c.pool_id, mapping.c.host_id, mapping.c.state))
    return tuple((row.pool_id, row.host_id, row.state == "ready") for row in rows)


def _network_reach(session: Session) -> tuple[tuple[str, str, bool, int], ...]:
    mapping = schema.network_host
    rows = session.execute(sa.select(mapping.c.network_id, mapping.c.host_id, mapping.c.state))
    return tuple((row.network_id, row.host_id, row.state == "ready", 0) for row in rows)


def needs_of(session: Session, vm_ids: Sequence[str]) -> dict[str, VmNeeds]:
    """Return what each of these vms asks of a host; vms whose rows are gone are left out."""
    found_vms = _vms(session, vm_ids)
    nics = vms.nics_of(session, list(found_vms))
    volumes = _volumes(session, list(found_vms))
    networks = _networks(session, {nic.network_id for owned in nics.values() for nic in owned})
    claimed = _claimed(session, [volume.id for owned in volumes.values() for volume in owned])
    group_of, cells = _group_of(session, list(found_vms)), _held_cells(session, list(found_vms))
    needs = {}
    for vm_id, vm in found_vms.items():
        owned = volumes[vm_id]
        needs[vm_id] = VmNeeds(
            vm=vm,
            volumes=owned,
            claimed_volume_ids=claimed & {volume.id for volume in owned},
            networks=tuple(networks[network_id] for network_id in sorted({nic.network_id for nic in nics[vm_id]})),
            image_ids=tuple(sorted({volume.base_image_id for volume in owned if volume.base_image_id})),
            group_id=group_of.get(vm_id, ""),
            held_cells=cells.get(vm_id, ()),
        )
    return needs


def _group_of(session: Session, vm_ids: Sequence[str]) -> dict[str, str]:
    member = schema.vm_group_member
    rows = session.execute(sa.select(member.c.vm_id, member.c.vm_group_id).where(among(member.c.vm_id, vm_ids)))
    return {row.vm_id: row.vm_group_id for row in rows}


def _held_cells(session: Session, vm_ids: Sequence[str]) -> dict[str, tuple[int, ...]]:
    table = schema.claim_stock
    query = sa.select(table.c.vm_id, table.c.resource).where(among(table.c.vm_id, vm_ids), table.c.resource.startswith("cell:"))
    found: dict[str, set[int]] = defaultdict(set)
    for row in session.execute(query):
        found[row.vm_id].add(int(row.resource.split(":")[1]))
    return {vm_id: tuple(sorted(cells)) for vm_id, cells in found.items()}


def movable_ids(session: Session, host_id: str, *, limit: int) -> tuple[str, ...]:
    """Return up to `limit` vms that run on a host, whose owners let them be moved, and that nothing is being done with."""
    vm, claim, busy = schema.vm, schema.claim, schema.operation
    live = sa.select(busy.c.id).where(busy.c.subject_id == vm.c.id, busy.c.ended_at.is_(None), busy.c.is_exclusive)
    query = (
        sa.select(vm.c.id)
        .join(claim, sa.and_(claim.c.vm_id == vm.c.id, claim.c.host_id == host_id, claim.c.role == "home"))
        .where(vm.c.observed_state == "running", vm.c.drain_policy == "migrate", vm.c.deleted_at.is_(None), ~live.exists())
        .order_by(vm.c.id)
        .limit(limit)
    )
    return tuple(session.scalars(query))


def _vms(session: Session, vm_ids: Sequence[str]) -> dict[str, Vm]:
    rows = session.execute(sa.select(*columns_of(schema.vm, Vm)).where(among(schema.vm.c.id, vm_ids)))
    return {row.id: vms.from_row(row) for row in rows}


def _volumes(session: Session, vm_ids: Sequence[str]) -> dict[str, tuple[Volume, ...]]:
    table = schema.volume
    found: dict[str, list[Volume]] = defaultdict(list)
    query = sa.select(*columns_of(table, Volume)).where(among(table.c.vm_id, vm_ids)).order_by(table.c.vm_id, table.c.disk_index)
    for row in session.execute(query):
        found[row.vm_id].append(build(Volume, row))
    return {vm_id: tuple(found[vm_id]) for vm_id in vm_ids}


def _networks(session: Session, network_ids: Collection[str]) -> dict[str, VmNetwork]:
    table = schema.network
    rows = session.execute(sa.select(table.c.id, table.c.name, table.c.mtu).where(table.c.id.in_(network_ids)))
    return {row.id: VmNetwork(row.id, row.name, row.mtu) for row in rows}


def network_facts(session: Session) -> tuple[tuple[str, str, int], ...]:
    """Return (id, name, MTU) of all networks."""
    table = schema.network
    rows = session.execute(sa.select(table.c.id, table.c.name, table.c.mtu).order_by(table.c.id))
    return tuple((row.id, row.name, row.mtu) for row in rows)


def _claimed(session: Session, volume_ids: Collection[str]) -> frozenset[str]:
    table = schema.disk_claim
    return frozenset(session.scalars(sa.select(table.c.volume_id).where(among(table.c.volume_id, volume_ids))))


def fix_machine(session: Session, vm_id: str, *, machine: str, cpu_model: str) -> None:
    """Write the concrete machine type and CPU model of a vm at its first placement; never changed afterwards."""
    session.execute(_FIX_MACHINE, {"of_vm": vm_id, "to_machine": machine, "to_cpu_model": cpu_model})


def fix_class_baseline(session: Session, class_id: str, *, machine: str, cpu_model: str) -> None:
    """Write a class's derived baseline once, so that later members must fit it instead of moving it."""
    table = schema.host_class
    for column, value in ((table.c.machine, machine), (table.c.cpu_model, cpu_model)):
        if value:
            session.execute(table.update().where(table.c.id == class_id, column.is_(None)).values({column: value}))


def hosts_to_prepare(session: Session) -> tuple[tuple[str, str], ...]:
    """Return (id, name) of hosts that are up and have a pool or network whose state is unknown."""
    host = schema.host
    unknown = [
        sa.select(mapping.c.host_id).where(mapping.c.state == "unknown") for mapping in (schema.pool_host, schema.network_host)
    ]
    query = sa.select(host.c.id, host.c.name).where(
        host.c.deleted_at.is_(None), host.c.connectivity == "up", host.c.id.in_(sa.union(*unknown).scalar_subquery())
    )
    return tuple((row.id, row.name) for row in session.execute(query))
