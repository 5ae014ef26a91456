"""Networks in SQL: rows, lists, mappings per host, nics' MACs and declared addresses."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.model import Network, Nic
from trimtab_controller.store import keyset, lookup, routers, schema
from trimtab_controller.store.among import among
from trimtab_controller.store.inserts import insert_unless_taken
from trimtab_controller.store.rows import build, columns_of

_table = schema.network

FILTERS: keyset.Filters = {"name": keyset.equals(_table.c.name), "kind": keyset.equals(_table.c.kind)}


_HAS_MAC = sa.select(schema.nic.c.mac).where(schema.nic.c.mac == sa.bindparam("mac")).limit(1)
_UNMANAGED_MAC = sa.select(schema.unmanaged_mac.c.mac).where(schema.unmanaged_mac.c.mac == sa.bindparam("mac")).limit(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkOnHost:
    """How one host reaches a network; bridge '' means the network's own."""

    network_id: str
    host_id: str
    bridge: str
    # unknown, ready or failed.
    state: str
    problem: str
    observed_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AddressHolder:
    """Who has a declared address."""

    vm_id: str
    vm_name: str
    project_id: str
    deleted_at: datetime | None


def insert(
    session: Session,
    *,
    network_id: str,
    bridges: Mapping[str, str],
    now: datetime,
    settings: Mapping[str, Any] | None = None,
    **values: Any,
) -> Network:
    """Insert a network; `bridges` maps host id to bridge."""
    values |= {"id": network_id, "settings": dict(settings or {}), "created_at": now}
    network = lookup.insert_named(session, _table, Network, "network", **values)
    for host_id, bridge in bridges.items():
        session.execute(
            schema.network_host.insert().values(network_id=network_id, host_id=host_id, bridge=bridge, state="unknown")
        )
    return network


def find(session: Session, project_id: str, name_or_id: str) -> Network | None:
    """Return the project's network of that name or id, else a shared one ('' looks among the shared ones only)."""
    return lookup.find(session, _table, Network, name_or_id, project_ids=(project_id, "") if project_id else ("",))


def page(session: Session, page: keyset.Page, *, project_id: str) -> tuple[tuple[Network, ...], tuple[str, str] | None]:
    """Return the project's networks and the shared ones ('' alone: the shared ones)."""
    visible = (project_id, "") if project_id else ("",)
    query = sa.select(*columns_of(_table, Network)).where(_table.c.deleted_at.is_(None), _table.c.project_id.in_(visible))
    found = keyset.fetch(session, query, _table, page, filters=FILTERS)
    return tuple(build(Network, row) for row in found.rows), found.next_after


def hosts_of(session: Session, network_ids: Sequence[str]) -> dict[str, tuple[NetworkOnHost, ...]]:
    """Return how each host reaches each network; one query."""
    table = schema.network_host
    found: dict[str, list[NetworkOnHost]] = {network_id: [] for network_id in network_ids}
    for row in session.execute(sa.select(table).where(table.c.network_id.in_(network_ids)).order_by(table.c.host_id)):
        found[row.network_id].append(build(NetworkOnHost, row))
    return {network_id: tuple(states) for network_id, states in found.items()}


def dependants(session: Session, network_id: str, *, limit: int = 5) -> tuple[str, ...]:
    """Return who keeps the network: vms with a nic on it (deleted ones until they are purged), what has an address of an outer one."""
    there, deleted = (", ".join(vms_on(session, network_id, limit=limit, deleted=deleted)) for deleted in (False, True))
    users = [f"vms {there}"] * bool(there)
    users += [f"deleted vms {deleted} (until their 24 h are over, or `trimtab vm purge`)"] * bool(deleted)
    return (*users, *routers.users_of_outer(session, network_id, limit=limit))


def vms_on(session: Session, network_id: str, *, deleted: bool, limit: int) -> tuple[str, ...]:
    """Return the names of vms with a nic on the network: of live ones, or of deleted ones that are not purged."""
    deleted_at = schema.vm.c.deleted_at
    query = (
        sa.select(schema.vm.c.name)
        .join(schema.nic, schema.nic.c.vm_id == schema.vm.c.id)
        .where(schema.nic.c.network_id == network_id, deleted_at.is_not(None) if deleted else deleted_at.is_(None))
        .distinct()
        .order_by(schema.vm.c.name)
        .limit(limit)
    )
    return tuple(session.scalars(query))


def hide_unused(session: Session, network_id: str, *, now: datetime) -> tuple[str, ...]:
    """Hide a network for ever, unless somebody keeps it: then return who does. Who is about to come onto it is waited for."""
    lock(session, network_id)
    users = dependants(session, network_id)
    if not users:
        hidden = _table.update().where(_table.c.id == network_id, _table.c.deleted_at.is_(None))
        session.execute(hidden.values(deleted_at=now, version=_table.c.version + 1))
    return users


def of_ids(session: Session, network_ids: Collection[str]) -> tuple[Network, ...]:
    """Return these networks, deleted ones too."""
    query = sa.select(*columns_of(_table, Network)).where(_table.c.id.in_(network_ids))
    return tuple(build(Network, row) for row in session.execute(query))


