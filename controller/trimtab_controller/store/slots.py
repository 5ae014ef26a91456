"""Slots of hosts: how many operations of one sort may be at work on a host at a time. An operation's end gives its slots back."""

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from trimtab_controller.core.lifecycle import LIVE_STATES
from trimtab_controller.store import operations, schema
from trimtab_controller.store.database import Session

START = "start"
"""Of guests that are brought up after a loss."""

_table = schema.slot


def take(session: Session, *, host_id: str, kind: str, operation_id: str, limit: int) -> bool:
    """Take one of the host's slots, unless the operation has one; False where `limit` are taken."""
    rows = session.execute(
        sa.select(_table.c.number, _table.c.operation_id).where(_table.c.host_id == host_id, _table.c.kind == kind)
    )
    taken = {row.number: row.operation_id for row in rows}
    if operation_id in taken.values():
        return True
    free = next((number for number in range(limit) if number not in taken), None)
    if free is None:
        return False
    try:
        with session.begin_nested():
            session.execute(_table.insert().values(host_id=host_id, kind=kind, number=free, operation_id=operation_id))
    except IntegrityError:
        return False  # another took it this instant
    return True


def wake_next(session: Session, *, host_id: str, step: str, now: datetime) -> None:
    """Make those due that have a claim on the host and wait at `step`, where they ask for a slot: one is about to be given back."""
    waiting, claim = schema.operation, schema.claim
    query = (
        sa.select(waiting.c.id)
        .join(claim, claim.c.operation_id == waiting.c.id)
        .where(claim.c.host_id == host_id, waiting.c.step == step, waiting.c.state.in_([state.value for state in LIVE_STATES]))
    )
    operations.wake_many(session, list(session.scalars(query)), now)
