"""Claims: capacity recorded for a vm on a host, and space for its volumes.

Only the leader takes claims (`loops/placement.py`), in a transaction that checks its term; sagas give them back. Every change is
a conditional UPDATE on counters that CHECK constraints bound, so that nothing overcommits whoever races: a sum over rows that is
checked before an insert does (shown on PostgreSQL).
"""

from collections.abc import Sequence
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.model import Claim, MigrationRow
from trimtab_controller.store import schema
from trimtab_controller.store.rows import build


class ClaimRefused(Exception):
    """The place changed since the decision was made: decide again on a fresh snapshot."""


def of_vm(session: Session, vm_id: str) -> tuple[Claim, ...]:
    """Return the vm's claims, home first."""
    table = schema.claim
    rows = session.execute(sa.select(table).where(table.c.vm_id == vm_id).order_by(table.c.role))
    return tuple(build(Claim, row) for row in rows)


def homes_of(session: Session, vm_ids: Sequence[str]) -> dict[str, Claim]:
    """Return the home claim of each of these vms that holds compute."""
    table = schema.claim
    rows = session.execute(sa.select(table).where(table.c.vm_id.in_(vm_ids), table.c.role == "home"))
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
    host = schema.host
    conditions = [
        host.c.id == host_id,
        host.c.deleted_at.is_(None),
        host.c.is_cordoned.is_(False),
        host.c.connectivity == "up",
        host.c.vcpus_claimed + host.c.unmanaged_vcpus + vcpus <= host.c.vcpus_limit,
        host.c.memory_claimed_mib + host.c.unmanaged_memory_mib + memory_mib <= host.c.memory_limit_mib,
    ]
    if generation is not None:
        conditions.append(host.c.generation == generation)
    changed = session.execute(
        host.update()
        .where(*conditions)
        .values(
            vcpus_claimed=host.c.vcpus_claimed + vcpus,
            memory_claimed_mib=host.c.memory_claimed_mib + memory_mib,
            generation=host.c.generation + 1,
        )
    )
    if getattr(changed, "rowcount", 0) != 1:
        raise ClaimRefused(host_id)
    session.execute(
        schema.claim.insert().values(
            vm_id=vm_id,
            host_id=host_id,
            role=role,
            epoch=epoch,
            vcpus=vcpus,
            memory_mib=memory_mib,
            operation_id=operation_id,
            created_at=now,
        )
    )


def give_back(session: Session, vm_id: str, *, host_id: str = "") -> None:
    """Delete the vm's claims (on one host, or all) and lower the counters; nothing where there is none."""
    table, host = schema.claim, schema.host
    where = [table.c.vm_id == vm_id] + ([table.c.host_id == host_id] if host_id else [])
    rows = session.execute(table.delete().where(*where).returning(table.c.host_id, table.c.vcpus, table.c.memory_mib)).all()
    for row in rows:
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
    table, space = schema.disk_claim, schema.pool_space
    key = (table.c.volume_id == volume_id, table.c.pool_id == pool_id, table.c.host_id == host_id)
    if session.execute(sa.select(table.c.size_bytes).where(*key)).one_or_none() is not None:
        return
    changed = session.execute(
        space.update()
        .where(space.c.pool_id == pool_id, space.c.host_id == host_id, space.c.claimed_bytes + size_bytes <= limit_bytes)
        .values(claimed_bytes=space.c.claimed_bytes + size_bytes)
    )
    if getattr(changed, "rowcount", 0) != 1:
        raise ClaimRefused(pool_id)
    session.execute(table.insert().values(volume_id=volume_id, pool_id=pool_id, host_id=host_id, size_bytes=size_bytes))


def give_back_space(session: Session, volume_ids: Sequence[str], *, host_id: str | None = None) -> None:
    """Delete the volumes' space claims (at one place, or all) and lower the counters; nothing where there is none."""
    table, space = schema.disk_claim, schema.pool_space
    where = [table.c.volume_id.in_(volume_ids)] + ([table.c.host_id == host_id] if host_id is not None else [])
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
