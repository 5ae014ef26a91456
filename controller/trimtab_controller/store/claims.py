"""Claims: capacity recorded for a vm on a host, and space for its volumes.

Only the leader takes claims (`loops/placement.py`), in a transaction that checks its term; sagas give them back. Every change is
a conditional UPDATE on counters that CHECK constraints bound, so that nothing overcommits whoever races: a sum over rows that is
checked before an insert does (shown on PostgreSQL).
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.model import Claim, MigrationRow
from trimtab_controller.core.placement.columns import device_row
from trimtab_controller.store import schema
from trimtab_controller.store.among import among
from trimtab_controller.store.many import Asked, ManyUpdate, binds
from trimtab_controller.store.rows import build
from trimtab_controller.store.schema.base import BigInt

_host, _space = schema.host, schema.pool_space
_OF_VM = sa.select(schema.claim).where(schema.claim.c.vm_id == sa.bindparam("of_vm")).order_by(schema.claim.c.role)


def _taking(asked: Asked) -> sa.Update:
    """Return the statement that claims compute on a host that is joined, up, not cordoned, and has it."""
    return (
        _host.update()
        .where(
            _host.c.id == asked["at_host"],
            _host.c.deleted_at.is_(None),
            _host.c.is_cordoned.is_(False),
            _host.c.connectivity == "up",
            _host.c.vcpus_claimed + _host.c.unmanaged_vcpus + asked["more_vcpus"] <= _host.c.vcpus_limit,
            _host.c.memory_claimed_mib + _host.c.unmanaged_memory_mib + asked["more_memory_mib"] <= _host.c.memory_limit_mib,
        )
        .values(
            vcpus_claimed=_host.c.vcpus_claimed + asked["more_vcpus"],
            memory_claimed_mib=_host.c.memory_claimed_mib + asked["more_memory_mib"],
            generation=_host.c.generation + 1,
        )
    )


def _taking_space(asked: Asked) -> sa.Update:
    return (
        _space.update()
        .where(
            _space.c.pool_id == asked["of_pool"],
            _space.c.host_id == asked["of_host"],
            _space.c.claimed_bytes + asked["more_bytes"] <= asked["limit_bytes"],
        )
        .values(claimed_bytes=_space.c.claimed_bytes + asked["more_bytes"])
    )


_COMPUTE = {"at_host": sa.String(), "more_vcpus": sa.Integer(), "more_memory_mib": sa.BigInteger()}
_BYTES = {"of_pool": sa.String(), "of_host": sa.String(), "more_bytes": BigInt, "limit_bytes": BigInt}
_TAKE, _TAKE_SPACE = _taking(binds(_COMPUTE)), _taking_space(binds(_BYTES))
# For many at once, of different hosts and places; the caller counts the rows that changed.
TAKE_MANY, TAKE_SPACE_MANY = ManyUpdate(_COMPUTE, _taking), ManyUpdate(_BYTES, _taking_space)
_TAKE_AT_GENERATION = _TAKE.where(_host.c.generation == sa.bindparam("expected_generation"))
_TAKEN_SPACE = sa.select(schema.disk_claim.c.size_bytes).where(
    schema.disk_claim.c.volume_id == sa.bindparam("volume_id"),
    schema.disk_claim.c.pool_id == sa.bindparam("pool_id"),
    schema.disk_claim.c.host_id == sa.bindparam("host_id"),
)
_stock = schema.host_stock
_TAKE_STOCK = (
    _stock.update()
    .where(
        _stock.c.host_id == sa.bindparam("of_host"),
        _stock.c.resource == sa.bindparam("of_resource"),
        _stock.c.claimed + sa.bindparam("more") <= _stock.c.capacity,
    )
    .values(claimed=_stock.c.claimed + sa.bindparam("more"))
)
_JOIN_GROUP = (
    schema.vm_group.update()
    .where(schema.vm_group.c.id == sa.bindparam("of_group"), schema.vm_group.c.generation == sa.bindparam("seen_generation"))
    .values(generation=schema.vm_group.c.generation + 1)
)


class ClaimRefused(Exception):
    """The place changed since the decision was made: decide again on a fresh snapshot."""


def of_vm(session: Session, vm_id: str) -> tuple[Claim, ...]:
    """Return the vm's claims, home first."""
    return tuple(build(Claim, row) for row in session.execute(_OF_VM, {"of_vm": vm_id}))


def homes_of(session: Session, vm_ids: Sequence[str]) -> dict[str, Claim]:
    """Return the home claim of each of these vms that holds compute."""
    table = schema.claim
    rows = session.execute(sa.select(table).where(among(table.c.vm_id, vm_ids), table.c.role == "home"))
    return {row.vm_id: build(Claim, row) for row in rows}


