"""Floating addresses in SQL."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from ipaddress import ip_address

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.model import FloatingAddress
from trimtab_controller.store import keyset, lookup, project_quota, schema
from trimtab_controller.store.among import among
from trimtab_controller.store.rows import build, columns_of

_table, _nic, _vm = schema.floating, schema.nic, schema.vm

FILTERS: keyset.Filters = {"name": keyset.equals(_table.c.name)}


def insert(
    session: Session, *, floating_id: str, project_id: str, network_id: str, address: str, now: datetime
) -> FloatingAddress:
    """Insert an address that leads to nobody. AlreadyExists where the network has it."""
    values = {"id": floating_id, "project_id": project_id, "network_id": network_id, "name": address, "created_at": now}
    return lookup.insert_named(session, _table, FloatingAddress, "floating address", **values)


def find(session: Session, project_id: str, address_or_id: str) -> FloatingAddress | None:
    return lookup.find(session, _table, FloatingAddress, address_or_id, project_ids=(project_id,))


def page(session: Session, page: keyset.Page, *, project_id: str) -> tuple[tuple[FloatingAddress, ...], tuple[str, str] | None]:
    """Return the project's addresses."""
    query = sa.select(*columns_of(_table, FloatingAddress)).where(
        _table.c.deleted_at.is_(None), _table.c.project_id == project_id
    )
    found = keyset.fetch(session, query, _table, page, filters=FILTERS)
    return tuple(build(FloatingAddress, row) for row in found.rows), found.next_after


def hold_nic(session: Session, nic_id: str) -> bool:
    """Keep the card there until this transaction ends; False where it is gone. On SQLite nobody else writes anyway."""
    held = sa.select(_nic.c.id).where(_nic.c.id == nic_id).with_for_update(read=True, key_share=True)
    return session.scalar(held) is not None


def lead_to(session: Session, floating: FloatingAddress, nic_id: str | None, *, expected_version: int | None) -> None:
    """Have the address lead to a card, or to nobody. Conflict `stale-etag`."""
    noun = f"floating address {floating.name}"
    lookup.update_version(session, _table, noun, floating.id, expected_version=expected_version, nic_id=nic_id)


def delete(session: Session, floating: FloatingAddress, *, expected_version: int | None, now: datetime) -> None:
    """Free the address and give it back to the project's quota. Conflict `stale-etag`."""
    noun = f"floating address {floating.name}"
    lookup.update_version(session, _table, noun, floating.id, expected_version=expected_version, deleted_at=now, nic_id=None)
    project_quota.lower_used(session, floating.project_id, {"floating": 1})


def forget_nics(session: Session, nic_ids: Sequence[str]) -> None:
    """Have addresses that led to these cards lead to nobody: the cards go, and until this transaction ends none is led there."""
    session.execute(sa.select(_nic.c.id).where(among(_nic.c.id, nic_ids)).with_for_update())
    query = _table.update().where(among(_table.c.nic_id, nic_ids))
    session.execute(query.values(nic_id=None, version=_table.c.version + 1))


def addresses_into(session: Session, network_ids: Sequence[str]) -> tuple[str, ...]:
    """Return the addresses that lead to cards on these networks, of deleted vms too."""
    query = sa.select(_table.c.name).join(_nic, _nic.c.id == _table.c.nic_id).where(among(_nic.c.network_id, network_ids))
    return tuple(session.scalars(query.order_by(_table.c.name)))


def leading_into(session: Session, network_ids: Sequence[str]) -> tuple[FloatingAddress, ...]:
    """Return the addresses that lead to cards on these networks, of deleted vms too, by address."""
    if not network_ids:
        return ()
    query = sa.select(*columns_of(_table, FloatingAddress)).join(_nic, _nic.c.id == _table.c.nic_id)
    found = (build(FloatingAddress, row) for row in session.execute(query.where(among(_nic.c.network_id, network_ids))))
    return tuple(sorted(found, key=lambda one: ip_address(one.name)))


@dataclass(frozen=True, slots=True)
class Led:
    """The card that an address leads to."""

    nic_id: str
    network_id: str
    vm_id: str
    vm_name: str
    is_deleted: bool
    # Without prefix length.
    address: str


def led_to(session: Session, nic_ids: Sequence[str]) -> dict[str, Led]:
    """Return the cards by id, with the first IPv4 address of each."""
    if not nic_ids:
        return {}
    address = schema.nic_address
    query = (
        sa.select(_nic.c.id, _nic.c.network_id, _nic.c.vm_id, _vm.c.name, _vm.c.deleted_at, address.c.address)
        .join(_vm, _vm.c.id == _nic.c.vm_id)
        .outerjoin(address, address.c.nic_id == _nic.c.id)
        .where(among(_nic.c.id, nic_ids))
        .order_by(address.c.address)
    )
    found: dict[str, Led] = {}
    for row in session.execute(query):
        text = row.address or ""
        if row.id not in found or (not found[row.id].address and "." in text):
            told = text if "." in text else ""
            found[row.id] = Led(row.id, row.network_id, row.vm_id, row.name, row.deleted_at is not None, told)
    return found


def of_nics(session: Session, nic_ids: Sequence[str]) -> dict[str, FloatingAddress]:
    """Return {card: its floating address} of those that have one."""
    if not nic_ids:
        return {}
    query = sa.select(*columns_of(_table, FloatingAddress)).where(among(_table.c.nic_id, nic_ids))
    return {row.nic_id: build(FloatingAddress, row) for row in session.execute(query)}
