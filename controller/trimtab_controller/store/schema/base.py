"""What all tables share: naming of constraints, column types and the clauses that state invariants."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

Json = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
BigInt = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


class UtcDateTime(sa.types.TypeDecorator[datetime]):
    """An aware UTC datetime on every database; a naive one is a defect and is refused."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("naive datetime")
        utc = value.astimezone(UTC)
        return utc.replace(tzinfo=None) if dialect.name == "sqlite" else utc

    def process_result_value(self, value: datetime | None, _dialect: sa.Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)

    def result_processor(self, dialect: sa.Dialect, coltype: object) -> Callable[[Any], datetime | None] | None:
        """As `process_result_value`; SQLite's texts are read in one call, which a long list of rows shows."""
        return _instant if dialect.name == "sqlite" else super().result_processor(dialect, coltype)


def _instant(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(f"{text}+00:00")


def id_column(name: str = "id", *, primary_key: bool = True) -> sa.Column[str]:
    return sa.Column(name, sa.String(40), primary_key=primary_key, nullable=False)


def ref(name: str, target: str, *, nullable: bool = False, **options: Any) -> sa.Column[str]:
    return sa.Column(name, sa.String(40), sa.ForeignKey(target), nullable=nullable, **options)


def created_at() -> sa.Column[datetime]:
    return sa.Column("created_at", UtcDateTime(), nullable=False)


def deleted_at() -> sa.Column[datetime]:
    """Hidden from then on; the row stays as a tombstone, so that the id is never reused and the past can be asked."""
    return sa.Column("deleted_at", UtcDateTime(), nullable=True)


def version() -> sa.Column[int]:
    """Raised by every change that a user can see; the etag."""
    return sa.Column("version", sa.BigInteger(), nullable=False, server_default="1")


def unique_among_live(name: str, *columns: sa.Column[Any]) -> sa.Index:
    """A unique index over rows that are not deleted."""
    live = sa.text("deleted_at IS NULL")
    return sa.Index(name, *columns, unique=True, sqlite_where=live, postgresql_where=live)
