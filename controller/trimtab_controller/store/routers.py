"""Routers of overlay networks in SQL, and which addresses of an outer network are taken, by routers or as floating ones."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.model import Network, Router
from trimtab_controller.store import keyset, lookup, schema
from trimtab_controller.store.inserts import insert_unless_taken
from trimtab_controller.store.rows import build, columns_of

_table, _floating, _network = schema.router, schema.floating, schema.network

FILTERS: keyset.Filters = {"name": keyset.equals(_table.c.name)}


_LOCK_SPACE = 0x7472  # of advisory locks: nobody else's here


def lock(session: Session, project_id: str) -> None:
    """Let nobody else change what is behind the project's routers, or led there, until this transaction ends.

    Call it before anything is read or written. What holds here spans rows: a network's router is a live one, and a floating address
    leads by a router with an outer side on its network. A lock of its own, since the project's row is everybody's who charges a quota.
    On SQLite nobody else writes anyway.
    """
    if session.get_bind().dialect.name == "postgresql":
        number = zlib.crc32(project_id.encode()) - 2**31
        session.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK_SPACE, number)))


def insert(session: Session, *, router_id: str, project_id: str, name: str, now: datetime) -> Router:
    """Insert a router without an outer side. AlreadyExists where the project has one of that name."""
    values = {"id": router_id, "project_id": project_id, "name": name, "created_at": now}
    return lookup.insert_named(session, _table, Router, "router", **values)


def ensure(session: Session, *, router_id: str, project_id: str, name: str, now: datetime) -> None:
    """Insert a router of that name unless the project has one."""
    insert_unless_taken(session, _table, {"id": router_id, "project_id": project_id, "name": name, "created_at": now})


def find(session: Session, project_id: str, name_or_id: str) -> Router | None:
    return lookup.find(session, _table, Router, name_or_id, project_ids=(project_id,))


def page(session: Session, page: keyset.Page, *, project_id: str) -> tuple[tuple[Router, ...], tuple[str, str] | None]:
    """Return the project's routers."""
    query = sa.select(*columns_of(_table, Router)).where(_table.c.deleted_at.is_(None), _table.c.project_id == project_id)
    found = keyset.fetch(session, query, _table, page, filters=FILTERS)
    return tuple(build(Router, row) for row in found.rows), found.next_after


def set_outer(
    session: Session, router: Router, *, network_id: str | None, address: str | None, expected_version: int | None
) -> None:
    """Give the router this outer side, or none. Conflict `stale-etag`."""
    lookup.update_version(
        session,
        _table,
        f"router {router.name}",
        router.id,
        expected_version=expected_version,
        outer_network_id=network_id,
        outer_address=address,
    )


def touch(session: Session, router: Router, *, expected_version: int | None) -> None:
    """Raise the version where something else changed what is shown of it. Conflict `stale-etag`."""
    lookup.update_version(session, _table, f"router {router.name}", router.id, expected_version=expected_version)


def delete(session: Session, router: Router, *, expected_version: int | None, now: datetime) -> None:
    """Hide the router; its outer address is free. Conflict `stale-etag`."""
    noun = f"router {router.name}"
    values = {"deleted_at": now, "outer_network_id": None, "outer_address": None}
    lookup.update_version(session, _table, noun, router.id, expected_version=expected_version, **values)


def networks_behind(session: Session, project_ids: Sequence[str]) -> tuple[Network, ...]:
    """Return the overlay networks of these projects that name a router, by name."""
    query = sa.select(*columns_of(_network, Network)).where(
        _network.c.kind == "overlay", _network.c.deleted_at.is_(None), _network.c.project_id.in_(project_ids)
    )
    found = (build(Network, row) for row in session.execute(query.order_by(_network.c.name)))
    return tuple(network for network in found if network.settings.get("router"))


def set_router(session: Session, network: Network, name: str) -> None:
    """Put an overlay network behind the router of that name, '' behind none."""
    settings = {key: value for key, value in network.settings.items() if key != "router"} | ({"router": name} if name else {})
    lookup.update_version(session, _network, f"network {network.name}", network.id, settings=settings)


# --- addresses of an outer network ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Holder:
    """Who has an address: `what` is `router edge`, or `a floating address`."""

    what: str
    project_id: str


def outer_addresses(session: Session, network_id: str) -> dict[str, Holder]:
    """Return who has which address; call it under `networks.lock` of the network and it stays true."""
    routers = sa.select(_table.c.outer_address, _table.c.name, _table.c.project_id).where(
        _table.c.outer_network_id == network_id, _table.c.deleted_at.is_(None)
    )
    floating = sa.select(_floating.c.name, _floating.c.project_id).where(
        _floating.c.network_id == network_id, _floating.c.deleted_at.is_(None)
    )
    found = {row.outer_address: Holder(f"router {row.name}", row.project_id) for row in session.execute(routers)}
    return found | {row.name: Holder("a floating address", row.project_id) for row in session.execute(floating)}


def users_of_outer(session: Session, network_id: str, *, limit: int = 5) -> tuple[str, ...]:
    """Return what keeps an outer network, in words."""
    found = outer_addresses(session, network_id)
    told = [f"{one.what} ({address})" for address, one in sorted(found.items())]
    return tuple(told[:limit])
