"""The decisions of a time, and when what they gave was given back: what a replay of the journal reads."""

from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.placement.request import PlacementRequest
from trimtab_controller.store import schema

_PLACING = ("create", "start")
_ENDING = sa.or_(
    sa.and_(schema.operation.c.kind.in_(("vm.stop", "vm.delete")), schema.operation.c.state == "done"),
    sa.and_(schema.operation.c.kind.in_(("vm.create", "vm.start")), schema.operation.c.state.in_(("failed", "cancelled"))),
)


@dataclass(frozen=True, slots=True)
class Decided:
    at: datetime
    vm_id: str
    request: PlacementRequest
    # '' for a refusal.
    host_id: str


@dataclass(frozen=True, slots=True)
class Ended:
    at: datetime
    vm_id: str


def count_since(session: Session, at: datetime) -> int:
    """Return how many decisions to create or start a vm were made since then."""
    table = schema.decision
    where = (table.c.created_at >= at, table.c.kind.in_(_PLACING))
    return int(session.execute(sa.select(sa.func.count()).select_from(table).where(*where)).scalar_one())


def decided(session: Session, *, since: datetime) -> tuple[Decided, ...]:
    """Return the decisions to create or start vms since then, oldest first; and of each vm the last one before, where it is kept."""
    table = schema.decision
    newer = table.alias("newer")
    is_last_before = ~sa.exists().where(
        newer.c.vm_id == table.c.vm_id, newer.c.kind.in_(_PLACING), newer.c.created_at < since, newer.c.id > table.c.id
    )
    query = (
        sa.select(table.c.created_at, table.c.vm_id, table.c.verdicts, table.c.chosen_host_id)
        .where(table.c.kind.in_(_PLACING), sa.or_(table.c.created_at >= since, is_last_before))
        .order_by(table.c.id)
    )
    return tuple(
        Decided(row.created_at, row.vm_id, PlacementRequest.from_json(row.verdicts["request"]), row.chosen_host_id)
        for row in session.execute(query)
    )


def ended(session: Session) -> tuple[Ended, ...]:
    """Return when vms gave their compute back: stopped, deleted, or not made after all; as long as operations are kept."""
    table = schema.operation
    query = sa.select(table.c.ended_at, table.c.subject_id).where(_ENDING, table.c.ended_at.is_not(None)).order_by(table.c.id)
    return tuple(Ended(row.ended_at, row.subject_id) for row in session.execute(query))