def take(
    session: Session,
    *,
    vm_id: str,
    host_id: str,
    role: str,
    epoch: int,
    vcpus: int,
    memory_mib: int,
    operation_id: str,
    generation: int | None,
    now: datetime,
) -> None:
    """Claim compute on a host that is joined, up, not cordoned, and at `generation` (None: any); ClaimRefused otherwise."""
    asked: dict[str, Any] = {"at_host": host_id, "more_vcpus": vcpus, "more_memory_mib": memory_mib}
    if generation is None:
        changed = session.execute(_TAKE, asked)
    else:
        changed = session.execute(_TAKE_AT_GENERATION, {**asked, "expected_generation": generation})
    if getattr(changed, "rowcount", 0) != 1:
        raise ClaimRefused(host_id)
    values = {
        "vm_id": vm_id,
        "host_id": host_id,
        "role": role,
        "epoch": epoch,
        "vcpus": vcpus,
        "memory_mib": memory_mib,
        "operation_id": operation_id,
        "created_at": now,
    }
    session.execute(schema.claim.insert(), values)


def resize(session: Session, vm_id: str, *, host_id: str, vcpus: int, memory_mib: int) -> None:
    """Make the vm's claim on its host this large. ClaimRefused where it grows and the host has no room; then nothing changes.

    No choice is made here, so it is not the leader's: the host is where the vm runs, and the bounds are the database's.
    """
    table = schema.claim
    row = session.execute(sa.select(table).where(table.c.vm_id == vm_id, table.c.host_id == host_id)).one_or_none()
    if row is None:
        raise ClaimRefused(host_id)
    more_vcpus, more_memory_mib = vcpus - row.vcpus, memory_mib - row.memory_mib
    bounds = []
    if more_vcpus > 0:
        bounds.append(_host.c.vcpus_claimed + _host.c.unmanaged_vcpus + more_vcpus <= _host.c.vcpus_limit)
    if more_memory_mib > 0:
        bounds.append(_host.c.memory_claimed_mib + _host.c.unmanaged_memory_mib + more_memory_mib <= _host.c.memory_limit_mib)
    changed = session.execute(
        _host.update()
        .where(_host.c.id == host_id, *bounds)
        .values(
            vcpus_claimed=_host.c.vcpus_claimed + more_vcpus,
            memory_claimed_mib=_host.c.memory_claimed_mib + more_memory_mib,
            generation=_host.c.generation + 1,
        )
    )
    if getattr(changed, "rowcount", 0) != 1:
        raise ClaimRefused(host_id)
    session.execute(
        table.update().where(table.c.vm_id == vm_id, table.c.host_id == host_id).values(vcpus=vcpus, memory_mib=memory_mib)
    )


def take_stock(session: Session, *, vm_id: str, host_id: str, amounts: Mapping[str, int]) -> None:
    """Claim of what a host counts besides vcpus and memory, by resource name; ClaimRefused where it has not so much."""
    for resource, amount in sorted(amounts.items()):
        if not _take_row(session, host_id, resource, amount):
            raise ClaimRefused(f"{host_id} {resource}")
        row = {"vm_id": vm_id, "host_id": host_id, "resource": resource, "amount": amount}
        session.execute(schema.claim_stock.insert(), row)


def take_devices(session: Session, *, vm_id: str, host_id: str, kind: str, count: int) -> None:
    """Claim so many single devices of a kind, whichever are free; ClaimRefused where there are too few."""
    free = sa.select(_stock.c.resource).where(
        _stock.c.host_id == host_id, _stock.c.resource.startswith(device_row(kind, "")), _stock.c.claimed < _stock.c.capacity
    )
    for resource in session.scalars(free.order_by(_stock.c.resource)).all():
        if count and _take_row(session, host_id, resource, 1):
            session.execute(schema.claim_stock.insert(), {"vm_id": vm_id, "host_id": host_id, "resource": resource, "amount": 1})
            count -= 1
    if count:
        raise ClaimRefused(f"{host_id} {kind}")


def _take_row(session: Session, host_id: str, resource: str, amount: int) -> bool:
    asked = {"of_host": host_id, "of_resource": resource, "more": amount}
    return getattr(session.execute(_TAKE_STOCK, asked), "rowcount", 0) == 1


def join_group(session: Session, group_id: str, *, generation: int) -> None:
    """Say that a member is placed on what was known at `generation`; ClaimRefused where another was placed since."""
    joined = session.execute(_JOIN_GROUP, {"of_group": group_id, "seen_generation": generation})
    if getattr(joined, "rowcount", 0) != 1:
        raise ClaimRefused(group_id)


def _give_back_stock(session: Session, vm_id: str, host_id: str) -> None:
    held, stock = schema.claim_stock, schema.host_stock
    gone = held.delete().where(held.c.vm_id == vm_id, held.c.host_id == host_id).returning(held.c.resource, held.c.amount)
    for row in session.execute(gone).all():
        session.execute(
            stock.update()
            .where(stock.c.host_id == host_id, stock.c.resource == row.resource)
            .values(claimed=stock.c.claimed - row.amount)
        )


