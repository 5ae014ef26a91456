"""Usage history: means and peaks by subject, metric and bucket of time."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from trimtab_controller.store import schema

_table = schema.usage_rollup


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollup:
    subject_id: str
    metric: str
    bucket_s: int
    bucket_at: datetime
    mean: float
    peak: float
    samples: int


def add(session: Session, rollups: Sequence[Rollup]) -> None:
    """Insert whole buckets; one that is there already stays, since another leader saw more of it."""
    if not rollups:
        return
    insert = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
    session.execute(insert(_table).on_conflict_do_nothing(), [asdict(one) for one in rollups])


def delete_before(session: Session, at: datetime, *, limit: int) -> int:
    """Delete old buckets; return how many instants were looked at."""
    query = (
        sa.select(_table.c.bucket_at)
        .where(_table.c.bucket_at < at)
        .distinct()
        .order_by(_table.c.bucket_at)
        .limit(max(1, limit // 100))
    )
    instants = list(session.scalars(query))
    if instants:
        session.execute(_table.delete().where(_table.c.bucket_at.in_(instants)))
    return len(instants)