def kinds_of(session: Session, network_ids: Collection[str]) -> dict[str, str]:
    """Return {network: its kind}, of deleted ones too."""
    if not network_ids:
        return {}
    query = sa.select(_table.c.id, _table.c.kind).where(among(_table.c.id, sorted(network_ids)))
    return {row.id: row.kind for row in session.execute(query)}


def with_subnet(session: Session) -> tuple[Network, ...]:
    """Return every live network that has a subnet, of all projects."""
    query = sa.select(*columns_of(_table, Network)).where(_table.c.deleted_at.is_(None), _table.c.subnet != "")
    return tuple(build(Network, row) for row in session.execute(query.order_by(_table.c.id)))


def lock_subnets(session: Session) -> None:
    """Let nobody else add a network until this transaction ends. On SQLite nobody else writes anyway."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(sa.text("LOCK TABLE network IN SHARE ROW EXCLUSIVE MODE"))


def check_version(session: Session, network_id: str, expected_version: int | None) -> None:
    """Raise the version; Conflict `stale-etag` where it is not the expected one."""
    lookup.update_version(session, _table, "the network", network_id, expected_version=expected_version)


# --- nics ------------------------------------------------------------------------------------------------------------------


def mac_holder(session: Session, mac: str) -> str:
    """Return who has the MAC (`vm NAME`, or an unmanaged domain on a host); '' if nobody."""
    vm_query = sa.select(schema.vm.c.name).join(schema.nic, schema.nic.c.vm_id == schema.vm.c.id).where(schema.nic.c.mac == mac)
    name = session.scalars(vm_query).first()
    if name is not None:
        return f"vm {name}"
    host_query = (
        sa.select(schema.host.c.name)
        .join(schema.unmanaged_mac, schema.unmanaged_mac.c.host_id == schema.host.c.id)
        .where(schema.unmanaged_mac.c.mac == mac)
    )
    host = session.scalars(host_query).first()
    return f"a domain on host {host} that Trimtab does not manage" if host is not None else ""


def is_mac_taken(session: Session, mac: str) -> bool:
    """Tell whether a card or a domain that is not ours has the MAC. Plans: uq_nic_mac, ix_unmanaged_mac_mac."""
    return session.execute(_HAS_MAC, {"mac": mac}).first() is not None or is_unmanaged_mac(session, mac)


def is_unmanaged_mac(session: Session, mac: str) -> bool:
    """Tell whether a domain that is not ours has the MAC. Plan: ix_unmanaged_mac_mac."""
    return session.execute(_UNMANAGED_MAC, {"mac": mac}).first() is not None


def insert_nic(session: Session, nic: Nic, *, now: datetime) -> bool:
    """Insert a nic without its addresses; False where another has its MAC."""
    values = {
        "id": nic.id,
        "vm_id": nic.vm_id,
        "network_id": nic.network_id,
        "nic_index": nic.nic_index,
        "mac": nic.mac,
        "model": nic.model,
        "allows_spoofing": nic.allows_spoofing,
        "created_at": now,
    }
    return insert_unless_taken(session, schema.nic, values) is not None


def address_holder(session: Session, network_id: str, address: str) -> AddressHolder | None:
    """Return the vm whose nic has the declared address on the network."""
    vm, nic, table = schema.vm, schema.nic, schema.nic_address
    columns: list[sa.ColumnElement[Any]] = [vm.c.id.label("vm_id"), vm.c.name.label("vm_name"), vm.c.project_id, vm.c.deleted_at]
    query = (
        sa.select(*columns)
        .join(nic, nic.c.vm_id == vm.c.id)
        .join(table, table.c.nic_id == nic.c.id)
        .where(table.c.network_id == network_id, table.c.address == address)
    )
    row = session.execute(query).first()
    return build(AddressHolder, row) if row else None


def lock(session: Session, network_id: str) -> bool:
    """Let nobody else draw an address of the network, or come onto it, until this transaction ends; False where it was deleted.

    Who inserts a nic on it waits too, since its foreign key asks for the row. On SQLite nobody else writes anyway.
    """
    held = sa.select(_table.c.deleted_at).where(_table.c.id == network_id).with_for_update()
    row = session.execute(held).one_or_none()
    return row is not None and row.deleted_at is None


def is_live(session: Session, network_id: str) -> bool:
    """Tell whether the network is there now; where a row refers to it in this transaction already, it stays so."""
    return session.scalar(sa.select(_table.c.id).where(_table.c.id == network_id, _table.c.deleted_at.is_(None))) is not None


def addresses_on(session: Session, network_id: str) -> frozenset[str]:
    """Return every address that a nic on the network has, without prefix lengths."""
    query = sa.select(schema.nic_address.c.address).where(schema.nic_address.c.network_id == network_id)
    return frozenset(session.scalars(query))


def insert_address(session: Session, *, network_id: str, address: str, prefix_length: int, nic_id: str) -> bool:
    """Declare an address of a nic; False where it is taken on that network."""
    values = {"network_id": network_id, "address": address, "prefix_length": prefix_length, "nic_id": nic_id}
    return insert_unless_taken(session, schema.nic_address, values) is not None
