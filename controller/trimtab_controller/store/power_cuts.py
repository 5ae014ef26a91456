"""Cuts of a host's power that an operator asked for: a drill. Taken by the leader, once."""

from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.store import schema
from trimtab_controller.store.rows import build, columns_of

_table = schema.power_cut


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerCut:
    """A cut that was asked for and not taken yet."""

    host_id: str
    asked_by: str
    asked_at: datetime


def ask(session: Session, host_id: str, *, asked_by: str, now: datetime) -> None:
    """Ask for a cut; one that waits already is asked for anew."""
    take(session, host_id)
    session.execute(_table.insert().values(host_id=host_id, asked_by=asked_by, asked_at=now))


def waiting(session: Session) -> tuple[PowerCut, ...]:
    return tuple(
        build(PowerCut, row) for row in session.execute(sa.select(*columns_of(_table, PowerCut)).order_by(_table.c.asked_at))
    )


def take(session: Session, host_id: str) -> bool:
    """Remove it; return whether it was there. Whoever removed it does it, or nobody."""
    return getattr(session.execute(_table.delete().where(_table.c.host_id == host_id)), "rowcount", 0) == 1