def give_back(session: Session, vm_id: str, *, host_id: str = "") -> None:
    """Delete the vm's claims (on one host, or all) and lower the counters; nothing where there is none."""
    table, host = schema.claim, schema.host
    where = [table.c.vm_id == vm_id] + ([table.c.host_id == host_id] if host_id else [])
    rows = session.execute(table.delete().where(*where).returning(table.c.host_id, table.c.vcpus, table.c.memory_mib)).all()
    for row in rows:
        _give_back_stock(session, vm_id, row.host_id)
        session.execute(
            host.update()
            .where(host.c.id == row.host_id)
            .values(
                vcpus_claimed=host.c.vcpus_claimed - row.vcpus,
                memory_claimed_mib=host.c.memory_claimed_mib - row.memory_mib,
                generation=host.c.generation + 1,
            )
        )


def promote_target(session: Session, vm_id: str) -> None:
    """After a migration: the home claim is given back and the target's becomes home."""
    table = schema.claim
    homes = session.scalars(sa.select(table.c.host_id).where(table.c.vm_id == vm_id, table.c.role == "home")).all()
    targets = session.scalars(sa.select(table.c.host_id).where(table.c.vm_id == vm_id, table.c.role == "target")).all()
    if not targets:
        return  # done already
    for host_id in homes:
        give_back(session, vm_id, host_id=host_id)
    session.execute(table.update().where(table.c.vm_id == vm_id).values(role="home"))


# --- space -----------------------------------------------------------------------------------------------------------------


def take_space(session: Session, *, volume_id: str, pool_id: str, host_id: str, size_bytes: int, limit_bytes: int) -> None:
    """Claim space at a place ('' for a shared pool) up to `limit_bytes`; ClaimRefused beyond. Taken already: nothing."""
    key = {"volume_id": volume_id, "pool_id": pool_id, "host_id": host_id}
    if session.execute(_TAKEN_SPACE, key).one_or_none() is not None:
        return
    asked = {"of_pool": pool_id, "of_host": host_id, "more_bytes": size_bytes, "limit_bytes": limit_bytes}
    if getattr(session.execute(_TAKE_SPACE, asked), "rowcount", 0) != 1:
        raise ClaimRefused(pool_id)
    session.execute(schema.disk_claim.insert(), {**key, "size_bytes": size_bytes})


def resize_space(session: Session, *, volume_id: str, size_bytes: int, limit_bytes: int) -> None:
    """Make the volume's space claim this large at its one place; ClaimRefused beyond `limit_bytes` of that place.

    Nothing where it claims none.
    """
    table, space = schema.disk_claim, schema.pool_space
    row = session.execute(sa.select(table).where(table.c.volume_id == volume_id)).one_or_none()
    if row is None:
        return
    more_bytes = size_bytes - row.size_bytes
    at_place = [space.c.pool_id == row.pool_id, space.c.host_id == row.host_id]
    bounds = [space.c.claimed_bytes + more_bytes <= limit_bytes] if more_bytes > 0 else []
    changed = session.execute(space.update().where(*at_place, *bounds).values(claimed_bytes=space.c.claimed_bytes + more_bytes))
    if getattr(changed, "rowcount", 0) != 1:
        raise ClaimRefused(row.pool_id)
    session.execute(table.update().where(table.c.volume_id == volume_id).values(size_bytes=size_bytes))


def give_back_space(
    session: Session, volume_ids: Sequence[str], *, host_id: str | None = None, pool_id: str | None = None
) -> None:
    """Delete the volumes' space claims (at one place, or all) and lower the counters; nothing where there is none."""
    table, space = schema.disk_claim, schema.pool_space
    where = [table.c.volume_id.in_(volume_ids)] + ([table.c.host_id == host_id] if host_id is not None else [])
    where += [table.c.pool_id == pool_id] if pool_id is not None else []
    deleted = table.delete().where(*where).returning(table.c.pool_id, table.c.host_id, table.c.size_bytes)
    for row in session.execute(deleted).all():
        session.execute(
            space.update()
            .where(space.c.pool_id == row.pool_id, space.c.host_id == row.host_id)
            .values(claimed_bytes=space.c.claimed_bytes - row.size_bytes)
        )


# --- migrations ------------------------------------------------------------------------------------------------------------


def migration_of(session: Session, vm_id: str) -> MigrationRow | None:
    """Return the migration that is not settled, if there is one: then both hosts are holders."""
    row = session.execute(sa.select(schema.migration).where(schema.migration.c.vm_id == vm_id)).one_or_none()
    return build(MigrationRow, row, copied_volume_ids=tuple(row.copied_volumes)) if row else None


def begin_migration(
    session: Session,
    *,
    vm_id: str,
    operation_id: str,
    source_host_id: str,
    target_host_id: str,
    epoch: int,
    copied_volume_ids: Sequence[str],
    now: datetime,
) -> None:
    """Record the target as a holder under the next epoch, before it is prepared."""
    session.execute(
        schema.migration.insert().values(
            vm_id=vm_id,
            operation_id=operation_id,
            source_host_id=source_host_id,
            target_host_id=target_host_id,
            source_epoch=epoch,
            target_epoch=epoch + 1,
            copied_volumes=list(copied_volume_ids),
            created_at=now,
        )
    )


def end_migration(session: Session, vm_id: str) -> None:
    """Forget the migration once one side is proven absent."""
    session.execute(schema.migration.delete().where(schema.migration.c.vm_id == vm_id))
